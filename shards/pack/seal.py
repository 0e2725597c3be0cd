"""The last step of a pack: every shard against the plan, then items.parquet and the manifest.

The outcomes of the postings are sorted back into the catalogue's order on the disk, and the
catalogue is read a second time for the columns that it carries along.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from shards.catalogue.columns import set_aside
from shards.catalogue.rows import Catalogue
from shards.catalogue.split import SPLITS
from shards.pack.disk_space import HANDFUL
from shards.pack.items import (
    FACTS,
    OWN,
    STORED,
    TYPES,
    Counts,
    arrow_type,
    count_items,
    create_items,
    describe_remarks,
    group_photos,
)
from shards.pack.plan import Plan, Shard
from shards.photos.options import PackOptions
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import atomic_path
from shards.storage.scratch import scratch
from shards.tar.index import ABSENT, read_index
from shards.tar.layout import ITEMS, LABEL_NOISE, REMARKS, facts_path, plan_path, shard_path

ROW_GROUP = 4 * 2**20  # bytes in memory
TABLE = f"CREATE TABLE fact (row INTEGER, {', '.join(STORED)})"
IN_ORDER = f"""
INSERT INTO item ({", ".join(STORED)}) SELECT {", ".join(STORED)} FROM fact ORDER BY row;
DROP TABLE fact;
"""


def seal(plan: Plan, catalogue: Catalogue, out: Path, options: PackOptions) -> Counts:
    """Check that packed + rejected = rows of the catalogue, and finish `out`; its counts.

    Raises Corrupt naming a shard that disagrees with the plan, is not in it or has changed since it
    was written; BadInput when the catalogue has changed since the plan was made, or none of the
    photos that it names was packed.
    """
    tars = {shard: shard_path(out, shard.split, shard.number) for shard in plan.shards()}
    files = [path for tar in tars.values() for path in (tar, tar.with_suffix(".idx"))]
    lying = {path for split in SPLITS for path in (out / split).glob("[0-9]*")}
    if unknown := sorted(lying - set(files)):
        raise Corrupt(
            f"{unknown[0]}: is no shard of this pack; take it away, and run the same command again"
        )
    with scratch(plan_path(out).with_name("seal")) as database:
        database.execute(TABLE)
        written = {}
        for shard, tar in tars.items():
            rows = _outcomes(plan, shard, tar, facts_path(out, shard.split, shard.number))
            database.executemany(f"INSERT INTO fact VALUES (?{', ?' * len(STORED)})", rows)
            written[tar] = read_index(tar.with_suffix(".idx")).header["tar_sha256"]
        create_items(database)
        database.executescript(IN_ORDER)
        group_photos(database, plan_path(out).parent)
        counts = count_items(database, out / LABEL_NOISE)
        _write_items(out / ITEMS, database, plan, catalogue, options.max_title)
    if not counts["packed"] + counts["rejected"] == counts["postings"] == len(plan):
        raise Corrupt(f"{out}: {len(plan)} postings in, {counts} out; remove it and pack again")
    if options.photos and plan.has_photos(more_than=HANDFUL) and not counts["photos"]:
        raise BadInput(
            f"{out}: not one of the photos that {catalogue.path} names could be packed: "
            f"{'; '.join(describe_remarks(out))}. Then remove {out} and pack again"
        )
    stage_files.finish(
        out, counts, [*files, out / ITEMS, out / LABEL_NOISE, out / REMARKS], written
    )
    return counts


def _outcomes(plan: Plan, shard: Shard, tar: Path, facts_file: Path) -> Iterator[tuple]:
    """The row in the catalogue and STORED of each posting of a shard.

    Raises Corrupt when the facts or the index disagree with the plan.
    """
    facts = pq.read_table(facts_file).to_pylist()
    rows = list(plan.rows(shard.first, shard.items))
    is_planned = [(row.row, row.slot) for row in rows] == [(f["row"], f["slot"]) for f in facts]
    class_of = {row.slot: row.class_id for row in rows}
    expected = [
        (f["slot"], class_of.get(f["slot"]), f["has_image"], f["has_text"])
        for f in facts
        if f["status"] == "packed"
    ]
    records = read_index(tar.with_suffix(".idx")).records
    has_image, has_text = (records[f"{name}_size"] != ABSENT for name in ("jpg", "txt"))
    columns = (records["slot"], records["class_id"], has_image, has_text)
    if not is_planned or expected != list(zip(*(c.tolist() for c in columns), strict=True)):
        raise Corrupt(
            f"{tar}: holds other postings than were planned; remove it and its .idx, "
            "and run the same command again"
        )
    for row, fact in zip(rows, facts, strict=True):
        place = (shard.number, row.slot) if fact["status"] == "packed" else (-1, -1)
        known = (row.row, row.posting_id, row.label_group, shard.split, row.class_id, *place)
        yield *known, *(fact[name] for name in FACTS), fact["remarks"]


def _write_items(
    path: Path, database: sqlite3.Connection, plan: Plan, catalogue: Catalogue, max_title: int
) -> None:
    """Write items.parquet in the catalogue's order: its columns, then OWN, then the title.

    Raises BadInput when the catalogue has changed since the plan was made.
    """
    columns = catalogue.schema(plan.carried)
    names = set_aside(pd.DataFrame(columns=columns.names), OWN).columns
    theirs = [(n, t) for n, t in zip(names, columns.types, strict=True) if n != "title"]
    ours = [(name, arrow_type(name)) for name in OWN]
    schema, held = pa.schema([*theirs, *ours, ("title", pa.string())]), []
    changed = BadInput(f"{catalogue.path}: has changed while it was packed; pack it anew")
    found = database.execute(f"SELECT posting_id, {', '.join(OWN)} FROM item ORDER BY rowid")
    with atomic_path(path) as temporary, ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        for table in catalogue.frames(plan.carried):
            # A carried column must not take the name of one of ours.
            table = set_aside(table, OWN)
            facts = pd.DataFrame(found.fetchmany(len(table)), columns=["posting_id", *OWN])
            if facts.posting_id.tolist() != table.posting_id.tolist():
                raise changed
            columns = (table.drop(columns="title"), facts[[*OWN]].astype(TYPES))
            table = pd.concat([*columns, table.title.str[:max_title]], axis=1)
            held.append(pa.Table.from_pandas(table, schema, preserve_index=False))
            if writer is None:  # the first table's schema has pandas's notes on its types
                writer = opened.enter_context(pq.ParquetWriter(temporary, held[0].schema))
            if sum(rows.nbytes for rows in held) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        if found.fetchone() is not None:
            raise changed
        if writer is not None and held:
            writer.write_table(pa.concat_tables(held))
