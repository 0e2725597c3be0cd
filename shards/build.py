"""One shard from its part of the plan: the tar, what became of each posting, the index as mark."""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import Corrupt
from shards.files import atomic_path
from shards.index import read_index
from shards.layout import facts_path, shard_path
from shards.options import PackOptions
from shards.photo import Photo, PhotoRefused, load_photo
from shards.plan import Plan, Row, Shard
from shards.tar import Sample, write_shard

TO_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


def build_shard(
    shard: Shard, plan: Path, stamp: str, images: Path | None, out: Path, options: PackOptions
) -> int:
    """Write one shard unless it is built already; how many postings it is for."""
    if is_built(shard, out):
        return shard.items
    facts: list[dict[str, Any]] = []
    facts_file = facts_path(out, shard.split, shard.number)
    facts_file.unlink(missing_ok=True)
    with closing(Plan(plan, stamp)) as opened:
        write_shard(
            shard_path(out, shard.split, shard.number),
            samples(opened.rows(shard), images, options, facts),
            before_mark=lambda: _write_facts(facts_file, facts),
        )
    return shard.items


def _write_facts(path: Path, facts: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(facts), temporary)


def is_built(shard: Shard, out: Path) -> bool:
    """Whether a shard stands whole with its index and its facts."""
    tar = shard_path(out, shard.split, shard.number)
    try:
        index = read_index(tar.with_suffix(".idx"))
    except Corrupt:
        return False
    whole = tar.exists() and tar.stat().st_size == index.header["tar_bytes"]
    return whole and facts_path(out, shard.split, shard.number).exists()


def samples(
    rows: Iterable[Row], images: Path | None, options: PackOptions, facts: list[dict[str, Any]]
) -> Iterator[Sample]:
    """Yield (slot, class_id, members) of every posting that can be packed; note all in `facts`."""
    for row in rows:
        photo, reason = _photo(row.image, images, options)
        title = row.title[: options.max_title]
        if len(row.title) > len(title):
            reason = "; ".join(filter(None, [reason, f"title of {len(row.title)} characters cut"]))
        packed = photo is not None or bool(title.strip())
        fact = _fact(photo, title, packed, reason)
        facts.append({"row": row.row, "slot": row.slot, **fact})
        if packed:
            yield row.slot, row.class_id, _members(row, photo, title, fact)


def _photo(name: str, images: Path | None, options: PackOptions) -> tuple[Photo | None, str]:
    if not name or images is None:
        return None, ""
    try:
        return load_photo(images, name, options), ""
    except PhotoRefused as refused:
        return None, f"photo {name}: {refused}"


def _fact(photo: Photo | None, title: str, packed: bool, reason: str) -> dict[str, Any]:
    return {
        "status": "packed" if packed else "rejected",
        "reason": reason if packed or reason else "neither a photo nor a title",
        "sha256": photo.sha256 if photo else "",
        "phash": photo.phash if photo else "",
        "colours": photo.colours if photo else "",
        "width": photo.width if photo else 0,
        "height": photo.height if photo else 0,
        "has_image": photo is not None,
        "has_text": bool(title.strip()),
    }


def _members(row: Row, photo: Photo | None, title: str, fact: dict[str, Any]) -> dict[str, bytes]:
    told = {key: value for key, value in fact.items() if key not in ("status", "colours")}
    about = told | {
        "posting_id": row.posting_id, "label_group": row.label_group, "title": title,
    }  # fmt: skip
    members = {"json": TO_JSON(about).encode()}
    if photo is not None:
        members["jpg"] = photo.jpeg
    if title.strip():
        members["txt"] = title.encode()
    if row.class_id >= 0:
        members["cls"] = str(row.class_id).encode()
    return members
