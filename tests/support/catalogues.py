"""Small catalogues: written as text, read as a pack reads them."""

import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

import pandas as pd

from shards.catalogue.rows import Carried, Catalogue, check_unique


def read_catalogue(path: Path, columns: dict[str, str] | None = None) -> pd.DataFrame:
    """All of a catalogue, checked and read as a pack does it."""
    catalogue, carried, rows = Catalogue(path, columns), Carried(), count(1)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE posting (row INTEGER PRIMARY KEY, posting_id TEXT)")
        for chunk in catalogue.postings(carried):
            ids = zip(chunk.posting_id, rows, strict=False)
            database.executemany("INSERT INTO posting (posting_id, row) VALUES (?, ?)", ids)
        check_unique(database, path)
    return pd.concat(catalogue.frames(carried.schema()), ignore_index=True)


def write_text(path: Path, content: str | bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def labelled_text(columns: str = "posting_id,image,title,label_group") -> str:
    """A CSV of ten postings: products 0 and 2 to train on, 3 and 8 of val, 1 of test."""
    rows = [f"{n},{n}.jpg,title {n},{product}" for n, product in enumerate("0022338811")]
    return "\n".join([columns, *rows, ""])
