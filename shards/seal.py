"""The last step of a pack: every shard against the plan, then items.parquet and the manifest.

What the shards know of their postings is brought back into the catalogue's order on the disk,
and the catalogue is read a second time for the columns that it carries.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from shards import stage_files
from shards.catalogue import Catalogue, set_aside
from shards.counts import counts_of
from shards.errors import BadInput, Corrupt
from shards.files import atomic_path, write_parquet
from shards.index import ABSENT, read_index
from shards.label_noise import label_noise, twin_counts
from shards.layout import ITEMS, LABEL_NOISE, facts_path, plan_path, shard_path
from shards.plan import Plan, Shard
from shards.scratch import scratch
from shards.split import SPLITS
from shards.twins import FINGERPRINT, fingerprints, photo_groups

FACTS = ("status", "reason", "sha256", "phash", "colours", "width", "height", "has_image",
         "has_text")  # fmt: skip
PLACES = ("split", "class_id", "shard", "slot")
OWN = (*PLACES, *FACTS, "photo_group")
"""Columns of items.parquet that are ours beside those of every catalogue."""
TYPES: dict[str, Any] = {
    "class_id": np.int32, "shard": np.int32, "slot": np.int32, "width": np.int64,
    "height": np.int64, "has_image": bool, "has_text": bool, "photo_group": np.int64,
}  # fmt: skip
ARROW = {np.int32: pa.int32(), np.int64: pa.int64(), bool: pa.bool_()}
ROW_GROUP = 4 * 2**20  # bytes in memory
TABLE = f"""
CREATE TABLE fact (row INTEGER, posting_id TEXT, label_group TEXT,
                   {", ".join((*PLACES, *FACTS))});
"""
IN_ORDER = """
CREATE TABLE item AS SELECT * FROM fact ORDER BY row;
DROP TABLE fact;
ALTER TABLE item ADD COLUMN photo_group INTEGER NOT NULL DEFAULT -1;
"""
TWINS = """
SELECT posting_id, label_group, split, photo_group FROM item WHERE photo_group IN (
    SELECT photo_group FROM item WHERE photo_group >= 0 GROUP BY photo_group HAVING COUNT(*) > 1
) ORDER BY rowid
"""
PHOTOS = "SELECT COUNT(*) FROM item WHERE sha256 <> ''"
LOOKS = "SELECT rowid, sha256, phash, colours FROM item WHERE sha256 <> '' ORDER BY rowid"
PRINTS_AT_ONCE = 10_000
PRODUCTS = """
SELECT split, COUNT(*) FROM (
    SELECT split, label_group FROM item WHERE status = 'packed' GROUP BY split, label_group
) GROUP BY split
"""


def seal(plan: Plan, catalogue: Catalogue, out: Path, max_title: int) -> dict[str, Any]:
    """Check that packed + rejected = rows of the catalogue, and finish `out`; its counts.

    Raises Corrupt naming a shard that disagrees with the plan, BadInput when the catalogue has
    changed since the plan was made.
    """
    with scratch(plan_path(out).with_name("seal")) as database:
        database.execute(TABLE)
        places = ", ".join("?" * (2 + len(OWN)))
        for shard in plan.shards():
            database.executemany(f"INSERT INTO fact VALUES ({places})", _outcome(plan, shard, out))
        database.executescript(IN_ORDER)
        _group_photos(database)
        twins = pd.read_sql_query(TWINS, database, dtype={"photo_group": np.int64})
        counts = _write_items(out / ITEMS, database, plan, catalogue, max_title)
        products = dict(database.execute(PRODUCTS).fetchall())
    counts["products"] = {split: products.get(split, 0) for split in SPLITS}
    counts["twins"] = twin_counts(twins)
    write_parquet(out / LABEL_NOISE, label_noise(twins))
    if not counts["packed"] + counts["rejected"] == counts["postings"] == len(plan):
        raise Corrupt(f"{out}: {len(plan)} postings in, {counts} out; remove it and pack again")
    files = [path for split in SPLITS for path in (out / split).glob("[0-9]*")]
    stage_files.finish(out, counts, [*files, out / ITEMS, out / LABEL_NOISE])
    return counts


def _outcome(plan: Plan, shard: Shard, out: Path) -> Iterator[tuple]:
    """What became of each posting of a shard, checked against the plan and the index."""
    tar = shard_path(out, shard.split, shard.number)
    path = facts_path(out, shard.split, shard.number)
    facts = pq.read_table(path).to_pylist()
    rows = list(plan.rows(shard))
    packed = [fact for fact in facts if fact["status"] == "packed"]
    records = read_index(tar.with_suffix(".idx")).records
    planned = [(row.row, row.slot) for row in rows] == [(f["row"], f["slot"]) for f in facts]
    classes = {row.slot: row.class_id for row in rows}
    held = list(
        zip(
            records["slot"].tolist(), records["class_id"].tolist(),
            (records["jpg_size"] != ABSENT).tolist(), (records["txt_size"] != ABSENT).tolist(),
            strict=True,
        )
    )  # fmt: skip
    told = [(f["slot"], classes[f["slot"]], f["has_image"], f["has_text"]) for f in packed]
    if not planned or held != told:
        raise Corrupt(f"{tar}: holds other postings than were planned; remove it and its .idx, "
                      "and run the same command again")  # fmt: skip
    for row, fact in zip(rows, facts, strict=True):
        there = fact["status"] == "packed"
        place = (shard.number, row.slot) if there else (-1, -1)
        yield (row.row, row.posting_id, row.label_group, shard.split, row.class_id, *place,
               *(fact[name] for name in FACTS))  # fmt: skip


def _group_photos(database: sqlite3.Connection) -> None:
    """Give every item with a photo its photo group, by the row of the group's first."""
    photos = database.execute(PHOTOS).fetchone()[0]
    prints, rows = np.zeros(photos, FINGERPRINT), np.zeros(photos, np.int64)
    found = database.execute(LOOKS)
    for begin in range(0, photos, PRINTS_AT_ONCE):
        place, *looks = zip(*found.fetchmany(PRINTS_AT_ONCE), strict=True)
        part = slice(begin, begin + len(place))
        rows[part], prints[part] = place, fingerprints(*looks)
    first = photo_groups(prints)
    pairs = zip(map(int, rows[first] - 1), map(int, rows), strict=True)
    database.executemany("UPDATE item SET photo_group = ? WHERE rowid = ?", pairs)


def _write_items(
    path: Path, database: sqlite3.Connection, plan: Plan, catalogue: Catalogue, max_title: int
) -> dict[str, Any]:
    """Write items.parquet in the catalogue's order; the counts over it, but for products."""
    counts: dict[str, Any] = {}
    schema, held = _schema(catalogue.schema(plan.carried)), []
    with atomic_path(path) as temporary, ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        for table in _items(database, plan, catalogue, max_title):
            counts = _added(counts, counts_of(table))
            held.append(pa.Table.from_pandas(table, schema, preserve_index=False))
            if writer is None:  # the names that pandas keeps of its types come with a table
                writer = opened.enter_context(pq.ParquetWriter(temporary, held[0].schema))
            if sum(part.nbytes for part in held) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        if writer is not None and held:
            writer.write_table(pa.concat_tables(held))
    return counts


def _schema(catalogue: pa.Schema) -> pa.Schema:
    names = set_aside(pd.DataFrame(columns=catalogue.names), OWN).columns
    theirs = [(n, t) for n, t in zip(names, catalogue.types, strict=True) if n != "title"]
    ours = [(name, ARROW.get(TYPES.get(name, ""), pa.string())) for name in OWN]
    return pa.schema([*theirs, *ours, ("title", pa.string())])


def _items(
    database: sqlite3.Connection, plan: Plan, catalogue: Catalogue, max_title: int
) -> Iterator[pd.DataFrame]:
    found = database.execute(f"SELECT posting_id, {', '.join(OWN)} FROM item ORDER BY rowid")
    for table in catalogue.frames(plan.carried):
        # A carried column must not take the name of one of ours.
        table = set_aside(table, OWN)
        facts = pd.DataFrame(found.fetchmany(len(table)), columns=["posting_id", *OWN])
        if facts.posting_id.tolist() != table.posting_id.tolist():
            raise _changed(catalogue)
        title = table.title.str[:max_title]
        yield pd.concat([table.drop(columns="title"), facts[[*OWN]].astype(TYPES), title], axis=1)
    if found.fetchone() is not None:
        raise _changed(catalogue)


def _changed(catalogue: Catalogue) -> BadInput:
    return BadInput(f"{catalogue.path}: has changed while it was packed; pack it anew")


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The counts of two parts of a set together."""
    if not one:
        return other
    sums: dict[str, Any] = {}
    for name, value in one.items():
        if name == "classes":
            sums[name] = max(value, other[name])
        elif isinstance(value, dict):
            sums[name] = {split: value[split] + other[name][split] for split in value}
        else:
            sums[name] = value + other[name]
    return sums
