"""Space on the disk: how much a pack will need, and a clear error when there is too little."""

import errno
import os
import shutil
import sqlite3
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.pack.build import samples
from shards.pack.plan import Plan
from shards.photos.decode import PhotoRefused
from shards.photos.options import PackOptions
from shards.photos.photo import NOT_FOUND, find_photo
from shards.storage.errors import BadInput, Failed
from shards.storage.files import format_bytes

SAMPLE = 64
"""Postings that are prepared to estimate the size of all."""
BLOCK = 512
INDEX_AND_TABLE = 300
"""Bytes of an item in its .idx, in .pack and in items.parquet beside the catalogue's own."""
HANDFUL = 5
"""Up to so many photos may all be missing by chance."""
LOOKED_FOR = 1_000
"""Postings whose photos are looked for when all photos of the sample are missing."""
PHOTOS_REMEDY = (
    "is --images the folder that the column image starts from, and is it mounted? If there are no "
    "photos, empty that column"
)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# SQLite reports a full disk, but a quota or limit only as a write that failed.
SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}


def survey(
    plan: Plan, catalogue: Path, images: Path | None, options: PackOptions
) -> dict[str, Any]:
    """Prepare a sample of postings: the `bytes` of the complete set, the `photos` that were found.

    The bytes are the mean times the number of postings; two standard errors are added, so that 39
    estimates of 40 are not too small. Raises BadInput when not one of many photos exists.
    """
    # At most a twentieth of a small catalogue, whose sample is read a second time by the pack.
    rows = plan.sample(max(1, min(SAMPLE, len(plan) // 20)))
    facts: list[dict[str, Any]] = []
    sizes = [
        sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        for _, _, members in samples(rows, images, options, facts)
    ]
    sizes += [0] * (len(rows) - len(sizes))  # the rejected ones
    named = [row.image for row in rows if row.image]
    missing = sum(f": {NOT_FOUND}" in fact["reason"] for fact in facts)
    # With the wrong folder every photo would be missing from the set without any error.
    if images is not None and len(named) > HANDFUL and missing >= len(named):
        more = [row.image for row in plan.sample(min(LOOKED_FOR, len(plan))) if row.image]
        if not _any_found(images, more):
            raise BadInput(
                f"{images}: has none of the {len(more)} photos that were looked for, for example "
                f"{named[0]}; {PHOTOS_REMEDY}"
            )
    spread = statistics.stdev(sizes) / len(sizes) ** 0.5 if len(sizes) > 1 else 0.0
    item = statistics.fmean(sizes) + 2 * spread + INDEX_AND_TABLE
    photos = [row.image for row, fact in zip(rows, facts, strict=True) if fact["has_image"]]
    return {"bytes": int(item * len(plan)) + 2 * catalogue.stat().st_size, "photos": photos}


def check_survey(found: dict[str, Any], images: Path | None, out: Path) -> None:
    """Raise BadInput when `images` lacks all photos of a survey, Failed when `out` lacks space."""
    # A folder that is not mounted on one node would cost all the photos of its shards.
    if images is not None and found["photos"] and not _any_found(images, found["photos"]):
        raise BadInput(
            f"{images}: on {os.uname().nodename} it lacks {found['photos'][0]} and every other "
            "photo that was there for the plan; is the right folder mounted?"
        )
    missing, free = found["bytes"] - written(out), shutil.disk_usage(out).free
    if missing > free:
        raise Failed(
            f"{out}: no room: about {format_bytes(missing)} needed, {format_bytes(free)} free on "
            "its file system; make room, or pack smaller photos with --size"
        )


def _any_found(images: Path, names: list[str]) -> bool:
    for name in names:
        with suppress(PhotoRefused):
            find_photo(images, name)
            return True
    return False


def written(out: Path) -> int:
    """Bytes of the shards that are complete."""
    return sum(path.stat().st_size for path in out.glob("*/[0-9]*.*"))


@contextmanager
def full_disk_fails(out: Path) -> Iterator[None]:
    """Inside the block a disk or quota that fills up raises Failed with what is free and done."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        code = error.errno if isinstance(error, OSError) else error.sqlite_errorcode
        if code not in (FULL if isinstance(error, OSError) else SQLITE_FULL):
            raise
        free, done = format_bytes(shutil.disk_usage(out).free), format_bytes(written(out))
        raise Failed(
            f"{out}: no room left ({error}); {free} free on its file system, {done} of shards are "
            "complete; make room or raise the quota, and the same command goes on"
        ) from None
