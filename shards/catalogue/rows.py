"""Reading a catalogue: one row a posting, from CSV, TSV, Parquet or JSON Lines, in chunks.

Memory is that of one chunk, however long the catalogue. A Parquet file is read page by page.
"""

import csv
import json
import logging
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from shards.catalogue.columns import (
    COLUMNS,
    SPLIT,
    check_columns,
    check_image_column,
    describe_columns,
    missed_columns,
    missing_columns,
    set_aside,
)
from shards.catalogue.placeholders import CUT_NUMBER, label_of, value_of
from shards.catalogue.readers import (
    KINDS,
    SEPARATORS,
    TextTable,
    json_chunks,
    kind_of,
    parquet_chunks,
)
from shards.catalogue.split import SPLIT_NAMES, split_of
from shards.storage.errors import BadInput

EXACT = 2**53  # integers up to here are floats without loss
UNREADABLE = (ValueError, OSError, EOFError, csv.Error, zlib.error, pa.ArrowException)
"""What the readers raise for a file that is not of its kind, cut or damaged."""
log = logging.getLogger("shards")


@dataclass
class Carried:
    """What was seen of each column of a catalogue: the types of its chunks, its largest integer.

    None is a chunk of values without a common type, as only JSON Lines can hold: it becomes text.
    """

    types: dict[str, set[pa.DataType | None]] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    placeholders: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Cells by (our column, what they hold) that were taken as empty."""
    cut_labels: int = 0
    """Labels of which a spreadsheet kept some digits."""
    cut_label: str = ""
    """The first of them, with its row."""

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
        """`columns` has the file's names of COLUMNS and SPLIT; BadInput if malformed."""
        self.path, self.columns, self.kind = path, columns or {}, kind_of(path)
        if path.is_dir():
            raise BadInput(
                f"{path}: a folder, and a catalogue is one file; write its parts into one, as by "
                "pandas.read_parquet('FOLDER').to_parquet('catalogue.parquet')"
            )
        if self.kind not in KINDS:
            raise BadInput(f"{path}: unknown kind of catalogue; use one of {', '.join(KINDS)}")
        if not path.is_file():
            raise BadInput(f"{path}: not found")
        known, theirs = (*COLUMNS, SPLIT), list(self.columns.values())
        for ours, name in self.columns.items():
            if ours not in known:
                raise BadInput(f"--columns {ours}={name}: {ours} is not one of {', '.join(known)}")
            if theirs.count(name) > 1:
                raise BadInput(f"--columns {ours}={name}: {name} is given to two names")

    def postings(self, carried: Carried) -> Iterator[pd.DataFrame]:
        """Yield COLUMNS as text and SPLIT (one of SPLITS), chunk by chunk.

        Notes in `carried` what was seen. Raises BadInput for all but a repeated id.
        """
        rows, empty = 0, 0
        for chunk in self._chunks():
            carried.note(chunk)
            # Any line of JSON Lines may be the first to name a column.
            if self.kind != ".jsonl":
                check_columns(self.path, list(carried.types), self.columns)
            table = self._texts(chunk, rows, carried)
            table[SPLIT] = self._splits(chunk, table.label_group, rows)
            if not empty and (table.posting_id == "").any():
                empty = rows + 1 + int((table.posting_id == "").to_numpy().argmax())
            rows += len(table)
            if rows:
                yield table
        check_columns(self.path, list(carried.types), self.columns)
        if self.kind in SEPARATORS:
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

        names, rows = self._names(carried.names), 0
        for chunk in self._chunks():
            others, missing = {}, pd.Series([None] * len(chunk), chunk.index, object)
            for name, theirs in zip(names, carried, strict=True):
                if name not in COLUMNS:
                    others[name] = column = chunk.get(theirs.name, missing)
                    if column.dtype == object and pa.types.is_string(theirs.type):
                        others[name] = column.map(text).astype(object)
            texts = self._texts(chunk, rows, Carried())
            rows += len(chunk)
            yield pd.concat([texts, pd.DataFrame(others, chunk.index)], axis=1)

    def schema(self, carried: pa.Schema) -> pa.Schema:
        """Names and types of the columns of `frames`."""
        names = self._names(carried.names)
        others = [(n, t) for n, t in zip(names, carried.types, strict=True) if n not in COLUMNS]
        return pa.schema([*((name, pa.string()) for name in COLUMNS), *others])

    def check_image_column(self, found: list[str], images: Path | None) -> None:
        """Raise BadInput when there are photos in `images` and no column names them."""
        check_image_column(self.path, found, self.columns, images)

    def log_findings(self, carried: Carried) -> None:
        """Log which columns were found, and warn of cells that are not taken as they are.

        carried: of all postings.
        """
        found = list(carried.types)
        text = describe_columns(found, self.columns)
        if self.kind in SEPARATORS and self._table.separator != SEPARATORS[self.kind]:
            text += f"; separated by {self._table.separator!r}"
        log.info("%s: %s", self.path, text)
        if missed := missed_columns(found, self.columns):
            log.warning("%s: %s", self.path, missed)
        for (column, text), cells in carried.placeholders.items():
            log.warning(
                "%s: %s %r in %d rows: taken as empty, as programs write it for a missing value",
                *(self.path, column, text, cells),
            )
        if carried.cut_labels:
            log.warning(
                "%s: %d labels are numbers of which a spreadsheet kept some digits, for example "
                "%s: different products may look the same; write that column as text",
                *(self.path, carried.cut_labels, carried.cut_label),
            )

    def _names(self, found: list[str]) -> list[str]:
        """Our names for the file's; a column that is replaced by another is catalogue_NAME."""
        ours_of = {theirs: ours for ours, theirs in self.columns.items()}
        table = set_aside(pd.DataFrame(columns=found), self.columns.keys() - ours_of.keys())
        return list(table.rename(columns=ours_of).columns)

    def _texts(self, chunk: pd.DataFrame, rows: int, carried: Carried) -> pd.DataFrame:
        """COLUMNS of a chunk behind so many `rows` as text; empty where a value is missing."""
        texts = {ours: self._column(chunk, ours, rows) for ours in COLUMNS}
        for ours, read in (("image", value_of), ("title", value_of), ("label_group", label_of)):
            written = texts[ours]
            texts[ours] = values = list(map(read, written))
            emptied = (one for one, value in zip(written, values, strict=True) if not value)
            carried.placeholders.update((ours, one) for one in emptied if one.strip())
        for row, label in enumerate(texts["label_group"], rows + 1):
            if CUT_NUMBER.fullmatch(label):
                carried.cut_labels += 1
                carried.cut_label = carried.cut_label or f"{label} in row {row}"
        return pd.DataFrame(texts, chunk.index, dtype=object)

    def _column(self, chunk: pd.DataFrame, ours: str, rows: int) -> list[str]:
        """One of our columns as text, empty where a value or the column is missing."""
        theirs = self.columns.get(ours, ours)
        if ours in missing_columns(list(chunk), self.columns):
            return [""] * len(chunk)
        if isinstance(chunk[theirs].dtype, pd.StringDtype):
            return chunk[theirs].fillna("").tolist()
        values = enumerate(chunk[theirs].astype(object), rows + 1)
        return [self._text(value, theirs, row) for row, value in values]

    def _text(self, value: Any, column: str, row: int) -> str:
        if not pd.api.types.is_scalar(value):
            raise BadInput(
                f"{self.path}: row {row}: column {column} holds lists or objects, not text"
            )
        if pd.isna(value):
            return ""
        if isinstance(value, bytes):  # as some programs store text in Parquet
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise BadInput(
                    f"{self.path}: row {row}: column {column} holds bytes that are not UTF-8 "
                    f"({value[:12]!r}); store text, or the names of files"
                ) from None
        # A group read as 17.0 beside an empty cell and as 17 elsewhere must be one group.
        is_integer = (isinstance(value, float) and value.is_integer()) or (
            isinstance(value, Decimal) and value == value.to_integral_value()
        )
        return str(int(value)) if is_integer else str(value)

    def _splits(self, chunk: pd.DataFrame, labels: pd.Series, rows: int) -> list[str]:
        """The split of every posting: that of the file where it names one, else by the label."""
        if SPLIT in missing_columns(list(chunk), self.columns):
            return list(map(split_of, labels))
        splits = []
        cells = zip(labels, self._column(chunk, SPLIT, rows), strict=True)
        for row, (label, written) in enumerate(cells, rows + 1):
            name = value_of(written).strip().lower()
            if name and (name not in SPLIT_NAMES or (label and SPLIT_NAMES[name] == "unlabelled")):
                raise BadInput(
                    f"{self.path}: row {row}: split {written!r} is none of train, val and test; "
                    "correct it, leave it empty (then the label decides), or give the column "
                    "another name"
                )
            splits.append(SPLIT_NAMES[name] if name and label else split_of(label))
        return splits

    @cached_property
    def _table(self) -> TextTable:
        """How the text of a CSV or TSV is to be read."""
        return TextTable.of(self.path, {*COLUMNS, SPLIT, *self.columns.values()})

    def _check_cells(self) -> None:
        """Raise BadInput naming the first row of a CSV or TSV that is not as wide as its names.

        Warns of fields that span lines: they are legal, but a quote that is never closed swallows
        rows in the same way.
        """
        first, spanning = self._table.check_cells()
        if spanning:
            log.warning(
                "%s: row %d holds a field of several lines (%d such rows): where none is meant a "
                "quote was never closed, and rows behind it are in it",
                *(self.path, first, spanning),
            )

    def _chunks(self) -> Iterator[pd.DataFrame]:
        is_text = self.kind in SEPARATORS
        try:
            others = json_chunks if self.kind == ".jsonl" else parquet_chunks
            for chunk in self._table.chunks() if is_text else others(self.path):
                yield chunk.reset_index(drop=True)
        except UNREADABLE as error:
            if is_text:
                with suppress(*UNREADABLE):
                    self._check_cells()  # names the row, where pandas names a line at most
            reason = (str(error) or type(error).__name__).splitlines()[0]
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
