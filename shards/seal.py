"""The last step of a pack: every shard against the plan, then items.parquet and the manifest.

What the shards know of their postings is brought back into the catalogue's order on the disk,
and the catalogue is read a second time for the columns that it carries.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from shards import stage_files
from shards.catalogue import Catalogue, set_aside
from shards.errors import BadInput, Corrupt
from shards.files import atomic_path
from shards.index import ABSENT, read_index
from shards.items import (
    ARROW,
    FACTS,
    OWN,
    STORED,
    TYPES,
    count_items,
    create_items,
    group_photos,
    tell_twins,
)
from shards.layout import ITEMS, LABEL_NOISE, facts_path, plan_path, shard_path
from shards.plan import Plan, Shard
from shards.room import HANDFUL, PHOTOS_REMEDY
from shards.scratch import scratch
from shards.split import SPLITS

ROW_GROUP = 4 * 2**20  # bytes in memory
TABLE = f"CREATE TABLE fact (row INTEGER, {', '.join(STORED)})"
IN_ORDER = f"""
INSERT INTO item ({", ".join(STORED)}) SELECT {", ".join(STORED)} FROM fact ORDER BY row;
DROP TABLE fact;
"""


def seal(plan: Plan, catalogue: Catalogue, out: Path, max_title: int) -> dict[str, Any]:
    """Check that packed + rejected = rows of the catalogue, and finish `out`; its counts.

    Raises Corrupt naming a shard that disagrees with the plan, is not in it or has changed since it
    was written, BadInput when the catalogue has changed since the plan was made, or not one photo
    of those that it names was packed.
    """
    tars = [shard_path(out, shard.split, shard.number) for shard in plan.shards()]
    files = [path for tar in tars for path in (tar, tar.with_suffix(".idx"))]
    lying = {path for split in SPLITS for path in (out / split).glob("[0-9]*")}
    if strange := sorted(lying - set(files)):
        raise Corrupt(f"{strange[0]}: is no shard of this pack; take it away, and run the same "
                      "command again")  # fmt: skip
    with scratch(plan_path(out).with_name("seal")) as database:
        database.execute(TABLE)
        places = ", ".join("?" * (1 + len(STORED)))
        for shard in plan.shards():
            database.executemany(f"INSERT INTO fact VALUES ({places})", _outcome(plan, shard, out))
        create_items(database)
        database.executescript(IN_ORDER)
        group_photos(database, plan_path(out).parent)
        twins = tell_twins(database, out / LABEL_NOISE)
        counts = count_items(database) | {"twins": twins}
        _write_items(out / ITEMS, database, plan, catalogue, max_title)
    if not counts["packed"] + counts["rejected"] == counts["postings"] == len(plan):
        raise Corrupt(f"{out}: {len(plan)} postings in, {counts} out; remove it and pack again")
    if plan.has_photos(beside=HANDFUL) and not counts["photos"]:
        raise BadInput(f"{out}: not one of the photos that {catalogue.path} names could be packed; "
                       f"{PHOTOS_REMEDY}. Then remove {out} and pack again")  # fmt: skip
    written = {tar: _sha256_as_written(tar) for tar in tars}
    stage_files.finish(out, counts, [*files, out / ITEMS, out / LABEL_NOISE], written)
    return counts


def _sha256_as_written(tar: Path) -> str:
    return read_index(tar.with_suffix(".idx")).header["tar_sha256"]


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


def _write_items(
    path: Path, database: sqlite3.Connection, plan: Plan, catalogue: Catalogue, max_title: int
) -> None:
    """Write items.parquet in the catalogue's order."""
    schema, held = _schema(catalogue.schema(plan.carried)), []
    with atomic_path(path) as temporary, ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        for table in _items(database, plan, catalogue, max_title):
            held.append(pa.Table.from_pandas(table, schema, preserve_index=False))
            if writer is None:  # the names that pandas keeps of its types come with a table
                writer = opened.enter_context(pq.ParquetWriter(temporary, held[0].schema))
            if sum(part.nbytes for part in held) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        if writer is not None and held:
            writer.write_table(pa.concat_tables(held))


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
