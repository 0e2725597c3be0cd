"""Room on the disk: how much a pack will need, and a clear word when there is too little."""

import errno
import os
import shutil
import sqlite3
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.build import samples
from shards.errors import BadInput, Failed
from shards.files import format_bytes
from shards.options import PackOptions
from shards.photo import NOT_FOUND, is_there
from shards.plan import Plan

SAMPLE = 64
"""Postings that are made ready to tell how large all will be."""
BLOCK = 512
INDEX_AND_TABLE = 300
"""Bytes an item takes in its .idx, in .pack and in items.parquet beside the catalogue's own."""
HANDFUL = 5
"""So many photos may all be missing by chance."""
LOOKED_FOR = 1_000
"""Postings whose photos are looked for when those of the sample are missing, one and all."""
PHOTOS_REMEDY = (
    "is --images the folder that the column image starts from, and is it mounted? If there are no "
    "photos, empty that column"
)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def survey(plan: Plan, catalogue: Path, images: Path | None, options: PackOptions) -> dict:
    """`bytes` that the whole set will take, and `photos` that were there for the sample.

    The bytes are those of a sample of real postings times their number; two standard errors are
    added, so that 39 estimates of 40 are not too small. Raises BadInput when no photo is there.
    """
    # A small catalogue is not read twice over for this.
    rows = plan.sample(max(1, min(SAMPLE, len(plan) // 20)))
    facts: list[dict[str, Any]] = []
    made = samples([row._replace(slot=n) for n, row in enumerate(rows)], images, options, facts)
    by_slot = {slot: members for slot, _, members in made}
    _check_folder(plan, images, [row.image for row in rows if row.image], facts)
    sizes = [sum(map(_in_tar, by_slot.get(n, {}).values())) for n in range(len(rows))]
    spread = statistics.stdev(sizes) / len(sizes) ** 0.5 if len(sizes) > 1 else 0.0
    item = statistics.fmean(sizes) + 2 * spread + INDEX_AND_TABLE
    photos = [row.image for row, fact in zip(rows, facts, strict=True) if fact["has_image"]]
    return {"bytes": int(item * len(plan)) + 2 * catalogue.stat().st_size, "photos": photos}


def _check_folder(
    plan: Plan, images: Path | None, named: list[str], facts: list[dict[str, Any]]
) -> None:
    # The wrong folder would cost every photo, and all of it would be sealed without a word.
    missing = sum(f": {NOT_FOUND}" in fact["reason"] for fact in facts)
    if images is None or len(named) <= HANDFUL or missing < len(named):
        return
    more = [row.image for row in plan.sample(min(LOOKED_FOR, len(plan))) if row.image]
    if not any(is_there(images, name) for name in more):
        raise BadInput(
            f"{images}: has none of the {len(more)} photos that were looked for, {named[0]} among "
            f"them; {PHOTOS_REMEDY}"
        )


def check_photos(images: Path | None, names: list[str]) -> None:
    """Raise BadInput when none of the photos that were there for the plan is there here."""
    # Else a folder that is not mounted on one node costs all the photos of its shards.
    if images is not None and names and not any((images / name).is_file() for name in names):
        raise BadInput(
            f"{images}: on {os.uname().nodename} it lacks {names[0]} and every other photo that "
            "was there for the plan; is the right folder mounted?"
        )


def _in_tar(data: bytes) -> int:
    return BLOCK + -(-len(data) // BLOCK) * BLOCK


def check_room(out: Path, needed: int) -> None:
    """Raise Failed when `out` lacks room for what is not yet written of `needed` bytes."""
    missing = needed - written(out)
    free = shutil.disk_usage(out).free
    if missing > free:
        raise Failed(
            f"{out}: no room: about {format_bytes(missing)} needed, {format_bytes(free)} free on "
            "its file system; make room, or pack smaller photos with --size"
        )


def written(out: Path) -> int:
    """Bytes of the shards that stand already."""
    return sum(path.stat().st_size for path in out.glob("*/[0-9]*.*"))


@contextmanager
def full_disk_told(out: Path) -> Iterator[None]:
    """Within it a disk or quota that fills up raises Failed; what stands whole is kept."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not _is_full(error):
            raise
        free, whole = shutil.disk_usage(out).free, written(out)
        raise Failed(
            f"{out}: no room left ({error}); {format_bytes(free)} free on its file system, "
            f"{format_bytes(whole)} of shards stand whole; make room or raise the quota, "
            "and the same command goes on"
        ) from None


def _is_full(error: OSError | sqlite3.Error) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    # SQLite tells of a full disk, but of a quota or a limit only as of a write that failed.
    codes = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
    return error.sqlite_errorcode in codes
