"""The table of items on the disk, before it is items.parquet: photo groups, noise and counts.

Photo groups are the connected components of near-duplicate photos, so no pair of near-duplicates
is separated, at the price that the ends of a chain may look less similar. No memory here grows
with the number of items.
"""

import csv
import json
import sqlite3
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.catalogue.split import SPLITS
from shards.duplicates.near_duplicates import AS_BYTES, near_duplicate_pairs
from shards.photos.remarks import summary_of
from shards.storage.files import atomic_path
from shards.tar.layout import LABEL_NOISE, REMARKS

PLACES = ("split", "class_id", "shard", "slot")
PHOTO_FACTS = ("sha256", "phash", "colours", "width", "height")
FACTS = ("status", "reason", *PHOTO_FACTS, "has_image", "has_text")
STORED = ("posting_id", "label_group", *PLACES, *FACTS, "remarks")
"""Columns of the table beside photo_group."""
OWN = (*PLACES, *FACTS, "photo_group")
"""Columns of items.parquet that the pack adds to those of the catalogue."""
TYPES: dict[str, Any] = {
    **dict.fromkeys(("class_id", "shard", "slot"), np.int32),
    **dict.fromkeys(("width", "height", "photo_group"), np.int64),
    **dict.fromkeys(("has_image", "has_text"), bool),
}
"""NumPy types of the columns that are not text."""
NOISE_SCHEMA = pa.schema(
    [("photo_group", pa.int64()), ("posting_id", pa.string()), ("label_group", pa.string())]
)
"""Columns of label_noise.parquet."""
REMARK_COLUMNS = ("posting_id", "status", "kind", "remark")
"""Columns of remarks.csv, which has a row for every remark."""
UNLEARNED = "unlabelled"
"""The split that nothing is learned from, so that a photo shared with it leaks nothing."""
EXAMPLES = 3
ROWS_AT_ONCE = 10_000

# The first photo with the same signature, and the first with the same bytes.
SAME_SIGNATURE = """
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
# One round of hooking and pointer jumping: edges lead from a row to an earlier one. Of several
# edges from a row the one to the earliest row stays, the others now start where they led to; and
# an edge to a row that has an edge itself skips that row.
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
UNFINISHED = (
    "SELECT EXISTS (SELECT 1 FROM edge LEFT JOIN least USING (a) WHERE edge.b IS NOT least.b)"
)
GROUPS = """
UPDATE item SET photo_group = rowid - 1 WHERE sha256 <> '';
UPDATE item SET photo_group = least.b - 1 FROM least WHERE least.a = item.rowid;
"""
# The photo groups of several postings. An empty label differs from nothing, nor does the split
# that nothing is learned from.
SHARED = f"""
CREATE TABLE shared AS SELECT photo_group, COUNT(*) AS postings,
    COUNT(NULLIF(label_group, '')) AS labelled, COUNT(NULLIF(split, '{UNLEARNED}')) AS learned,
    IFNULL(MIN(NULLIF(label_group, '')) <> MAX(NULLIF(label_group, '')), 0) AS noisy,
    IFNULL(MIN(NULLIF(split, '{UNLEARNED}')) <> MAX(NULLIF(split, '{UNLEARNED}')), 0) AS across
    FROM item WHERE photo_group >= 0 GROUP BY photo_group HAVING COUNT(*) > 1;
"""
SHARED_COUNTS = """
SELECT COUNT(*) AS photo_groups, IFNULL(SUM(postings), 0) AS postings,
    MAX(IFNULL(MAX(postings), 0), EXISTS (SELECT 1 FROM item WHERE photo_group >= 0)) AS largest,
    IFNULL(SUM(noisy), 0) AS noise_groups, IFNULL(SUM(noisy * labelled), 0) AS noise_postings,
    IFNULL(SUM(across * learned), 0) AS across_splits FROM shared
"""
NOISE = f"""
SELECT {", ".join(NOISE_SCHEMA.names)} FROM item JOIN shared USING (photo_group)
    WHERE noisy AND label_group <> '' ORDER BY photo_group, item.rowid
"""
REMARKED = "SELECT posting_id, status, remarks FROM item WHERE reason <> '' ORDER BY rowid"
COUNTS = """
SELECT COUNT(*) AS postings, SUM(status = 'packed') AS packed, SUM(status = 'rejected') AS rejected,
    SUM(reason <> '') AS with_reason, SUM(status = 'packed' AND has_image) AS photos,
    SUM(status = 'packed' AND has_text) AS titles FROM item
"""
BY_SPLIT = """
SELECT split, COUNT(*) AS items, COUNT(DISTINCT label_group) AS products FROM item
    WHERE status = 'packed' GROUP BY split
"""


class NearDuplicates(TypedDict):
    """Counts of the photo groups of two postings or more.

    `largest` are the postings of the largest group. The noise_ counts are of groups with several
    labels and of their labelled postings; `across_splits` counts postings of groups in several
    splits, without those of the unlabelled split.
    """

    photo_groups: int
    postings: int
    largest: int
    noise_groups: int
    noise_postings: int
    across_splits: int


class Counts(TypedDict):
    """Counts of a shard set, as its manifest and the verbs show them."""

    postings: int
    packed: int
    rejected: int
    with_reason: int
    photos: int
    titles: int
    items: dict[str, int]
    products: dict[str, int]
    classes: int
    near_duplicates: NearDuplicates
    indexed_tars: NotRequired[int]
    products_in_several_splits: NotRequired[int]


def arrow_type(column: str) -> pa.DataType:
    """The type of one of our columns in items.parquet."""
    return pa.from_numpy_dtype(TYPES[column]) if column in TYPES else pa.string()


def create_items(database: sqlite3.Connection, *others: str) -> None:
    """Create the table `item` of STORED and `others`; its rows are those of items.parquet."""
    columns = ", ".join((*STORED, *others))
    database.execute(f"CREATE TABLE item ({columns}, photo_group INTEGER NOT NULL DEFAULT -1)")


def group_photos(database: sqlite3.Connection, folder: Path) -> None:
    """Give every item with a photo its photo_group: the row (from 0) of the group's first.

    Temporary files lie in `folder`, 45 to 180 bytes a photo.
    """
    database.executescript(SAME_BYTES)
    with TemporaryDirectory(dir=folder) as work:
        photos = Path(work) / "photos"
        found = database.execute(SAME_SIGNATURE)
        with photos.open("wb") as file:
            while rows := found.fetchmany(ROWS_AT_ONCE):
                database.executemany(ADD, [row[:2] for row in rows if row[0] != row[1]])
                file.writelines(
                    AS_BYTES.pack(row, int(phash, 16), bytes.fromhex(colours))
                    for row, first, phash, colours in rows
                    if row == first
                )
        for i, j in near_duplicate_pairs(photos):
            late, early = np.maximum(i, j).tolist(), np.minimum(i, j).tolist()
            database.executemany(ADD, zip(late, early, strict=True))
    connect(database)
    database.executescript(GROUPS)


def connect(database: sqlite3.Connection) -> None:
    """Turn table edge (a, b), a > b, into least: b is the first row of the component of row a."""
    # Hooking and pointer jumping (Shiloach and Vishkin 1982) by sorts, which spill to the disk.
    while True:
        database.executescript(ROUND)
        if not database.execute(UNFINISHED).fetchone()[0]:
            return


def count_items(database: sqlite3.Connection, noise: Path) -> Counts:
    """Counts of the table with its photo groups; writes label_noise.parquet to `noise`, and
    remarks.csv beside it.

    One photo cannot show two products, so where it does, a label is wrong or a seller took
    another's photo.
    """
    database.executescript(SHARED)
    write_rows(noise, NOISE_SCHEMA, database.execute(NOISE))
    with (
        atomic_path(noise.with_name(REMARKS)) as temporary,
        temporary.open("w", encoding="utf-8", errors="replace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(REMARK_COLUMNS)
        for posting_id, status, remarks in database.execute(REMARKED):
            writer.writerows([posting_id, status, *remark] for remark in json.loads(remarks))
    named = database.cursor()
    named.row_factory = sqlite3.Row
    counts = dict(named.execute(COUNTS).fetchone())
    counts |= {"items": dict.fromkeys(SPLITS, 0), "products": dict.fromkeys(SPLITS, 0)}
    for split, items, products in database.execute(BY_SPLIT):
        counts["items"][split], counts["products"][split] = items, products
    classes = "SELECT IFNULL(MAX(class_id), -1) + 1 FROM item"
    counts["classes"] = database.execute(classes).fetchone()[0]
    counts["near_duplicates"] = dict(named.execute(SHARED_COUNTS).fetchone())
    return cast(Counts, counts)


def write_rows(path: Path, schema: pa.Schema, found: sqlite3.Cursor) -> None:
    """Write the rows of a query as Parquet, in their order, ROWS_AT_ONCE at a time."""
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while rows := found.fetchmany(ROWS_AT_ONCE):
            columns = zip(zip(*rows, strict=True), schema.types, strict=True)
            # By a cast, since SQLite has no type for booleans: they are 0 and 1.
            arrays = [pa.array(values).cast(kind) for values, kind in columns]
            writer.write_table(pa.table(arrays, schema=schema))


def describe_near_duplicates(counts: NearDuplicates, shards: Path) -> str:
    """The counts in a few lines, with the first groups of label_noise.parquet of a shard set."""
    noise = shards / LABEL_NOISE
    if not counts["postings"]:
        return "no photo stands twice"
    lines = [
        f"{counts['postings']} postings share {counts['photo_groups']} photos with others, "
        f"{counts['across_splits']} of them across splits: scores leave those out"
    ]
    if counts["noise_groups"]:
        lines.append(
            f"{counts['noise_groups']} photos stand in several label groups, "
            f"{counts['noise_postings']} postings: see {noise}"
        )
        with pq.ParquetFile(noise) as file:
            first = file.read_row_group(0).to_pandas()
        for _, postings in islice(first.groupby("photo_group"), EXAMPLES):
            names = [f"{p.posting_id} ({p.label_group})" for p in postings[:EXAMPLES].itertuples()]
            more = len(postings) - len(names)
            lines.append("  " + ", ".join([*names, *([f"{more} more"] if more else [])]))
    return "\n".join(lines)


def describe_remarks(shards: Path) -> list[str]:
    """A line for every kind of remark in remarks.csv of a shard set, with its remedy."""
    csv.field_size_limit(2**31 - 1)
    with (shards / REMARKS).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return summary_of((row["kind"], f"{row['posting_id']}: {row['remark']}") for row in rows)
