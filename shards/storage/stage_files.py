"""What every stage directory holds: stage.json first, status.json, manifest.json last.

A shard set is a stage directory too and shards/ depends on nothing of dist_train, so the three
files are defined here; dist_train/distributed/stage.py adds the chain of parents.
"""

import hashlib
import re
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
    parse_json,
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
KEYS: dict[str, dict[str, type]] = {
    STAGE: {"format": int, "kind": str, "config": dict, "parents": dict},
    STATUS: {"status": str},
    MANIFEST: {"fingerprint": str, "counts": dict, "files": dict},
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
    if (out / MANIFEST).exists():
        _check_intact(
            (out / STAGE).read_bytes(), _read_ours(out / MANIFEST), lambda n: str(out / n)
        )
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
    return read_status(out).get("status", "")


def read_status(out: Path) -> dict[str, Any]:
    """The content of status.json; empty when there is none. Corrupt for what is no status."""
    return _read_ours(out / STATUS) if (out / STATUS).exists() else {}


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
    write_json(out / MANIFEST, sealed(manifest))
    write_status(out, "done")
    return fingerprint


def fingerprint_of(stage: dict[str, Any], files: Mapping[str, FileFacts]) -> str:
    """The identity of a finished stage: the sha256 of its kind, config and listed files."""
    return sha256_json({"kind": stage["kind"], "config": stage["config"], "files": files})


def open_finished(path: Path, kind: str) -> Manifest:
    """The manifest of a finished stage directory; raises as `read_finished` does."""
    return read_folder(path, kind)[1]


def open_stage(path: Path) -> dict[str, Any]:
    """stage.json of a finished stage directory of any kind; raises as `read_finished` does."""
    return read_folder(path, _read_ours(path / STAGE)["kind"])[0]


def read_folder(path: Path, kind: str) -> tuple[dict[str, Any], Manifest]:
    """`read_finished` of a directory on disk."""

    def read(name: str) -> bytes | None:
        try:
            return (path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BadInput(f"{path / name}: cannot be read ({error.strerror})") from None

    return read_finished(kind, lambda name: str(path / name), read)


def read_finished(
    kind: str, where: Callable[[str], str], read: Callable[[str], bytes | None]
) -> tuple[dict[str, Any], Manifest]:
    """The content of (stage.json, manifest.json) of a stage directory.

    `read` gives a file by its name or None; `where` names it, or by "" the directory, in messages.
    Raises BadInput unless it is of `kind` in this version's format, Unfinished without manifest,
    Corrupt where the two are not as they were written.
    """
    folder = where("")
    if (stage_bytes := read(STAGE)) is None:
        raise BadInput(f"{folder}: not a {kind} directory (no {STAGE})")
    stage = parsed(stage_bytes, STAGE, where(STAGE))
    if stage.get("format") != FORMAT:
        raise BadInput(f"{folder}: format {stage.get('format')}, this version reads {FORMAT}")
    if stage["kind"] != kind:
        raise BadInput(f"{folder}: holds {stage['kind']}, wanted {kind}")
    if (data := read(MANIFEST)) is None:
        raise Unfinished(f"{folder}: unfinished (no {MANIFEST}); run the same command again")
    manifest = parsed(data, MANIFEST, where(MANIFEST))
    _check_intact(stage_bytes, manifest, where)
    return stage, manifest


def _check_intact(
    stage_bytes: bytes, manifest: Mapping[str, Any], where: Callable[[str], str]
) -> None:
    """Raise Corrupt unless stage.json and the manifest are as they were written.

    Nor may a file that the manifest lists lie outside the directory.
    """
    is_intact = is_sealed(manifest)
    if is_intact and manifest.get("stage_sha256") != hashlib.sha256(stage_bytes).hexdigest():
        raise Corrupt(f"{where(STAGE)}: content differs from what was written; restore it")
    stage = parsed(stage_bytes, STAGE, where(STAGE))
    if fingerprint_of(stage, manifest["files"]) != manifest["fingerprint"]:
        raise Corrupt(f"{where(MANIFEST)}: does not fit its fingerprint; restore it")
    for name, facts in manifest["files"].items():
        # Name and sha256 become parts of paths.
        match facts:
            case {"bytes": int(size), "sha256": str(sha256)}:
                is_valid = size >= 0 and re.fullmatch(r"[0-9a-f]{64}", sha256)
            case _:
                is_valid = False
        if not is_valid or name.startswith("/") or ".." in name.split("/"):
            raise Corrupt(
                f"{where(MANIFEST)}: file {name!r} has no path below it, size and sha256; restore "
                "the directory"
            )
    if not is_intact:
        raise Corrupt(f"{where(MANIFEST)}: differs from its own sha256; restore it")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the sha256 of its other keys, so that a change of it shows."""
    return {**value, "sha256": sha256_json(value)}


def is_sealed(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as `sealed` returned it."""
    content = {key: one for key, one in value.items() if key != "sha256"}
    return value.get("sha256") == sha256_json(content)


def faults_of(out: Path) -> list[str]:
    """How stage.json, manifest.json and status.json differ from what was written."""
    manifest = _read_ours(out / MANIFEST)
    try:
        _check_intact((out / STAGE).read_bytes(), manifest, lambda name: str(out / name))
    except Corrupt as fault:
        return [str(fault)]
    faults = []
    if (out / MANIFEST).read_bytes() != json_bytes(manifest):
        faults.append(f"{out / MANIFEST}: differs from its own sha256; restore it")
    if status_of(out) != "done":
        faults.append(f"{out / STATUS}: is {status_of(out)!r} although the stage is finished")
    return faults


def parsed(data: bytes, name: str, where: str) -> Any:
    """The JSON of the stage file `name`; raises Corrupt when it is none or lacks its keys."""
    value = parse_json(data, where)
    is_ours = isinstance(value, dict) and all(
        isinstance(value.get(key), kind) for key, kind in KEYS[name].items()
    )
    if not is_ours:
        raise Corrupt(f"{where}: not a {name} of dist_train; restore it or create it again")
    return value


def read_stage(out: Path) -> dict[str, Any]:
    """The content of stage.json, of an unfinished stage too; Corrupt for what is none."""
    return _read_ours(out / STAGE)


def _read_ours(path: Path) -> Any:
    try:
        return parsed(path.read_bytes(), path.name, str(path))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
