"""What every stage directory holds: stage.json first, status.json, manifest.json last.

A shard set is a stage directory too and shards/ stands alone, so the three files live here;
dist_train/stage.py adds the chain of parents.
"""

import socket
import time
from pathlib import Path
from typing import Any

from shards.errors import BadInput, Corrupt, Unfinished
from shards.files import is_temporary, read_json, sha256_file, sha256_json, write_json

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
    if (out / STAGE).exists() and not _came_to_nothing(out):
        _refuse_another(out, wanted, _read_ours(out / STAGE))
    elif out.is_file() or (out.is_dir() and _made(out) - {STAGE, STATUS}):
        raise BadInput(f"{out}: holds files of something else; name a new or an empty folder")
    else:
        _claim(out, wanted)
    if (out / MANIFEST).exists():
        # Killed between the manifest and the status: what is finished says so.
        if not (out / STATUS).exists() or _read_ours(out / STATUS)["status"] != "done":
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
    failed = _read_ours(out / STATUS)["status"] == "failed"
    return failed and _made(out) == {STAGE, STATUS}


def _claim(out: Path, wanted: dict[str, Any]) -> None:
    stamp = {"format": FORMAT, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / STAGE, stamp | wanted)
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror})") from None


def write_status(out: Path, state: str, reason: str = "") -> None:
    """Record running, preempted, done or failed, with the reason and the host."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    value = {"status": state, "reason": reason, "time": now, "host": socket.gethostname()}
    write_json(out / STATUS, value)


def finish(out: Path, counts: dict[str, Any], files: list[Path]) -> str:
    """Write the manifest over `files` (inside `out`) and mark the stage done; the fingerprint."""
    listed = {
        str(file.relative_to(out)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(files)
    }
    stage = read_json(out / STAGE)
    identity = {"kind": stage["kind"], "config": stage["config"], "files": listed}
    fingerprint = sha256_json(identity)
    manifest = {"format": FORMAT, "kind": stage["kind"], "fingerprint": fingerprint}
    write_json(out / MANIFEST, manifest | {"counts": counts, "files": listed})
    write_status(out, "done")
    return fingerprint


def open_finished(path: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished stage directory of `kind`; refuses any other, by name."""
    if not (path / STAGE).exists():
        raise BadInput(f"{path}: not a {kind} directory (no {STAGE})")
    stage = _read_ours(path / STAGE)
    if stage.get("format") != FORMAT:
        raise BadInput(f"{path}: format {stage.get('format')}, this version reads {FORMAT}")
    if stage["kind"] != kind:
        raise BadInput(f"{path}: holds {stage['kind']}, wanted {kind}")
    if not (path / MANIFEST).exists():
        raise Unfinished(f"{path}: unfinished (no {MANIFEST}); run the same command again")
    return _read_ours(path / MANIFEST)


def _read_ours(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or not KEYS[path.name] <= value.keys():
        raise Corrupt(f"{path}: not a {path.name} of dist_train; restore it or make it anew")
    return value


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
