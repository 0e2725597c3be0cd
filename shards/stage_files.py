"""What every stage directory holds: stage.json first, status.json, manifest.json last.

A shard set is a stage directory too and shards/ stands alone, so the three files live here;
dist_train/stage.py adds the chain of parents.
"""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shards.errors import BadInput, Corrupt, Unfinished
from shards.files import (
    is_json_of,
    is_temporary,
    read_json,
    sha256_file,
    sha256_json,
    sync,
    write_json,
)

FORMAT = 1
STAGE, STATUS, MANIFEST = "stage.json", "status.json", "manifest.json"
KEYS = {
    STAGE: {"format", "kind", "config", "parents"},
    STATUS: {"status"},
    MANIFEST: {"fingerprint", "counts", "files"},
}


def begin(out: Path, kind: str, config: dict[str, Any], parents: dict[str, Any]) -> bool:
    """Claim `out` for one stage; True when the same stage is already finished there.

    `config` holds what the result depends on; an unfinished directory of the same kind,
    config and parents is continued, anything else is refused and left as it is. A parent
    counts by its fingerprint or sha256, so a tree that was moved as a whole is the same one.
    """
    wanted = {"kind": kind, "config": config, "parents": parents}
    # Listed first: another process may claim the folder now and go on to fill it.
    made = _made(out) if out.is_dir() else set()
    if (out / STAGE).exists() and not _came_to_nothing(out):
        _refuse_another(out, wanted, _read_ours(out / STAGE))
    elif out.is_file() or made - {STAGE, STATUS}:
        raise BadInput(f"{out}: holds files of something else; name a new or an empty folder")
    else:
        _claim(out, wanted)
    if (out / MANIFEST).exists():
        # Killed between the manifest and the status: what is finished says so.
        if status_of(out) != "done":
            write_status(out, "done")
        return True
    write_status(out, "running")
    return False


def _made(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if not is_temporary(path)}


def _came_to_nothing(out: Path) -> bool:
    """A stage that failed before it made anything (a mistyped option): the folder is free again."""
    if not (out / STATUS).exists():
        return _made(out) == {STAGE}
    failed = status_of(out) == "failed"
    return failed and _made(out) == {STAGE, STATUS}


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    stamp = {"format": FORMAT, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / STAGE, stamp | wanted)
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror})") from None


def write_status(out: Path, state: str, reason: str = "", by: dict[str, Any] | None = None) -> None:
    """Record running, preempted, done or failed, with the reason, the host and `by` whom."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    value = {"status": state, "reason": reason, "time": now, "host": socket.gethostname()}
    write_json(out / STATUS, value | (by or {}))


def status_of(out: Path) -> str:
    """running, preempted, done or failed, as recorded; empty when nothing is."""
    return _read_ours(out / STATUS)["status"] if (out / STATUS).exists() else ""


def finish(
    out: Path, counts: dict[str, Any], files: list[Path], written: Mapping[Path, str] | None = None
) -> str:
    """Write the manifest over `files` (inside `out`) and mark the stage done; the fingerprint.

    `written` holds the sha256 of files as they were written; raises Corrupt naming one that has
    changed since: what the manifest says counts as the truth from then on.
    """
    for file in files:
        sync(file)  # also what grew line by line, or others wrote: from now on it is vouched for
    listed = {
        str(file.relative_to(out)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(files)
    }
    for file, sha256 in (written or {}).items():
        if listed[str(file.relative_to(out))]["sha256"] != sha256:
            raise Corrupt(f"{file}: has changed since it was written; remove it and its .idx, "
                          "and run the same command again")  # fmt: skip
    stage = read_json(out / STAGE)
    fingerprint = fingerprint_of(stage, listed)
    manifest = {"format": FORMAT, "kind": stage["kind"], "fingerprint": fingerprint}
    manifest |= {"counts": counts, "files": listed, "stage_sha256": sha256_file(out / STAGE)}
    write_json(out / MANIFEST, manifest | {"sha256": sha256_json(manifest)})
    write_status(out, "done")
    return fingerprint


def open_finished(path: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished stage directory of `kind`; refuses any other, by name."""

    def read(name: str) -> dict[str, Any] | None:
        return _read_ours(path / name) if (path / name).exists() else None

    return read_finished(str(path), kind, read)[1]


def read_finished(
    where: str, kind: str, read: Callable[[str], dict[str, Any] | None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(stage, manifest) of the directory called `where`; `read` gives a file, None if absent."""
    stage = read(STAGE)
    if stage is None:
        raise BadInput(f"{where}: not a {kind} directory (no {STAGE})")
    if stage.get("format") != FORMAT:
        raise BadInput(f"{where}: format {stage.get('format')}, this version reads {FORMAT}")
    if stage["kind"] != kind:
        raise BadInput(f"{where}: holds {stage['kind']}, wanted {kind}")
    manifest = read(MANIFEST)
    if manifest is None:
        raise Unfinished(f"{where}: unfinished (no {MANIFEST}); run the same command again")
    return stage, manifest


def check_manifest(manifest: dict[str, Any], where: str) -> None:
    """Raise Corrupt when a manifest differs from its own sha256: nothing it lists counts then."""
    told = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != sha256_json(told):
        raise Corrupt(f"{where}: differs from its own sha256; restore it")


def faults_of(out: Path) -> list[str]:
    """What of stage.json and status.json is not as `finish` wrote it.

    Raises Corrupt when the manifest itself is not, since then nothing it lists counts.
    """
    manifest = _read_ours(out / MANIFEST)
    check_manifest(manifest, str(out / MANIFEST))
    if not is_json_of(out / MANIFEST, manifest):
        raise Corrupt(f"{out / MANIFEST}: differs from its own sha256; restore it")
    faults = []
    if manifest["stage_sha256"] != sha256_file(out / STAGE):
        faults.append(f"{out / STAGE}: content differs from what was written; restore it")
    elif manifest["fingerprint"] != fingerprint_of(_read_ours(out / STAGE), manifest["files"]):
        raise Corrupt(f"{out / MANIFEST}: does not fit its fingerprint; restore it")
    if status_of(out) != "done":
        faults.append(f"{out / STATUS}: says {status_of(out)!r} of what is finished")
    return faults


def fingerprint_of(stage: dict[str, Any], files: dict[str, Any]) -> str:
    """The identity of a finished stage: its kind, its config and its files."""
    return sha256_json({"kind": stage["kind"], "config": stage["config"], "files": files})


def check_ours(value: Any, name: str, where: str) -> dict[str, Any]:
    """The JSON `value` as the stage file `name`; raises Corrupt when it is none of ours."""
    if not isinstance(value, dict) or not KEYS[name] <= value.keys():
        raise Corrupt(f"{where}: not a {name} of dist_train; restore it or make it anew")
    return value


def _read_ours(path: Path) -> dict[str, Any]:
    return check_ours(read_json(path), path.name, str(path))


def _refuse_another(out: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    if found.get("format") != FORMAT:
        raise BadInput(f"{out}: format {found.get('format')}, this version writes {FORMAT}")
    if found["kind"] != wanted["kind"]:
        raise BadInput(f"{out}: already holds {found['kind']}; name another folder")
    for part, told in (("config", dict), ("parents", _identities)):
        old, new = told(found[part]), told(wanted[part])
        if old != new:
            keys = _differing(old, new)
            raise BadInput(
                f"{out}: already holds another run of {found['kind']} "
                f"({part} differs: {keys}); name another folder or remove this one"
            )


def _identities(parents: dict[str, Any]) -> dict[str, Any]:
    # The path is the identity only of what has no other, as a folder of photos.
    return {
        name: {key: value for key, value in facts.items() if key != "path"} or facts
        for name, facts in parents.items()
    }


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    rows = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += [_differing(a, b, f"{prefix}{key}.")] if a != b else []
        elif a != b:
            rows.append(f"{prefix}{key} {a!r} there, {b!r} asked")
    return "; ".join(rows)
