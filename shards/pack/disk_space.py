"""What a sample says before a pack: the space it will need, and why photos cannot be used."""

import errno
import json
import logging
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
from shards.photos.find import find_photo
from shards.photos.options import PackOptions
from shards.photos.photo import load_photo
from shards.photos.remarks import PhotoRefused, Remark, remark_of_photo, summary_of
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
"""Postings whose photos are looked for on the disk."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# SQLite reports a full disk, but a quota or limit only as a write that failed.
SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}

Fact = dict[str, Any]
log = logging.getLogger("shards")


def survey(
    plan: Plan, catalogue: Path, images: Path | None, options: PackOptions
) -> dict[str, Any]:
    """Prepare a sample of postings: the `bytes` of the complete set, the `photos` that were found.

    The bytes are the mean times the number of postings; two standard errors are added, so that 39
    estimates of 40 are not too small. Raises BadInput when not one of many photos can be used.
    """
    # At most a twentieth of a small catalogue, whose sample is read a second time by the pack.
    rows = plan.sample(max(1, min(SAMPLE, len(plan) // 20)))
    facts: list[Fact] = []
    sizes = [
        sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        for _, _, members in samples(rows, images, options, facts)
    ]
    sizes += [0] * (len(rows) - len(sizes))  # the rejected ones
    spread = statistics.stdev(sizes) / len(sizes) ** 0.5 if len(sizes) > 1 else 0.0
    item = statistics.fmean(sizes) + 2 * spread + INDEX_AND_TABLE
    photos = [row.image for row, fact in zip(rows, facts, strict=True) if fact["has_image"]]
    if images is not None:
        known = {row.row: fact for row, fact in zip(rows, facts, strict=True)}
        _look_for_photos(plan, catalogue, images, options, known)
    return {"bytes": int(item * len(plan)) + 2 * catalogue.stat().st_size, "photos": photos}


def _look_for_photos(
    plan: Plan, catalogue: Path, images: Path, options: PackOptions, known: dict[int, Fact]
) -> None:
    """Look for the photos of LOOKED_FOR postings, and warn with counts of the reasons why some
    cannot be used.

    known: the facts of the rows that were prepared. Where none of these has a photo, others are
    read too until one can be used. Raises BadInput when none can and there are more than a
    HANDFUL: with the wrong folder every photo would be missing from the set without any error.
    """
    is_any_usable = any(fact["has_image"] for fact in known.values())
    named = [row for row in plan.sample(min(LOOKED_FOR, len(plan))) if row.image]
    remarks: list[tuple[str, str]] = []
    for row in named:
        try:
            if row.row in known:
                noted = map(Remark._make, json.loads(known[row.row]["remarks"]))
                remarks += [(r.kind, f"row {row.row}: {r.text}") for r in noted if r.is_of_photo()]
                continue
            find_photo(images, row.image, options.follow_links)
            if not is_any_usable:
                load_photo(images, row.image, options)
                is_any_usable = True
        except PhotoRefused as refused:
            remark = remark_of_photo(row.image, refused)
            remarks.append((remark.kind, f"row {row.row}: {remark.text}"))
    if not remarks:
        return
    reasons = "; ".join(summary_of(remarks))
    if not is_any_usable and len(named) > HANDFUL:
        raise BadInput(
            f"{images}: not one of the photos that {catalogue} names can be used, of "
            f"{len(named)} looked for: {reasons}"
        )
    log.warning(
        "%s: %d of %d photos looked for cannot be used, their postings keep the title: %s",
        *(images, len(remarks), len(named), reasons),
    )


def check_survey(
    found: dict[str, Any], images: Path | None, out: Path, options: PackOptions
) -> None:
    """Raise BadInput when `images` lacks all photos of a survey, Failed when `out` lacks space."""
    # A folder that is not mounted on one node would cost all the photos of its shards.
    if images is not None and not _any_found(images, found["photos"], options):
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


def _any_found(images: Path, names: list[str], options: PackOptions) -> bool:
    """Whether one of the photos is there, or none is named."""
    for name in names:
        with suppress(PhotoRefused):
            find_photo(images, name, options.follow_links)
            return True
    return not names


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
