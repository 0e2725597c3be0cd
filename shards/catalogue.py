"""Reading a catalogue: one row a posting, from CSV, TSV, Parquet or JSON Lines, in chunks.

Memory is that of one chunk, however long the catalogue. A Parquet file is read page by page.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from shards.carried import Carried, of_type
from shards.cells import check_cells
from shards.errors import BadInput

COLUMNS = ("posting_id", "image", "title", "label_group")
CHUNK = 4_096  # rows
CHUNK_BYTES = 2**20  # of JSON Lines


def check_unique(database: sqlite3.Connection, path: Path) -> None:
    """Raise BadInput naming rows when a posting_id stands twice in table posting (row, ...)."""
    repeated = database.execute(
        "SELECT row, first, posting_id, COUNT(*) OVER () FROM (SELECT row, posting_id, "
        "MIN(row) OVER (PARTITION BY posting_id) AS first FROM posting) "
        "WHERE row > first ORDER BY row LIMIT 1"
    ).fetchone()
    if repeated:
        row, first, posting_id, rows = repeated
        raise BadInput(
            f"{path}: row {row}: posting_id {posting_id!r} stands already in row "
            f"{first} ({rows} such rows); ids must be unique"
        )


def set_aside(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Rename those columns that bear one of `names` to catalogue_NAME, made longer until free."""
    for name in names:
        if name in table:
            free = f"catalogue_{name}"
            while free in table:
                free = f"catalogue_{free}"
            table = table.rename(columns={name: free})
    return table


class Catalogue:
    """A catalogue on disk, read chunk by chunk as often as wanted."""

    def __init__(self, path: Path, columns: dict[str, str] | None = None) -> None:
        """Name the file and its columns; raises BadInput for a kind of file nobody reads."""
        self.path, self.columns = path, columns or {}
        if path.suffix.lower() not in READERS:
            raise BadInput(f"{path}: unknown kind of catalogue; use one of {', '.join(READERS)}")
        if not path.is_file():
            raise BadInput(f"{path}: not found")
        theirs = list(self.columns.values())
        for ours, name in self.columns.items():
            if ours not in COLUMNS:
                known = ", ".join(COLUMNS)
                raise BadInput(f"--columns {ours}={name}: {ours} is not one of {known}")
            if theirs.count(name) > 1:
                raise BadInput(f"--columns {ours}={name}: {name} is given to two names")

    def head(self) -> pd.DataFrame:
        """The first postings, for what can be told before anything is made."""
        return next(self.postings(Carried()))

    def postings(self, carried: Carried) -> Iterator[pd.DataFrame]:
        """Yield the text columns COLUMNS, chunk by chunk; `carried` learns of the others.

        Raises BadInput for all that can be wrong but an id that stands twice.
        """
        rows, empty = 0, 0
        for chunk in self._chunks():
            carried.note(chunk)
            # A line of JSON Lines may be the first to name a column.
            if self.path.suffix.lower() != ".jsonl":
                self._check(list(carried.types))
            table = self._texts(chunk)
            if not empty and (table.posting_id == "").any():
                empty = rows + 1 + int((table.posting_id == "").to_numpy().argmax())
            rows += len(table)
            if rows:
                yield table
        self._check(list(carried.types))
        if self.path.suffix.lower() in SEPARATORS:
            check_cells(self.path, SEPARATORS[self.path.suffix.lower()])
        if not rows:
            raise BadInput(f"{self.path}: holds no rows")
        if empty:
            raise BadInput(f"{self.path}: row {empty}: posting_id is empty")

    def frames(self, carried: pa.Schema) -> Iterator[pd.DataFrame]:
        """Yield all columns, chunk by chunk; `carried` names the file's and tells their types."""
        names = self._names(carried.names)
        for chunk in self._chunks():
            others = {
                name: of_type(chunk[field.name], field.type)
                if field.name in chunk
                else pd.Series([None] * len(chunk), chunk.index, object)
                for name, field in zip(names, carried, strict=True)
                if name not in COLUMNS
            }
            yield pd.concat([self._texts(chunk), pd.DataFrame(others, chunk.index)], axis=1)

    def schema(self, carried: pa.Schema) -> pa.Schema:
        """Names and types of the columns of `frames`."""
        names = self._names(carried.names)
        others = [(n, t) for n, t in zip(names, carried.types, strict=True) if n not in COLUMNS]
        return pa.schema([*((name, pa.string()) for name in COLUMNS), *others])

    def _names(self, found: list[str]) -> list[str]:
        """Ours for the file's names; a column that gives way to another is catalogue_NAME."""
        ours_of = {theirs: ours for ours, theirs in self.columns.items()}
        table = set_aside(pd.DataFrame(columns=found), self.columns.keys() - ours_of.keys())
        return list(table.rename(columns=ours_of).columns)

    def _texts(self, chunk: pd.DataFrame) -> pd.DataFrame:
        def text(ours: str) -> list[str]:
            theirs = self.columns.get(ours, ours)
            moved = ours not in self.columns and ours in self.columns.values()
            there = theirs in chunk and not moved
            return _text(chunk[theirs], self.path) if there else [""] * len(chunk)

        table = pd.DataFrame({ours: text(ours) for ours in COLUMNS}, chunk.index, dtype=object)
        table.loc[table.label_group.str.strip() == "", "label_group"] = ""  # blanks name no product
        return table

    def _check(self, found: list[str]) -> None:
        for ours, theirs in self.columns.items():
            if theirs not in found:
                raise BadInput(f"{self.path}: no column {theirs} (--columns {ours}={theirs})")
        named = self._names(found)
        if "posting_id" not in named:
            raise BadInput(
                f"{self.path}: no column posting_id (found: {', '.join(map(str, found))}); "
                "name it with --columns posting_id=THEIR_NAME"
            )
        if "image" not in named and "title" not in named:
            raise BadInput(f"{self.path}: neither a column image nor a column title")

    def _chunks(self) -> Iterator[pd.DataFrame]:
        try:
            for chunk in READERS[self.path.suffix.lower()](self.path):
                yield chunk.reset_index(drop=True)
        except (ValueError, OSError) as error:
            told = str(error).splitlines()[0]
            raise BadInput(f"{self.path}: cannot be read ({told})") from None


def _read_csv(path: Path, separator: str) -> Iterator[pd.DataFrame]:
    with pd.read_csv(
        path, dtype=str, keep_default_na=False, sep=separator, chunksize=CHUNK
    ) as chunks:
        for table in chunks:
            # pandas takes the first column for the names of the rows and shifts all the others.
            if not isinstance(table.index, pd.RangeIndex):
                raise ValueError(
                    "rows have more cells than the first line names; is it without a name?"
                )
            yield table


def _read_parquet(path: Path) -> Iterator[pd.DataFrame]:
    # Without a buffer a whole row group would lie in memory, which may be the whole file.
    with pq.ParquetFile(path, buffer_size=2**18, pre_buffer=False) as file:
        names = file.schema_arrow.names
        double = [name for name in names if names.count(name) > 1]
        if double:
            raise ValueError(f"two columns are named {double[0]}; rename or drop one of them")
        batches: Iterable[Any] = file.iter_batches(CHUNK)
        if not file.metadata.num_rows:
            batches = file.schema_arrow.empty_table().to_batches() or [
                pa.RecordBatch.from_pylist([], schema=file.schema_arrow)
            ]
        for batch in batches:
            # What pandas notes of an index would take that column away.
            yield pa.Table.from_batches([batch]).to_pandas(
                types_mapper=NULLABLE.get, ignore_metadata=True
            )


def _read_json_lines(path: Path) -> Iterator[pd.DataFrame]:
    # Not through pandas, which reads integers beside missing values as floats: 2^53 and above
    # would fall together.
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        while lines := file.readlines(CHUNK_BYTES):
            rows = [
                _json_row(line, at) for at, line in enumerate(lines, number + 1) if line.strip()
            ]
            number += len(lines)
            yield pd.DataFrame(rows, dtype=object)


def _json_row(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number}: not a JSON object")
    return row


# As dtype_backend="numpy_nullable" of pandas: integers beside missing values stay integers.
NULLABLE = {
    pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(), pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(), pa.uint64(): pd.UInt64Dtype(), pa.bool_(): pd.BooleanDtype(),
    pa.float32(): pd.Float32Dtype(), pa.float64(): pd.Float64Dtype(),
    pa.string(): pd.StringDtype(), pa.large_string(): pd.StringDtype(),
}  # fmt: skip
SEPARATORS = {".csv": ",", ".tsv": "\t"}
READERS = {
    ".csv": lambda path: _read_csv(path, SEPARATORS[".csv"]),
    ".tsv": lambda path: _read_csv(path, SEPARATORS[".tsv"]),
    ".parquet": _read_parquet,
    ".jsonl": _read_json_lines,
}


def _text(column: pd.Series, path: Path) -> list[str]:
    if isinstance(column.dtype, pd.StringDtype):
        return column.fillna("").tolist()

    # A group read as 17.0 beside an empty cell and as 17 elsewhere must be one group.
    def clean(value: Any) -> str:
        if not pd.api.types.is_scalar(value):
            raise BadInput(f"{path}: column {column.name} holds lists or objects, not text")
        if pd.isna(value):
            return ""
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    return [clean(value) for value in column.astype(object)]
