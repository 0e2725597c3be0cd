"""The chain of stage directories: what each was made from, by relative path and fingerprint.

And the attempts of a stage: starts of the same command, of which only the newest may write.
"""

import os
import uuid
from pathlib import Path
from typing import Any

from shards.pack.pack import KIND as SHARDS
from shards.read.location import Folder, Location, Mirror, open_files
from shards.read.remote import is_url
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import read_json

RUN, EMBEDDING, INDEX, PAIRS, MATCHES = "run", "embedding set", "index", "pairs", "matches"
KINDS = {
    "shards": SHARDS,
    "image": RUN,
    "text": RUN,
    "embedding": EMBEDDING,
    "index": INDEX,
    "pairs": PAIRS,
}
"""Name of a parent in stage.json to the kind of directory it must be."""


def parents_for(out: Path, **locations: Location | None) -> dict[str, Any]:
    """The `parents` of a stage to be written at `out`; each must be finished and of its kind.

    A URL is recorded as it is, without user and query: they may be secrets.
    """
    found = {
        name: open_files(location, KINDS[name])
        for name, location in locations.items()
        if location is not None
    }
    return {
        name: {"path": _told(files, out), "fingerprint": files.manifest["fingerprint"]}
        for name, files in found.items()
    }


def _told(files: Folder | Mirror, out: Path) -> str:
    if isinstance(files, Mirror):
        return str(files)
    return os.path.relpath(files.path.resolve(), out.resolve())


def parent(path: Path, name: str) -> Path:
    """The directory that `path` was made from; refused when it has changed since."""
    return Path(_parent(path, name))


def parent_shards(path: Path) -> Location:
    """The shard set that `path` was made from, a folder or a URL; refused as by `parent`."""
    return _parent(path, "shards")


def _parent(path: Path, name: str) -> Location:
    known = read_json(path / stage_files.STAGE)["parents"]
    if name not in known:
        raise BadInput(f"{path}: was not made from any {name}")
    told: str = known[name]["path"]
    found = told if is_url(told) else Path(os.path.normpath(path.resolve() / told))
    if open_files(found, KINDS[name]).manifest["fingerprint"] != known[name]["fingerprint"]:
        raise BadInput(f"{path}: was made from another {name} than now lies at {found}")
    return found


def new_attempt() -> dict[str, Any]:
    """What this start of a stage is known by; under launch/slurm/stage.sh with job and restart."""
    attempt: dict[str, Any] = {"attempt": uuid.uuid4().hex}
    if job := os.environ.get("DIST_TRAIN_JOB", ""):
        attempt |= {"job": job, "restart": int(os.environ.get("DIST_TRAIN_ATTEMPT", "0"))}
    return attempt


def newer_attempt(out: Path, mine: dict[str, Any], begun: bool = True) -> str:
    """What is to be said when a newer attempt than `mine` has begun the stage `out`; else empty.

    Once begun, any other is newer; before, only a later restart of the same Slurm job.
    """
    path = out / stage_files.STATUS
    known = read_json(path) if path.exists() else {}
    if begun:
        newer = bool(mine) and known.get("attempt") != mine["attempt"]
    else:
        newer = "job" in mine and known.get("job") == mine["job"]
        newer = newer and known.get("restart", 0) > mine["restart"]
    if not newer:
        return ""
    job = f", Slurm job {known['job']} restart {known['restart']}" if "job" in known else ""
    return (
        f"{out}: begun again elsewhere ({known.get('host', 'by a job that starts now')}"
        f"{job}); this older start stops and writes nothing more"
    )
