"""Plan, build, seal: from a catalogue and its photos to a shard set.

Every shard is built independently: tar and facts under temporary names, read back, renamed, the
index last as its mark. A pack started again after any kill skips the shards that are marked.
Any number of processes, on one machine or on several that share the folder, build one set.
"""

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

from tqdm import tqdm

from shards.catalogue.rows import Catalogue
from shards.pack.build import build_shard, is_built
from shards.pack.disk_space import check_survey, full_disk_fails, survey
from shards.pack.items import Counts
from shards.pack.plan import Plan, make_plan
from shards.pack.seal import seal
from shards.photos.options import PackOptions
from shards.storage import stage_files
from shards.storage.errors import BadInput, Stopped
from shards.storage.files import read_json, remove_abandoned, sha256_file, sha256_json, write_json
from shards.storage.lock import locked
from shards.storage.workers import each, stops_interrupt
from shards.tar.layout import KIND, WORK, plan_path

log = logging.getLogger("shards")


class Task(NamedTuple):
    """One of several packs that share the work: it builds the shards number, number + of, ..."""

    number: int
    of: int


ALL = Task(0, 1)


class Job(NamedTuple):
    """The input, folder and options of a pack.

    `begin` claims the folder and is True when the set is finished there; `stamp` is the identity of
    the pack, which its plan holds.
    """

    catalogue: Catalogue
    images: Path | None
    out: Path
    options: PackOptions
    begin: Callable[[], bool]
    stamp: str

    def check_images_given(self, has_names: bool) -> None:
        """Raise BadInput when the catalogue names photos but no folder of photos was given."""
        if has_names and self.images is None:
            raise BadInput(
                f"{self.catalogue.path}: names photos; name their folder with --images DIR"
            )


def pack(
    catalogue: Path,
    images: Path | None,
    out: Path,
    options: PackOptions,
    columns: dict[str, str] | None = None,
    task: Task = ALL,
) -> Counts | None:
    """Pack `catalogue` with the photos below `images` into the shard set `out`; its counts.

    As one `task` of several the result is None while shards of other tasks are missing: the task
    that finds all of them built finishes the set. Memory does not grow with the catalogue.
    Raises BadInput for a catalogue that cannot be read or an `out` that holds something else,
    Failed when the disk has too little space, Stopped on SIGTERM and Ctrl-C; what is packed by
    then is kept. A photo that cannot be used never stops the pack: its posting keeps the title
    and the reason.
    """
    if not 0 <= task.number < task.of:
        raise BadInput(f"--task {task.number} --of {task.of}: the task must be 0 to {task.of - 1}")
    job = _job(catalogue, images, out, options, columns or {})
    if job.begin():
        return _finished(out)
    try:
        with stops_interrupt(), full_disk_fails(out):
            return _build_and_seal(job, task) if _prepare(job) else _finished(out)
    except KeyboardInterrupt:
        remove_abandoned(out)
        stage_files.write_status(out, "preempted", "stopped by a signal")
        raise Stopped(f"{out}: stopped by a signal; the same command goes on") from None
    except BaseException as error:
        with suppress(OSError):  # a full disk may have no space for this either
            remove_abandoned(out)  # what the workers had begun
            stage_files.write_status(out, "failed", f"{type(error).__name__}: {error}")
        raise


def _job(
    catalogue: Path, images: Path | None, out: Path, options: PackOptions, columns: dict[str, str]
) -> Job:
    """Check what can be checked before anything is written; raises BadInput."""

    def beside(path: Path) -> str:
        return os.path.relpath(path.resolve(), out.resolve())

    source = Catalogue(catalogue, columns)
    no_effect = {field.name for field in fields(options) if field.metadata.get("how")}
    config = {name: value for name, value in asdict(options).items() if name not in no_effect}
    config["columns"] = columns
    parents = {"catalogue": {"path": beside(catalogue), "sha256": sha256_file(catalogue)}}
    if images is not None:
        if not images.is_dir():
            raise BadInput(f"{images}: no such folder of photos on {os.uname().nodename}")
        parents["images"] = {"path": beside(images)}
    known = {name: facts.get("sha256", facts["path"]) for name, facts in parents.items()}
    stamp = sha256_json({"config": config, "parents": known})
    begin = partial(stage_files.begin, out, KIND, config, parents)
    job = Job(source, images, out, options, begin, stamp)
    job.check_images_given(source.head().image.ne("").any())
    return job


def _prepare(job: Job) -> bool:
    """Wait for the plan, which the first task makes for all, and check photos and disk space.

    False when another task has sealed the set meanwhile.
    """
    path, survey_path = plan_path(job.out), job.out / WORK / "survey.json"
    with locked(job.out / WORK / "lock"):
        if not path.exists() and job.begin():
            return False
        try:
            if not path.exists():
                remove_abandoned(job.out / WORK)
                make_plan(path, job.catalogue, job.options, job.stamp)
            if not survey_path.exists():
                with closing(Plan(path, job.stamp)) as plan:
                    job.check_images_given(plan.has_photos())
                    found = survey(plan, job.catalogue.path, job.images, job.options)
                    write_json(survey_path, found)
        except BadInput:
            shutil.rmtree(job.out / WORK)  # leaves the folder free: no shard was begun
            raise
        found = read_json(survey_path)
    check_survey(found, job.images, job.out)
    return True


def _build_and_seal(job: Job, task: Task) -> Counts | None:
    """Build the shards of `task`; then finish the set if no other task has shards to build."""
    out = job.out
    with closing(Plan(plan_path(out), job.stamp)) as plan:
        shards = plan.shards()[task.number :: task.of]
        jobs = ((s, plan.path, job.stamp, job.images, out, job.options) for s in shards)
        postings = sum(shard.items for shard in shards)
        bar = tqdm(total=postings, desc="pack", unit="posting", disable=None)
        try:
            with bar, closing(each(build_shard, jobs, job.options.workers, "packing")) as built:
                for done in built:
                    bar.update(done)
        except (OSError, sqlite3.Error):
            # Another task found all built and has sealed the set, which removed the plan.
            if not (out / stage_files.MANIFEST).exists():
                raise
        with locked(out / WORK / "lock"):
            if job.begin():  # another task was faster
                return _finished(out)
            missing = sum(not is_built(shard, out) for shard in plan.shards())
            if missing:
                reason = (
                    f"task {task.number} of {task.of}: {len(shards)} shards built; "
                    f"waits for the others, which have {missing} to build"
                )
                stage_files.write_status(out, "running", reason)
                log.info("%s: %s", out, reason)
                return None
            counts = seal(plan, job.catalogue, out, job.options.max_title)
            _clean_up(out)
            return counts


def _finished(out: Path) -> Counts:
    log.info("%s: already packed", out)
    _clean_up(out)
    return cast(Counts, stage_files.open_finished(out, KIND)["counts"])


def _clean_up(out: Path) -> None:
    remove_abandoned(out)
    shutil.rmtree(out / WORK, ignore_errors=True)
