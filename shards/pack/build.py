"""Build one shard from the plan: the tar, the outcome of each posting, and the index as mark."""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from shards.catalogue.titles import has_text
from shards.pack.plan import Plan, Row, Shard
from shards.photos.options import PackOptions
from shards.photos.photo import load_photo, photo_facts
from shards.photos.remarks import (
    NO_TITLE,
    NOTHING,
    TITLE_CUT,
    UNSEEN_TITLE,
    PhotoRefused,
    Remark,
    remark_facts,
    remark_of_photo,
)
from shards.storage.errors import Corrupt
from shards.storage.files import write_parquet
from shards.tar.index import read_index
from shards.tar.layout import facts_path, shard_path
from shards.tar.write import Sample, write_shard

TO_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


def build_shard(
    shard: Shard, plan: Path, stamp: str, images: Path | None, out: Path, options: PackOptions
) -> int:
    """Write one shard unless it is built already; the number of its postings."""
    if is_built(shard, out):
        return shard.items
    facts: list[dict[str, Any]] = []
    facts_file = facts_path(out, shard.split, shard.number)
    facts_file.unlink(missing_ok=True)
    with closing(Plan(plan, stamp)) as opened:
        found = samples(opened.rows(shard.first, shard.items), images, options, facts)
        tar = shard_path(out, shard.split, shard.number)
        write_shard(tar, found, lambda: write_parquet(facts_file, pd.DataFrame(facts)))
    return shard.items


def is_built(shard: Shard, out: Path) -> bool:
    """Whether a shard is complete with its index and its facts."""
    tar = shard_path(out, shard.split, shard.number)
    try:
        index = read_index(tar.with_suffix(".idx"))
    except Corrupt:
        return False
    is_complete = tar.exists() and tar.stat().st_size == index.header["tar_bytes"]
    return is_complete and facts_path(out, shard.split, shard.number).exists()


def samples(
    rows: Iterable[Row], images: Path | None, options: PackOptions, facts: list[dict[str, Any]]
) -> Iterator[Sample]:
    """Yield (slot, class_id, members) of every posting that can be packed.

    The outcome of every posting, also of those that cannot, is appended to `facts`: row, slot,
    FACTS, of which `status` is packed or rejected and `reason` the remarks or empty, and `remarks`
    as `remark_facts` has them.
    """
    for row in rows:
        photo, remarks = None, []
        if row.image and images is not None:
            try:
                photo = load_photo(images, row.image, options)
            except PhotoRefused as refused:
                remarks.append(remark_of_photo(row.image, refused))
        title = row.title[: options.max_title]
        if len(row.title) > len(title):
            remarks.append(Remark(TITLE_CUT, f"title of {len(row.title)} characters cut"))
        has_title = has_text(title)
        is_packed = photo is not None or has_title
        if title.strip() and not has_title:
            remarks.append(Remark(UNSEEN_TITLE, UNSEEN_TITLE))
        if not is_packed and not remarks:
            nothing = NO_TITLE if row.image and not options.photos else NOTHING
            remarks.append(Remark(nothing, nothing))
        noted = remark_facts(remarks)
        known = {"reason": noted["reason"], "has_text": has_title, **photo_facts(photo)}
        status = "packed" if is_packed else "rejected"
        facts.append({"row": row.row, "slot": row.slot, "status": status, **noted, **known})
        if not is_packed:
            continue
        del known["colours"]
        texts = {"posting_id": row.posting_id, "label_group": row.label_group, "title": title}
        members = {"json": TO_JSON(known | texts).encode()}
        if photo is not None:
            members["jpg"] = photo.jpeg
        if has_title:
            members["txt"] = title.encode()
        if row.class_id >= 0:
            members["cls"] = str(row.class_id).encode()
        yield row.slot, row.class_id, members
