"""Plan, pack, seal: from a catalogue and its photos to a shard set.

Every shard is built by itself: tar and facts under temporary names, read back, renamed, the
index last as its mark. A pack started again after any kill skips the shards that are marked.
Any number of processes, on one machine or on several that share the folder, build one set.
"""

import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from shards import stage_files
from shards.build import build_shard, is_built
from shards.catalogue import Catalogue
from shards.errors import BadInput, Stopped
from shards.files import read_json, remove_abandoned, sha256_file, sha256_json, write_json
from shards.layout import KIND, WORK, plan_path, shard_path
from shards.lock import locked
from shards.options import PackOptions
from shards.plan import Plan, make_plan
from shards.room import check_photos, check_room, full_disk_told, survey
from shards.seal import seal
from shards.workers import each, stops_interrupt

__all__ = ["ALL", "KIND", "Task", "pack", "shard_path"]
log = logging.getLogger("shards")


class Task(NamedTuple):
    """One of several packs that share the work: this one builds the shards number mod of."""

    number: int
    of: int


ALL = Task(0, 1)


class Job(NamedTuple):
    """What a pack is from and for; the plan belongs to one stamp."""

    catalogue: Catalogue
    images: Path | None
    out: Path
    options: PackOptions
    config: dict[str, Any]
    parents: dict[str, Any]

    @property
    def stamp(self) -> str:
        parents = {k: v.get("sha256", v["path"]) for k, v in self.parents.items()}
        return sha256_json({"config": self.config, "parents": parents})

    def begin(self) -> bool:
        """Claim the folder; True when the set is finished there."""
        return stage_files.begin(self.out, KIND, self.config, self.parents)


def pack(
    catalogue: Path,
    images: Path | None,
    out: Path,
    options: PackOptions,
    columns: dict[str, str] | None = None,
    task: Task = ALL,
) -> dict[str, Any] | None:
    """Pack `catalogue` with the photos below `images` into the shard set `out`; its counts.

    As one `task` of several the counts are None while shards of others are missing: the task
    that finds them all built finishes the set. Memory does not grow with the catalogue.
    Raises BadInput for a catalogue that cannot be read or an `out` that holds something else,
    Failed when the disk has too little room, Stopped on SIGTERM and Ctrl-C: what is packed by
    then is kept. A photo that cannot be used never stops the pack: its posting keeps the title
    and the reason.
    """
    if not 0 <= task.number < task.of:
        raise BadInput(f"--task {task.number} --of {task.of}: the task must be 0 to {task.of - 1}")
    job = _job(catalogue, images, out, options, columns)
    if job.begin():
        return _finished(job)
    try:
        with stops_interrupt(), full_disk_told(out):
            if not _make_ready(job):
                return _finished(job)
            with closing(Plan(plan_path(out), job.stamp)) as plan:
                built = _build_shards(plan, job, task)
                return _seal(plan, job, task, built)
    except KeyboardInterrupt:
        remove_abandoned(out)
        stage_files.write_status(out, "preempted", "stopped by a signal")
        raise Stopped(f"{out}: stopped by a signal; the same command goes on") from None
    except BaseException as error:
        with suppress(OSError):  # a full disk may have no room for this either
            remove_abandoned(out)  # what the workers had begun
            stage_files.write_status(out, "failed", f"{type(error).__name__}: {error}")
        raise


def _job(
    catalogue: Path, images: Path | None, out: Path, options: PackOptions,
    columns: dict[str, str] | None,
) -> Job:  # fmt: skip
    source = Catalogue(catalogue, columns)
    # What the first rows can tell is said before anything is made.
    _ask_for_photos(source, source.head().image.ne("").any(), images)
    if images is not None and not images.is_dir():
        raise BadInput(f"{images}: no such folder of photos on {os.uname().nodename}")
    config = _result_options(options) | {"columns": columns or {}}
    return Job(source, images, out, options, config, _parents(catalogue, images, out))


def _ask_for_photos(catalogue: Catalogue, named: bool, images: Path | None) -> None:
    if named and images is None:
        raise BadInput(f"{catalogue.path}: names photos; say where they lie with --images DIR")


def _result_options(options: PackOptions) -> dict[str, Any]:
    how = {f.name for f in fields(options) if f.metadata.get("how")}
    return {name: value for name, value in asdict(options).items() if name not in how}


def _parents(catalogue: Path, images: Path | None, out: Path) -> dict[str, Any]:
    def beside(path: Path) -> str:
        return os.path.relpath(path.resolve(), out.resolve())

    parents = {"catalogue": {"path": beside(catalogue), "sha256": sha256_file(catalogue)}}
    return parents if images is None else parents | {"images": {"path": beside(images)}}


def _make_ready(job: Job) -> bool:
    """Have the plan, which the first that comes makes for all, and room; False after the seal."""
    path, surveyed = plan_path(job.out), job.out / WORK / "survey.json"
    with _lock(job.out):
        if not path.exists():
            if job.begin():
                return False
            remove_abandoned(job.out / WORK)
            with _nothing_made(job):
                make_plan(path, job.catalogue, job.options, job.stamp)
                with closing(Plan(path, job.stamp)) as plan:
                    _ask_for_photos(job.catalogue, plan.has_photos(), job.images)
        if not surveyed.exists():
            with _nothing_made(job), closing(Plan(path, job.stamp)) as plan:
                found = survey(plan, job.catalogue.path, job.images, job.options)
            write_json(surveyed, found)
        expected = read_json(surveyed)
    check_photos(job.images, expected["photos"])
    check_room(job.out, expected["bytes"])
    return True


@contextmanager
def _nothing_made(job: Job) -> Iterator[None]:
    """Bad input within it leaves the folder free: no shard was begun."""
    try:
        yield
    except BadInput:
        shutil.rmtree(job.out / WORK)
        raise


def _build_shards(plan: Plan, job: Job, task: Task) -> int:
    shards = plan.shards()[task.number :: task.of]
    jobs = ((s, plan.path, job.stamp, job.images, job.out, job.options) for s in shards)
    postings = sum(shard.items for shard in shards)
    bar = tqdm(total=postings, desc="pack", unit="posting", disable=None)
    try:
        with bar, closing(each(build_shard, jobs, job.options.workers, "packing")) as built:
            for done in built:
                bar.update(done)
    except (OSError, sqlite3.Error):
        # Another task found all built and has sealed the set, so that the plan is gone.
        if not (job.out / stage_files.MANIFEST).exists():
            raise
    return len(shards)


def _seal(plan: Plan, job: Job, task: Task, built: int) -> dict[str, Any] | None:
    with _lock(job.out):
        if job.begin():  # another task was faster
            return _finished(job)
        missing = sum(not is_built(shard, job.out) for shard in plan.shards())
        if missing:
            reason = (
                f"task {task.number} of {task.of}: {built} shards built; "
                f"waits for the others, which have {missing} to build"
            )
            stage_files.write_status(job.out, "running", reason)
            log.info("%s: %s", job.out, reason)
            return None
        counts = seal(plan, job.catalogue, job.out, job.options.max_title)
        _clean_up(job.out)
        return counts


def _finished(job: Job) -> dict[str, Any]:
    log.info("%s: already packed", job.out)
    _clean_up(job.out)
    return stage_files.open_finished(job.out, KIND)["counts"]


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    with locked(out / WORK / "lock"):
        yield


def _clean_up(out: Path) -> None:
    remove_abandoned(out)
    shutil.rmtree(out / WORK, ignore_errors=True)
