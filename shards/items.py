"""The table of items on the disk, before it is items.parquet: photo groups, noise and counts.

Photo groups are the connected components of all twins: twins of twins stand in one group, so no
pair of twins is ever cut, at the price that the ends of a chain may look less alike. Nothing here
takes memory by the number of items.
"""

import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.files import atomic_path
from shards.label_noise import COLUMNS, UNLEARNED
from shards.split import SPLITS
from shards.twins import looks, twins

PLACES = ("split", "class_id", "shard", "slot")
FACTS = ("status", "reason", "sha256", "phash", "colours", "width", "height", "has_image",
         "has_text")  # fmt: skip
STORED = ("posting_id", "label_group", *PLACES, *FACTS)
"""Columns of the table beside photo_group."""
OWN = (*PLACES, *FACTS, "photo_group")
"""Columns of items.parquet that are ours beside those of every catalogue."""
TYPES: dict[str, Any] = {
    "class_id": np.int32, "shard": np.int32, "slot": np.int32, "width": np.int64,
    "height": np.int64, "has_image": bool, "has_text": bool, "photo_group": np.int64,
}  # fmt: skip
ARROW = {np.int32: pa.int32(), np.int64: pa.int64(), bool: pa.bool_()}
ROWS_AT_ONCE = 10_000

# The first photo that looks the same, and the first with the same bytes.
SAME_LOOKS = """
SELECT rowid, MIN(rowid) OVER (PARTITION BY phash, colours), phash, colours
    FROM item WHERE sha256 <> '' AND phash <> '' AND colours <> ''
"""
SAME_BYTES = """
CREATE TABLE edge (a INTEGER, b INTEGER);
INSERT INTO edge SELECT rowid, first FROM (
    SELECT rowid, MIN(rowid) OVER (PARTITION BY sha256) AS first FROM item WHERE sha256 <> ''
) WHERE rowid > first;
"""
ADD = "INSERT INTO edge VALUES (?, ?)"
# One round of hooking and pointer jumping: edges lead from a row to an earlier one; of several
# that leave a row the earliest stays, the others lead on from what they led to; and what leads to
# a row that leads on itself skips it.
ROUND = """
DROP TABLE IF EXISTS least;
CREATE TABLE least (a INTEGER PRIMARY KEY, b INTEGER);
INSERT INTO least SELECT a, MIN(b) FROM edge GROUP BY a;
CREATE TABLE next AS
    SELECT DISTINCT edge.b AS a, least.b AS b FROM edge JOIN least USING (a) WHERE edge.b > least.b
    UNION ALL
    SELECT one.a, IFNULL(other.b, one.b)
        FROM least AS one LEFT JOIN least AS other ON other.a = one.b;
DROP TABLE edge;
ALTER TABLE next RENAME TO edge;
"""
OPEN = "SELECT EXISTS (SELECT 1 FROM edge LEFT JOIN least USING (a) WHERE edge.b IS NOT least.b)"
GROUPS = """
UPDATE item SET photo_group = rowid - 1 WHERE sha256 <> '';
UPDATE item SET photo_group = least.b - 1 FROM least WHERE least.a = item.rowid;
"""
# What a person has to know of a photo that stands more than once; what is not told differs from
# nothing, nor does a split of which nothing is learned.
TWINS = f"""
CREATE TABLE twin AS SELECT photo_group, COUNT(*) AS postings,
    COUNT(NULLIF(label_group, '')) AS labelled, COUNT(NULLIF(split, '{UNLEARNED}')) AS learned,
    IFNULL(MIN(NULLIF(label_group, '')) <> MAX(NULLIF(label_group, '')), 0) AS noisy,
    IFNULL(MIN(NULLIF(split, '{UNLEARNED}')) <> MAX(NULLIF(split, '{UNLEARNED}')), 0) AS across
    FROM item WHERE photo_group >= 0 GROUP BY photo_group HAVING COUNT(*) > 1;
"""
TOLD = """
SELECT COUNT(*) AS photo_groups, IFNULL(SUM(postings), 0) AS postings,
    MAX(IFNULL(MAX(postings), 0), EXISTS (SELECT 1 FROM item WHERE photo_group >= 0)) AS largest,
    IFNULL(SUM(noisy), 0) AS noise_groups, IFNULL(SUM(noisy * labelled), 0) AS noise_postings,
    IFNULL(SUM(across * learned), 0) AS across_splits FROM twin
"""
NOISE = f"""
SELECT {", ".join(COLUMNS)} FROM item JOIN twin USING (photo_group)
    WHERE noisy AND label_group <> '' ORDER BY photo_group, item.rowid
"""
COUNTS = """
SELECT COUNT(*) AS postings, SUM(status = 'packed') AS packed, SUM(status = 'rejected') AS rejected,
    SUM(reason <> '') AS with_reason, SUM(status = 'packed' AND has_image) AS photos,
    SUM(status = 'packed' AND has_text) AS titles FROM item
"""
BY_SPLIT = """
SELECT split, COUNT(*) AS items, COUNT(DISTINCT label_group) AS products FROM item
    WHERE status = 'packed' GROUP BY split
"""


def create_items(database: sqlite3.Connection, *others: str) -> None:
    """An empty table `item` of STORED and `others`, to be filled in the order of items.parquet."""
    columns = ", ".join((*STORED, *others))
    database.execute(f"CREATE TABLE item ({columns}, photo_group INTEGER NOT NULL DEFAULT -1)")


def group_photos(database: sqlite3.Connection, folder: Path) -> None:
    """Give every item with a photo its photo_group: the row (from 0) of the group's first.

    Files lie in `folder` meanwhile, 45 to 180 bytes a photo.
    """
    database.executescript(SAME_BYTES)
    with TemporaryDirectory(dir=folder) as work:
        photos = Path(work) / "looks"
        _write_looks(database, photos)
        for i, j in twins(photos):
            late, early = np.maximum(i, j).tolist(), np.minimum(i, j).tolist()
            database.executemany(ADD, zip(late, early, strict=True))
    connect(database)
    database.executescript(GROUPS)


def connect(database: sqlite3.Connection) -> None:
    """Turn table edge (a, b), a > b, into least: the first row b of the component of each other."""
    # Hooking and pointer jumping (Shiloach and Vishkin 1982) by sorts, which the disk holds.
    while True:
        database.executescript(ROUND)
        if not database.execute(OPEN).fetchone()[0]:
            return


def tell_twins(database: sqlite3.Connection, noise: Path) -> dict[str, int]:
    """Counts of the photos that stand more than once; `noise` gets label_noise.parquet.

    One photo cannot show two products, so where it does either a label is wrong or a seller took
    another's photo.
    """
    database.executescript(TWINS)
    text, number = pa.string(), pa.int64()
    schema = pa.schema(list(zip(COLUMNS, (number, text, text), strict=True)))
    write_rows(noise, schema, database.execute(NOISE))
    return _named(database.execute(TOLD))


def write_rows(path: Path, schema: pa.Schema, found: sqlite3.Cursor) -> None:
    """Write what a query finds as Parquet, in its order, a part at a time."""
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while rows := found.fetchmany(ROWS_AT_ONCE):
            columns = zip(zip(*rows, strict=True), schema.types, strict=True)
            arrays = [pa.array(_of_kind(values, kind), kind) for values, kind in columns]
            writer.write_table(pa.table(arrays, schema=schema))


def _of_kind(values: tuple, kind: pa.DataType) -> list:
    return [value != 0 for value in values] if kind == pa.bool_() else list(values)


def count_items(database: sqlite3.Connection) -> dict[str, Any]:
    """Postings, packed ones, products and classes of the table."""
    counts: dict[str, Any] = _named(database.execute(COUNTS))
    rows = {split: rest for split, *rest in database.execute(BY_SPLIT)}
    for place, name in enumerate(("items", "products")):
        counts[name] = {split: rows[split][place] if split in rows else 0 for split in SPLITS}
    classes = database.execute("SELECT IFNULL(MAX(class_id), -1) + 1 FROM item").fetchone()[0]
    return counts | {"classes": classes}


def _write_looks(database: sqlite3.Connection, path: Path) -> None:
    """Write one photo of each look to `path`, and join those that look the same."""
    found = database.execute(SAME_LOOKS)
    with path.open("wb") as file:
        while rows := found.fetchmany(ROWS_AT_ONCE):
            again = [(row, first) for row, first, *_ in rows if row != first]
            database.executemany(ADD, again)
            new = [(row, *look) for row, first, *look in rows if row == first]
            if new:
                file.write(looks(*zip(*new, strict=True)).tobytes())


def _named(found: sqlite3.Cursor) -> dict[str, Any]:
    names = [column[0] for column in found.description]
    return dict(zip(names, found.fetchone(), strict=True))
