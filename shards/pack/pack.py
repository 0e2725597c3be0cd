"""Plan, build, seal: from a catalogue and its photos to a shard set.

Every shard is built independently: tar and facts under temporary names, read back, renamed, the
index last as its mark. A pack started again after any kill skips the shards that are marked.
Any number of processes, on one machine or on several that share the folder, build one set.
"""

import logging
import os
import shutil
import sqlite3
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, cast

from tqdm import tqdm

from shards.catalogue.rows import Carried, Catalogue
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
from shards.storage.stops import stops_interrupt
from shards.storage.workers import each
from shards.tar.layout import KIND, WORK, plan_path

log = logging.getLogger("shards")


class Task(NamedTuple):
    """One of several packs that share the work: it builds the shards number, number + of, ..."""

    number: int
    of: int


ALL = Task(0, 1)


class Job:
    """The input, folder and options of a pack; `stamp` is its identity, which its plan holds."""

    def __init__(
        self, catalogue: Catalogue, images: Path | None, out: Path, options: PackOptions
    ) -> None:
        """Check what can be checked before anything is written; raises BadInput."""

        def beside(path: Path) -> str:
            return os.path.relpath(path.resolve(), out.resolve())

        if images is not None and not options.photos:
            raise BadInput(f"--no-photos and --images {images}: leave one of them away")
        self.catalogue, self.images, self.out, self.options = catalogue, images, out, options
        kept = [field.name for field in fields(options) if not field.metadata.get("how")]
        self.config = {name: getattr(options, name) for name in kept}
        self.config["columns"] = catalogue.columns
        facts = {"path": beside(catalogue.path), "sha256": sha256_file(catalogue.path)}
        self.parents = {"catalogue": facts}
        if images is not None:
            if not images.is_dir():
                raise BadInput(f"{images}: no such folder of photos on {os.uname().nodename}")
            self.parents["images"] = {"path": beside(images)}
        known = {name: facts.get("sha256", facts["path"]) for name, facts in self.parents.items()}
        self.stamp = sha256_json({"config": self.config, "parents": known})
        carried = Carried()
        self.check_images_given(next(catalogue.postings(carried)).image.ne("").any())
        if catalogue.kind != ".jsonl":  # of which any line may be the first to name a column
            catalogue.check_image_column(list(carried.types), images)

    def check_images_given(self, has_names: bool) -> None:
        """Raise BadInput when the catalogue names photos but no folder of photos was given."""
        if has_names and self.images is None and self.options.photos:
            raise BadInput(
                f"{self.catalogue.path}: names photos; name their folder with --images DIR, or "
                "pack its titles alone with --no-photos"
            )

    def begin(self) -> Counts | None:
        """Claim the folder; the counts of the set when it is finished there."""
        if not stage_files.begin(self.out, KIND, self.config, self.parents):
            return None
        log.info("%s: already packed", self.out)
        _clean_up(self.out)
        return cast(Counts, stage_files.open_finished(self.out, KIND)["counts"])


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
    job = Job(Catalogue(catalogue, columns), images, out, options)
    if counts := job.begin():
        return counts
    try:
        with stops_interrupt(), full_disk_fails(out):
            return _prepare(job) or _build_and_seal(job, task)
    except KeyboardInterrupt:
        remove_abandoned(out)
        stage_files.write_status(out, "preempted", "stopped by a signal")
        raise Stopped(f"{out}: stopped by a signal; the same command goes on") from None
    except BaseException as error:
        with suppress(OSError):  # a full disk may have no space for this either
            remove_abandoned(out)  # what the workers had begun
            stage_files.write_status(out, "failed", f"{type(error).__name__}: {error}")
        raise


def _prepare(job: Job) -> Counts | None:
    """Wait for the plan, which the first task makes for all, and check photos and disk space.

    The counts of the set when another task has sealed it meanwhile.
    """
    path, survey_path = plan_path(job.out), job.out / WORK / "survey.json"
    with locked(job.out / WORK / "lock"):
        if not path.exists() and (counts := job.begin()):
            return counts
        try:
            if not path.exists():
                remove_abandoned(job.out / WORK)
                make_plan(path, job.catalogue, job.options, job.stamp)
            if not survey_path.exists():
                with closing(Plan(path, job.stamp)) as plan:
                    job.check_images_given(plan.has_photos())
                    job.catalogue.check_image_column(plan.carried.names, job.images)
                    if job.images is not None and not plan.has_photos():
                        log.warning(
                            "%s: names no photo at all, so only titles are packed and --images is "
                            "not used; is the column image the right one?",
                            job.catalogue.path,
                        )
                    found = survey(plan, job.catalogue.path, job.images, job.options)
                    write_json(survey_path, found)
        except BadInput:
            shutil.rmtree(job.out / WORK)  # leaves the folder free: no shard was begun
            raise
        found = read_json(survey_path)
    check_survey(found, job.images, job.out, job.options)
    return None


def _build_and_seal(job: Job, task: Task) -> Counts | None:
    """Build the shards of `task`; then finish the set if no other task has shards to build."""
    out = job.out
    with closing(Plan(plan_path(out), job.stamp)) as plan:
        shards = plan.shards()[task.number :: task.of]
        jobs = ((s, plan_path(out), job.stamp, job.images, out, job.options) for s in shards)
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
            if counts := job.begin():  # another task was faster
                return counts
            missing = sum(not is_built(shard, out) for shard in plan.shards())
            if missing:
                reason = (
                    f"task {task.number} of {task.of}: {len(shards)} shards built; "
                    f"waits for the others, which have {missing} to build"
                )
                stage_files.write_status(out, "running", reason)
                log.info("%s: %s", out, reason)
                return None
            counts = seal(plan, job.catalogue, out, job.options)
            _clean_up(out)
            return counts


def _clean_up(out: Path) -> None:
    remove_abandoned(out)
    shutil.rmtree(out / WORK, ignore_errors=True)
