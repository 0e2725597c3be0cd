"""The plan of a pack: split, shard, slot and class of every posting, before a byte is written.

It lies on the disk in the order of the tars, so that the builder of a shard reads only its rows.
"""

import sqlite3
from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from shards.catalogue.rows import Carried, Catalogue, check_unique
from shards.pack.labels import log_label_remarks
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput
from shards.storage.files import atomic_path
from shards.storage.scratch import scratch

MIN_SHARD, SHARDS = 64, 8

TABLES = """
CREATE TABLE posting (row INTEGER PRIMARY KEY, posting_id TEXT, image TEXT, title TEXT,
                      label_group TEXT, split TEXT, key BLOB);
CREATE TABLE plan.place (place INTEGER PRIMARY KEY, row INTEGER, posting_id TEXT, image TEXT,
                         title TEXT, label_group TEXT, class_id INTEGER);
CREATE TABLE plan.split (split TEXT, first INTEGER, items INTEGER, size INTEGER);
CREATE TABLE plan.about (stamp TEXT, carried BLOB);
"""
# A class is the rank of its first posting among the first postings of all classes.
ORDER = """
CREATE TABLE first AS SELECT row, MIN(row) OVER (PARTITION BY label_group) AS first
    FROM posting WHERE split = 'train';
CREATE TABLE class (row INTEGER PRIMARY KEY, class_id INTEGER);
INSERT INTO class SELECT row, DENSE_RANK() OVER (ORDER BY first) - 1 FROM first ORDER BY row;
DROP TABLE first;
INSERT INTO plan.place (row, posting_id, image, title, label_group, class_id)
    SELECT row, posting_id, image, title, label_group, IFNULL(class_id, -1)
    FROM posting LEFT JOIN class USING (row) ORDER BY split, key, row;
"""


class Shard(NamedTuple):
    """One planned tar: its items are those at `first`, `first` + 1, ... of the plan."""

    split: str
    number: int
    first: int
    items: int


class Row(NamedTuple):
    """One posting and its slot; `row` counts the catalogue's rows from 1, class_id may be -1."""

    slot: int
    row: int
    posting_id: str
    image: str
    title: str
    label_group: str
    class_id: int


def make_plan(path: Path, catalogue: Catalogue, options: PackOptions, stamp: str) -> None:
    """Write the plan of `catalogue`; a function of (catalogue, options) alone.

    class_id counts the label groups of the train split in the order of their first posting and
    is -1 elsewhere. Inside a split the items are ordered by a keyed hash of posting_id. `stamp`
    identifies the pack that the plan is for. What was found of columns and labels is logged.
    Memory does not grow with the catalogue. Raises BadInput for one that cannot be packed.
    """
    carried = Carried()
    key = str(options.seed).encode()
    with atomic_path(path) as temporary, scratch(path.with_suffix(".postings")) as database:
        database.execute("ATTACH ? AS plan", (f"{temporary.absolute().as_uri()}?vfs=unix-none",))
        database.execute("PRAGMA plan.journal_mode=OFF")
        database.execute("PRAGMA plan.synchronous=OFF")
        database.executescript(TABLES)
        chunks = catalogue.postings(carried)
        texts = chain.from_iterable(chunk.itertuples(index=False, name=None) for chunk in chunks)
        for row, text in enumerate(texts, 1):
            hashed = blake2b(text[0].encode(), digest_size=8, key=key).digest()
            line = (row, *text, hashed)
            database.execute("INSERT INTO posting VALUES (?, ?, ?, ?, ?, ?, ?)", line)
        check_unique(database, catalogue.path)
        catalogue.log_findings(carried)
        log_label_remarks(database, "posting", catalogue.path)
        database.executescript(ORDER)
        first = 0
        split_sizes = "SELECT split, COUNT(*) FROM posting GROUP BY split ORDER BY split"
        for split, items in database.execute(split_sizes).fetchall():
            # As many items a tar as give eight shards, but 64 at least and `shard_items` at most.
            size = min(options.shard_items, max(MIN_SHARD, -(-items // SHARDS)))
            line = (split, first, items, size)
            database.execute("INSERT INTO plan.split VALUES (?, ?, ?, ?)", line)
            first += items
        about = (stamp, carried.schema().serialize().to_pybytes())
        database.execute("INSERT INTO plan.about VALUES (?, ?)", about)
        database.commit()


class Plan:
    """A plan on disk, read by any number of processes."""

    def __init__(self, path: Path, stamp: str) -> None:
        """Open the plan at `path`; raises BadInput when it is that of another pack."""
        # No process writes it any more, and its file system may have no locks.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        self._database = sqlite3.connect(uri, uri=True)
        found, carried = self._database.execute("SELECT stamp, carried FROM about").fetchone()
        if found != stamp:
            raise BadInput(f"{path}: the plan of another pack; name another folder for this one")
        self.carried: pa.Schema = pa.ipc.read_schema(pa.py_buffer(carried))

    def close(self) -> None:
        """Close the file; `contextlib.closing` calls it."""
        self._database.close()

    def __len__(self) -> int:
        """Rows of the catalogue."""
        return self._database.execute("SELECT IFNULL(SUM(items), 0) FROM split").fetchone()[0]

    def has_photos(self, more_than: int = 0) -> bool:
        """Whether more than so many postings name a photo."""
        query = "SELECT 1 FROM place WHERE image <> '' LIMIT 1 OFFSET ?"
        return self._database.execute(query, (more_than,)).fetchone() is not None

    def shards(self) -> list[Shard]:
        """All shards, by split and number."""
        return [
            Shard(split, number, first + number * size, min(size, items - number * size))
            for split, first, items, size in self._database.execute("SELECT * FROM split")
            for number in range(-(-items // size))
        ]

    def sample(self, size: int) -> list[Row]:
        """At most `size` postings, from all splits in proportion and in random order."""
        step = -(-len(self) // size)
        return [row for place in range(0, len(self), step) for row in self.rows(place, 1)]

    def rows(self, first: int, items: int) -> Iterator[Row]:
        """The postings of the places from `first` on; `slot` counts them from 0."""
        found = self._database.execute(
            "SELECT place - ?, row, posting_id, image, title, label_group, class_id "
            "FROM place WHERE place BETWEEN ? AND ? ORDER BY place",
            (first + 1, first + 1, first + items),
        )
        return map(Row._make, found)
