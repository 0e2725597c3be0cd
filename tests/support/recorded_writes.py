"""What a process brings to the disk, recorded in order while it runs, and the rule that it keeps.

A file is whole after a loss of power only if its bytes were brought to the disk before it got its
name, and the name after that. `recorded` notes every fsync and every rename of this process, and
of what, as /proc/self/fd tells; `faults` checks the rule on the record, whatever calls made it.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MANIFEST, STATUS, MARK = "manifest.json", "status.json", ".idx"
State = tuple[int, int, int, int]


@dataclass(frozen=True)
class Event:
    """An fsync of what lies at `path`, or a rename of something to `path`.

    `states`: of it, of all below it where a folder is renamed, and of what it lists where it is a
    manifest, by path: device, inode, bytes and time of the last write.
    """

    renamed: bool
    path: Path
    states: dict[Path, State]
    is_folder: bool


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Within it every fsync and rename of this process is noted, in order, and done."""
    events: list[Event] = []

    def syncing(call: Callable[[Any], None]) -> Callable[[Any], None]:
        def sync(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            call(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            found = os.fstat(descriptor)
            events.append(Event(False, path, {path: _state(found)}, path.is_dir()))

        return sync

    def renaming(call: Callable[..., None]) -> Callable[..., None]:
        def rename(old: Any, new: Any, **more: Any) -> None:
            call(old, new, **more)
            path = Path(os.path.abspath(new))
            more = sorted(path.rglob("*")) if path.is_dir() else _listed(path)
            states = {each: _state(each.stat()) for each in (path, *more)}
            events.append(Event(True, path, states, path.is_dir()))

        return rename

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, syncing(getattr(os, name)))
        for name in ("rename", "replace"):
            patch.setattr(os, name, renaming(getattr(os, name)))
        yield events


def _listed(path: Path) -> list[Path]:
    if path.name != MANIFEST:
        return []
    return [path.parent / name for name in json.loads(path.read_text())["files"]]


def _state(found: os.stat_result) -> State:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def faults(events: list[Event], root: Path, logs: tuple[str, ...] = ()) -> list[str]:
    """How the record of what was written below `root` breaks the rule; empty where it keeps it.

    * What gets a name was brought to the disk before, in the state in which it is then; so was all
      that a folder holds when it gets its name, in which nothing gets a name afterwards, and all
      that a manifest lists when it gets its.
    * The folder that holds the name is brought to the disk after it, and before any mark: a
      manifest or an index, by which others take what was written for whole.
    * A manifest is the last of its folder, but for the status; an index comes behind its tar.
    * Every file that is there in the end got its name so, or is one of `logs`, which grow.
    """
    events = [event for event in events if event.path.is_relative_to(root) or event.path == root]
    renames = [(at, event) for at, event in enumerate(events) if event.renamed]
    found = [f"{event.path}: {fault}" for at, event in renames for fault in _of(events, at, root)]
    named = {
        state[:2]
        for _, event in renames
        for path, state in event.states.items()
        if event.is_folder or path == event.path
    }
    for path in sorted(root.rglob("*")):
        is_log = any(path.relative_to(root).match(log) for log in logs)
        if path.is_file() and not is_log and _state(path.stat())[:2] not in named:
            found.append(f"{path}: was written under its own name")
    return found


def _of(events: list[Event], at: int, root: Path) -> Iterator[str]:
    event, before, after = events[at], events[:at], events[at + 1 :]
    synced = {state for each in before if not each.renamed for state in each.states.values()}
    for path, state in event.states.items():
        if state not in synced:
            yield f"got its name before {path} was brought to the disk"
    folder = next((n for n, each in enumerate(after) if _syncs(each, event.path.parent)), None)
    mark = next((n for n, each in enumerate(after) if each.renamed and _is_mark(each)), None)
    if folder is None:
        yield "the folder that holds its name was never brought to the disk"
    elif mark is not None and folder > mark:
        yield f"its name was not on the disk when {after[mark].path} said that all is complete"
    for each in before:
        if each.renamed and each.is_folder and each.path in event.path.parents:
            yield f"is written into {each.path}, which has its name already"
    later = [each.path for each in after if each.renamed]
    if event.path.name == MANIFEST:
        more = [path for path in later if event.path.parent in path.parents]
        if late := [path for path in more if path.name not in (STATUS, MANIFEST)]:
            yield f"says that all is whole before {late[0]} is there"
    if event.path.suffix == MARK and event.path.with_suffix(".tar") in later:
        yield "marks its tar before it is there"


def _syncs(event: Event, folder: Path) -> bool:
    return not event.renamed and event.path == folder


def _is_mark(event: Event) -> bool:
    return event.path.name == MANIFEST or event.path.suffix == MARK
