"""What every stage directory holds: stage.json first, status.json, manifest.json last.

A shard set is a stage directory too and shards/ depends on nothing of dist_train, so the three
files are defined here; dist_train/distributed/stage.py adds the chain of parents.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from shards.storage.errors import BadInput, Corrupt, Unfinished
from shards.storage.files import (
    json_bytes,
    names_in,
    read_json,
    remove_abandoned,
    sha256_file,
    sha256_json,
    sync,
    write_json,
)

FORMAT = 1
STAGE, STATUS, MANIFEST = "stage.json", "status.json", "manifest.json"
WORK = ".work"
"""The folder of what a stage needs only until it is finished."""
KEYS = {
    STAGE: {"format", "kind", "config", "parents"},
    STATUS: {"status"},
    MANIFEST: {"fingerprint", "counts", "files"},
}


class FileFacts(TypedDict):
    """What the manifest lists of a file: its size in bytes and its hex sha256."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """manifest.json; `files` by their path below the directory, `sha256` that of all other keys."""

    format: int
    kind: str
    fingerprint: str
    counts: dict[str, Any]
    files: dict[str, FileFacts]
    stage_sha256: str
    sha256: str


def timestamp() -> str:
    """The local time with its offset from UTC, as the stage files record it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def begin(out: Path, kind: str, config: dict[str, Any], parents: dict[str, Any]) -> bool:
    """Claim `out` for one stage; True when the same stage is already finished there.

    `config` holds what the result depends on. An unfinished directory of the same kind, config
    and parents is resumed; anything else raises BadInput and is left as it is. A parent is
    identified by its fingerprint or sha256, so a tree that was moved together stays the same.
    Unfinished files of an attempt that was killed are removed.
    """
    wanted = {"kind": kind, "config": config, "parents": parents}
    # Listed before stage.json is looked for: another process may claim and fill the folder now.
    names = names_in(out) if out.is_dir() else set()
    # A stage that failed before it wrote anything (a mistyped option) leaves the folder free.
    empty = {"": {STAGE}, "failed": {STAGE, STATUS}}
    if (out / STAGE).exists() and empty.get(status_of(out)) != names_in(out):
        _check_same(out, wanted)
    elif out.is_file() or names - {STAGE, STATUS}:
        raise BadInput(f"{out}: holds files of something else; name a new or an empty folder")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / STAGE, {"format": FORMAT, "started": timestamp()} | wanted)
        except OSError as error:
            raise BadInput(f"{out}: cannot be written ({error.strerror})") from None
    remove_abandoned(out)
    if (out / MANIFEST).exists():
        # A process killed after it wrote the manifest left these as they were.
        shutil.rmtree(out / WORK, ignore_errors=True)
        if status_of(out) != "done":
            write_status(out, "done")
        return True
    write_status(out, "running")
    return False


def _check_same(out: Path, wanted: dict[str, Any]) -> None:
    """Raise BadInput naming what differs when `out` belongs to another stage than `wanted`."""

    def identities(parents: dict[str, Any]) -> dict[str, Any]:
        # The path identifies only what has nothing else, such as a folder of photos.
        return {
            name: {key: value for key, value in facts.items() if key != "path"} or facts
            for name, facts in parents.items()
        }

    found = _read_ours(out / STAGE)
    if found.get("format") != FORMAT:
        raise BadInput(f"{out}: format {found.get('format')}, this version writes {FORMAT}")
    if found["kind"] != wanted["kind"]:
        raise BadInput(f"{out}: already holds {found['kind']}; name another folder")
    differing = {
        "config": _differing(found["config"], wanted["config"]),
        "parents": _differing(identities(found["parents"]), identities(wanted["parents"])),
    }
    for name, keys in differing.items():
        if keys:
            raise BadInput(
                f"{out}: already holds the {found['kind']} of another command "
                f"({name} differs: {keys}); name another folder or remove this one"
            )


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    rows = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += [_differing(a, b, f"{prefix}{key}.")] if a != b else []
        elif a != b:
            rows.append(f"{prefix}{key} {a!r} there, {b!r} requested")
    return "; ".join(rows)


def write_status(out: Path, state: str, reason: str = "", by: dict[str, Any] | None = None) -> None:
    """Record running, preempted, done or failed with the reason and host; `by` adds more keys."""
    value = {"status": state, "reason": reason, "time": timestamp(), "host": socket.gethostname()}
    write_json(out / STATUS, value | (by or {}))


def status_of(out: Path) -> str:
    """The recorded state: running, preempted, done or failed; empty when none is recorded."""
    return _read_ours(out / STATUS)["status"] if (out / STATUS).exists() else ""


def finish(
    out: Path, counts: Mapping[str, Any], files: list[Path], written: Mapping[Path, str] = {}
) -> str:
    """Write the manifest over `files` (inside `out`), mark the stage done, return its fingerprint.

    `written` holds the sha256 of files when they were written. Raises Corrupt naming one that has
    changed since: from now on the manifest is what files are compared with.
    """
    for file in files:
        sync(file)  # includes files that grew line by line or came from other programs
    listed = {
        str(file.relative_to(out)): FileFacts(bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in sorted(files)
    }
    for file, sha256 in written.items():
        if listed[str(file.relative_to(out))]["sha256"] != sha256:
            raise Corrupt(
                f"{file}: has changed since it was written; remove it and its .idx, "
                "and run the same command again"
            )
    stage = read_json(out / STAGE)
    fingerprint = fingerprint_of(stage, listed)
    manifest = {"format": FORMAT, "kind": stage["kind"], "fingerprint": fingerprint}
    manifest |= {"counts": counts, "files": listed, "stage_sha256": sha256_file(out / STAGE)}
    write_json(out / MANIFEST, manifest | {"sha256": sha256_json(manifest)})
    write_status(out, "done")
    return fingerprint


def fingerprint_of(stage: dict[str, Any], files: Mapping[str, FileFacts]) -> str:
    """The identity of a finished stage: the sha256 of its kind, config and listed files."""
    return sha256_json({"kind": stage["kind"], "config": stage["config"], "files": files})


def open_finished(path: Path, kind: str) -> Manifest:
    """The manifest of a finished stage directory; raises as `read_finished` does."""

    def read(name: str) -> bytes | None:
        return (path / name).read_bytes() if (path / name).exists() else None

    return read_finished(kind, lambda name: str(path / name), read)[1]


def read_finished(
    kind: str, where: Callable[[str], str], read: Callable[[str], bytes | None]
) -> tuple[dict[str, Any], Manifest]:
    """The content of (stage.json, manifest.json) of a stage directory.

    `read` gives a file by its name or None; `where` names it, or by "" the directory, in messages.
    Raises BadInput unless it is of `kind` in this version's format, Unfinished without manifest.
    """
    folder = where("")
    if (data := read(STAGE)) is None:
        raise BadInput(f"{folder}: not a {kind} directory (no {STAGE})")
    stage = parsed(data, STAGE, where(STAGE))
    if stage.get("format") != FORMAT:
        raise BadInput(f"{folder}: format {stage.get('format')}, this version reads {FORMAT}")
    if stage["kind"] != kind:
        raise BadInput(f"{folder}: holds {stage['kind']}, wanted {kind}")
    if (data := read(MANIFEST)) is None:
        raise Unfinished(f"{folder}: unfinished (no {MANIFEST}); run the same command again")
    manifest = parsed(data, MANIFEST, where(MANIFEST))
    for name in manifest["files"]:
        if not lies_below(name):
            raise Corrupt(f"{where(MANIFEST)}: file {name!r} has no path below it; restore it")
    return stage, manifest


def lies_below(name: str) -> bool:
    """Whether a file's name leads nowhere outside the directory that names it, sent by anyone."""
    return not os.path.isabs(name) and ".." not in name.split("/")


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise Corrupt when a manifest differs from its own sha256: it proves nothing then."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != sha256_json(content):
        raise Corrupt(f"{where}: differs from its own sha256; restore it")


def faults_of(out: Path) -> list[str]:
    """Differences of stage.json and status.json; raises Corrupt when the manifest is damaged."""
    manifest = _read_ours(out / MANIFEST)
    check_manifest(manifest, str(out / MANIFEST))
    if (out / MANIFEST).read_bytes() != json_bytes(manifest):
        raise Corrupt(f"{out / MANIFEST}: differs from its own sha256; restore it")
    faults = []
    if manifest["stage_sha256"] != sha256_file(out / STAGE):
        faults.append(f"{out / STAGE}: content differs from what was written; restore it")
    elif manifest["fingerprint"] != fingerprint_of(_read_ours(out / STAGE), manifest["files"]):
        raise Corrupt(f"{out / MANIFEST}: does not fit its fingerprint; restore it")
    if status_of(out) != "done":
        faults.append(f"{out / STATUS}: is {status_of(out)!r} although the stage is finished")
    return faults


def parsed(data: bytes, name: str, where: str) -> Any:
    """The JSON of the stage file `name`; raises Corrupt when it is none or lacks its keys."""
    try:
        value = json.loads(data.decode())
    except ValueError as error:
        raise Corrupt(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict) or not KEYS[name] <= value.keys():
        raise Corrupt(f"{where}: not a {name} of dist_train; restore it or create it again")
    return value


def _read_ours(path: Path) -> Any:
    return parsed(path.read_bytes(), path.name, str(path))
