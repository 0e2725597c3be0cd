"""Reading a catalogue: one row a posting, from CSV, TSV, Parquet or JSON Lines, in chunks.

Memory is that of one chunk, however long the catalogue. A Parquet file is read page by page.
"""

import csv
import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.storage.errors import BadInput

COLUMNS = ("posting_id", "image", "title", "label_group")
CHUNK = 4_096  # rows
CHUNK_BYTES = 2**20  # of JSON Lines
EXACT = 2**53  # integers up to here are floats without loss
log = logging.getLogger("shards")


@dataclass
class Carried:
    """What was seen of each column of a catalogue: the types of its chunks, its largest integer.

    None is a chunk of values without a common type, as only JSON Lines can hold: it becomes text.
    """

    types: dict[str, set[pa.DataType | None]] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def note(self, chunk: pd.DataFrame) -> None:
        """Add the types of the columns of one chunk."""
        for name in chunk.columns:
            types = self.types.setdefault(name, set())
            column = chunk[name]
            kinds = set(map(type, column)) if column.dtype == object else set()
            # pyarrow takes true for 1.0 behind a number, and refuses it where none stands.
            is_mixed = kinds & {dict, list} or (bool in kinds and kinds & {int, float})
            try:
                values = None if is_mixed else pa.array(column, from_pandas=True)
            except (pa.ArrowException, OverflowError):
                values = None
            if values is None:
                types.add(None)
                continue
            kind = values.type
            if pa.types.is_dictionary(kind):  # its integers grow with what a chunk happens to hold
                kind = pa.dictionary(pa.int32(), kind.value_type, kind.ordered)
            types.add(kind)
            if kind == pa.int64():
                ends = pc.min_max(values).as_py().values()
                seen = max((abs(end) for end in ends if end is not None), default=0)
                self.largest[name] = max(self.largest.get(name, 0), seen)

    def schema(self) -> pa.Schema:
        """A type for each column: what pyarrow infers of all its values, text if they disagree."""
        fields = []
        for name, types in self.types.items():
            known, kind = types - {pa.null()}, pa.string()
            if known == {pa.int64(), pa.float64()} and self.largest[name] <= EXACT:
                kind = pa.float64()
            elif None not in known and len(known) <= 1:
                kind = next(iter(known), pa.null())
            elif None not in known and all(pa.types.is_decimal(one) for one in known):
                schemas = [pa.schema([(name, one)]) for one in known]
                kind = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            fields.append((name, kind))
        return pa.schema(fields)


class Catalogue:
    """A catalogue on disk, read chunk by chunk, any number of times."""

    def __init__(self, path: Path, columns: dict[str, str] | None = None) -> None:
        """`columns` has the file's names of COLUMNS; BadInput if malformed or of unknown kind."""
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

    def postings(self, carried: Carried) -> Iterator[pd.DataFrame]:
        """Yield COLUMNS as text, noting types in `carried`; BadInput for all but a repeated id."""
        rows, empty = 0, 0
        for chunk in self._chunks():
            carried.note(chunk)
            # Any line of JSON Lines may be the first to name a column.
            if self.path.suffix.lower() != ".jsonl":
                self._check_names(list(carried.types))
            table = self._texts(chunk)
            if not empty and (table.posting_id == "").any():
                empty = rows + 1 + int((table.posting_id == "").to_numpy().argmax())
            rows += len(table)
            if rows:
                yield table
        self._check_names(list(carried.types))
        if self.path.suffix.lower() in SEPARATORS:
            self._check_cells()
        if not rows:
            raise BadInput(f"{self.path}: holds no rows")
        if empty:
            raise BadInput(f"{self.path}: row {empty}: posting_id is empty")

    def frames(self, carried: pa.Schema) -> Iterator[pd.DataFrame]:
        """Yield all columns, chunk by chunk; `carried` has the file's names and their types."""

        def text(value: Any) -> str | None:
            if isinstance(value, str):
                return value
            missing = pd.api.types.is_scalar(value) and pd.isna(value)
            return None if missing else json.dumps(value, ensure_ascii=False, default=str)

        names = self._names(carried.names)
        for chunk in self._chunks():
            others, missing = {}, pd.Series([None] * len(chunk), chunk.index, object)
            for name, theirs in zip(names, carried, strict=True):
                if name not in COLUMNS:
                    others[name] = column = chunk.get(theirs.name, missing)
                    if column.dtype == object and pa.types.is_string(theirs.type):
                        others[name] = column.map(text).astype(object)
            yield pd.concat([self._texts(chunk), pd.DataFrame(others, chunk.index)], axis=1)

    def schema(self, carried: pa.Schema) -> pa.Schema:
        """Names and types of the columns of `frames`."""
        names = self._names(carried.names)
        others = [(n, t) for n, t in zip(names, carried.types, strict=True) if n not in COLUMNS]
        return pa.schema([*((name, pa.string()) for name in COLUMNS), *others])

    def _names(self, found: list[str]) -> list[str]:
        """Our names for the file's; a column that is replaced by another is catalogue_NAME."""
        ours_of = {theirs: ours for ours, theirs in self.columns.items()}
        table = set_aside(pd.DataFrame(columns=found), self.columns.keys() - ours_of.keys())
        return list(table.rename(columns=ours_of).columns)

    def _texts(self, chunk: pd.DataFrame) -> pd.DataFrame:
        """COLUMNS of a chunk as text, empty where a value or a column is missing."""
        texts = {}
        for ours in COLUMNS:
            theirs = self.columns.get(ours, ours)
            is_renamed = ours not in self.columns and ours in self.columns.values()
            if theirs not in chunk or is_renamed:
                texts[ours] = [""] * len(chunk)
            elif isinstance(chunk[theirs].dtype, pd.StringDtype):
                texts[ours] = chunk[theirs].fillna("").tolist()
            else:
                texts[ours] = [self._text(value, theirs) for value in chunk[theirs].astype(object)]
        table = pd.DataFrame(texts, chunk.index, dtype=object)
        table.loc[table.label_group.str.strip() == "", "label_group"] = ""  # blanks name no product
        return table

    def _text(self, value: Any, column: str) -> str:
        if not pd.api.types.is_scalar(value):
            raise BadInput(f"{self.path}: column {column} holds lists or objects, not text")
        if pd.isna(value):
            return ""
        # A group read as 17.0 beside an empty cell and as 17 elsewhere must be one group.
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    def _check_names(self, found: list[str]) -> None:
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

    def _check_cells(self) -> None:
        """Raise BadInput naming the first row of fewer cells than the first line has names.

        pandas accepts such a row without a warning. Warns of fields that span lines: they are
        legal, but a quote that is never closed swallows rows in the same way.
        """
        csv.field_size_limit(2**31 - 1)  # for the process; pandas, which reads it too, has none
        width, row, spanning, first, last_line = 0, -1, 0, 0, 0
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=SEPARATORS[self.path.suffix.lower()])
            for cells in reader:
                lines, last_line = reader.line_num - last_line, reader.line_num
                if not cells or (len(cells) == 1 and not cells[0].strip()):
                    continue  # pandas skips blank lines
                row += 1
                width = width or len(cells)
                if len(cells) < width:
                    raise BadInput(
                        f"{self.path}: row {row} (line {last_line}): {len(cells)} cells where the "
                        f"first line names {width}; was the file cut? Give every row all its "
                        "cells"
                    )
                if lines > 1 and row:
                    spanning, first = spanning + 1, first or row
        if spanning:
            log.warning(
                "%s: row %d holds a field of several lines (%d such rows): where none is meant a "
                "quote was never closed, and rows behind it are in it",
                self.path,
                first,
                spanning,
            )

    def _chunks(self) -> Iterator[pd.DataFrame]:
        try:
            for chunk in READERS[self.path.suffix.lower()](self.path):
                yield chunk.reset_index(drop=True)
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"{self.path}: cannot be read ({reason})") from None


def check_unique(database: sqlite3.Connection, path: Path) -> None:
    """Raise BadInput naming rows when a posting_id is repeated in table posting (row, ...)."""
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
    """Rename columns called one of `names` to catalogue_NAME, prefixed until the name is free."""
    for name in names:
        if name in table:
            free = f"catalogue_{name}"
            while free in table:
                free = f"catalogue_{free}"
            table = table.rename(columns={name: free})
    return table


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
    # Without a buffer a row group, which may be the complete file, would lie in memory.
    with pq.ParquetFile(path, buffer_size=2**18, pre_buffer=False) as file:
        names = file.schema_arrow.names
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"two columns are named {repeated[0]}; rename or drop one of them")
        batches: Iterable[Any] = file.iter_batches(CHUNK)
        if not file.metadata.num_rows:
            batches = [pa.RecordBatch.from_pylist([], schema=file.schema_arrow)]
        for batch in batches:
            # pandas's own notes on an index would take that column away.
            yield pa.Table.from_batches([batch]).to_pandas(
                types_mapper=NULLABLE.get, ignore_metadata=True
            )


def _read_json_lines(path: Path) -> Iterator[pd.DataFrame]:
    # Not through pandas, which reads integers beside missing values as floats: ids above 2^53
    # would become equal.
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        while lines := file.readlines(CHUNK_BYTES):
            rows = []
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if "\\ud" in line.lower():
                        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair fails
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number}: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: not a JSON object")
                rows.append(row)
            yield pd.DataFrame(rows, dtype=object)


# As dtype_backend="numpy_nullable" of pandas: integers beside missing values stay integers.
NULLABLE = {
    pa.bool_(): pd.BooleanDtype(),
    pa.float32(): pd.Float32Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.string(): pd.StringDtype(),
    pa.large_string(): pd.StringDtype(),
} | {
    getattr(pa, name.lower())(): getattr(pd, f"{name}Dtype")()
    for name in ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
READERS: dict[str, Callable[[Path], Iterator[pd.DataFrame]]] = {
    suffix: partial(_read_csv, separator=separator) for suffix, separator in SEPARATORS.items()
} | {".parquet": _read_parquet, ".jsonl": _read_json_lines}
