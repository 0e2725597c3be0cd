"""The chain of stage directories: the parents of each, by relative path and fingerprint.

Also the attempts of a stage: starts of the same command, of which only the newest may write.
"""

import os
import uuid
from pathlib import Path
from typing import TypedDict

from shards.pack.pack import KIND as SHARDS
from shards.read.location import Location, Mirror, open_files
from shards.read.remote import is_url
from shards.storage import stage_files
from shards.storage.errors import BadInput

RUN, EMBEDDING, INDEX, PAIRS, MATCHES = "run", "embedding set", "index", "pairs", "matches"
KINDS = {
    "shards": SHARDS,
    "image": RUN,
    "text": RUN,
    "embedding": EMBEDDING,
    "index": INDEX,
    "pairs": PAIRS,
}
"""Name of a parent in stage.json to the kind of directory that it must be."""


class Parent(TypedDict):
    """A parent in stage.json: its path relative to the stage (or a URL), and its fingerprint."""

    path: str
    fingerprint: str


Parents = dict[str, Parent]


class Attempt(TypedDict, total=False):
    """One start of a stage, as status.json names it; job and restart only under Slurm."""

    attempt: str
    job: str
    restart: int


def parents_for(out: Path, **locations: Location | None) -> Parents:
    """The `parents` of a stage to be written at `out`; BadInput unless finished and of its kind.

    A URL is recorded without user and query, which may be secrets.
    """
    parents: Parents = {}
    for name, location in locations.items():
        if location is None:
            continue
        files = open_files(location, KINDS[name])
        url = isinstance(files, Mirror)
        path = files.where() if url else os.path.relpath(files.path.resolve(), out.resolve())
        parents[name] = {"path": path, "fingerprint": files.manifest["fingerprint"]}
    return parents


def parent(path: Path, name: str) -> Path:
    """The local directory that `path` was made from; BadInput if it has changed since."""
    return Path(parent_location(path, name))


def parent_location(path: Path, name: str, given: Location | None = None) -> Location:
    """The directory that `path` was made from, by its relative path, or where the user `given` it.

    BadInput if it has changed since. A directory may come from anyone: the URL or absolute path
    that it records is not opened unless the user gave it.
    """
    parents = stage_files.open_stage(path)["parents"]
    if name not in parents:
        raise BadInput(f"{path}: was not made from any {name}")
    recorded: str = parents[name]["path"]
    if given is None and (is_url(recorded) or os.path.isabs(recorded)):
        raise BadInput(
            f"{path}: was made from the {name} at {recorded}, which is opened only if you name it"
            + (f": --{name} {recorded}" if name == "shards" else "; keep both in one folder")
        )
    location = Path(os.path.normpath(path.resolve() / recorded)) if given is None else given
    if open_files(location, KINDS[name]).manifest["fingerprint"] != parents[name]["fingerprint"]:
        raise BadInput(f"{path}: was made from another {name} than now lies at {location}")
    return location


def new_attempt() -> Attempt:
    """Identify this start of a stage; launch/slurm/stage.sh adds the job and its restart."""
    attempt: Attempt = {"attempt": uuid.uuid4().hex}
    if job := os.environ.get("DIST_TRAIN_JOB", ""):
        attempt["job"] = job
        attempt["restart"] = int(os.environ.get("DIST_TRAIN_RESTART", "0"))
    return attempt


def newer_attempt(out: Path, mine: Attempt, begun: bool = True) -> str:
    """Describe the attempt of the stage `out` that is newer than `mine`; empty if none is.

    If `mine` has begun, any other attempt is newer; else only a later restart of its Slurm job.
    """
    known = stage_files.read_status(out)
    if begun:
        newer = bool(mine) and known.get("attempt") != mine.get("attempt")
    else:
        newer = "job" in mine and known.get("job") == mine["job"]
        newer = newer and known.get("restart", 0) > mine.get("restart", 0)
    if not newer:
        return ""
    job = f", Slurm job {known['job']} restart {known['restart']}" if "job" in known else ""
    return (
        f"{out}: begun again elsewhere ({known.get('host', 'by a job that starts now')}"
        f"{job}); this older start stops and writes nothing more"
    )
