"""The rows of a file in chunks: CSV, TSV, Parquet, JSON Lines; encoding and separator of text."""

import codecs
import csv
import gzip
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from shards.storage.errors import BadInput

CHUNK = 4_096  # rows
CHUNK_BYTES = 2**20  # of JSON Lines
SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""By the suffix of a table of text; used unless the first line is separated by another."""
KINDS = (*SEPARATORS, ".parquet", ".jsonl")
# Those of UTF-32 begin as those of UTF-16 do, so they are compared first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GZIP = b"\x1f\x8b"
SPREADSHEETS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
"""First bytes of .xlsx and .ods, which are zip archives, and of .xls."""
SAVE = "save it as CSV UTF-8"
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


def kind_of(path: Path) -> str:
    """The suffix that shows the kind of a catalogue, in small letters and without a .gz behind."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def encoding_of(path: Path) -> str:
    """The encoding that the first bytes of a text show, else UTF-8. BadInput if it is no text."""
    with _open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(SPREADSHEETS):
        raise BadInput(f"{path}: a spreadsheet or zip archive, not text; {SAVE}")
    marked = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if marked is None and b"\0" in start:
        raise BadInput(f"{path}: not text, or UTF-16 without its mark; {SAVE}")
    return marked or "utf-8"


def open_text(path: Path) -> TextIO:
    """Open a text, also a gzipped one; bytes that its encoding does not know are surrogates."""
    encoding = encoding_of(path)
    return _open(path, "rt", encoding=encoding, errors="surrogateescape", newline="")


def _open(path: Path, mode: str, **options: Any) -> Any:
    with path.open("rb") as file:
        is_zipped = file.read(2) == GZIP
    return gzip.open(path, mode, **options) if is_zipped else path.open(mode, **options)


@dataclass(frozen=True)
class TextTable:
    """A CSV or TSV file: its separator, the line of names, and the lines above it (0 or 1)."""

    path: Path
    separator: str
    names: list[str]
    above: int

    @classmethod
    def of(cls, path: Path, wanted: Collection[str]) -> "TextTable":
        """Look at the first lines; of separators the one with the most `wanted` names counts.

        Raises BadInput when two columns have one name, of which all but the first would be lost.
        """
        csv.field_size_limit(2**31 - 1)  # for the process; pandas, which reads it too, has none
        separators, above = [SEPARATORS[kind_of(path)], ",", ";", "\t", "|"], 0
        with open_text(path) as file:
            line = file.readline()
            if line.lower().startswith("sep=") and len(line.rstrip("\r\n")) == len("sep=;"):
                separators, above = [line[4:5]], 1  # written for Excel, which reads no names there
                line = file.readline()
            while line and not line.strip():
                line = file.readline()
        tables = []
        for separator in separators:
            cells = next(csv.reader([line], delimiter=separator), [])
            tables.append(cls(path, separator, [cell.strip() for cell in cells], above))
        best = max(tables, key=lambda one: (len({*wanted} & {*one.names}), len(one.names)))
        check_names(path, filter(None, best.names))
        return best

    def chunks(self) -> Iterator[pd.DataFrame]:
        """Yield the rows as text. Raises ValueError for a table that pandas refuses or shifts."""
        with open_text(self.path) as file, pd.read_csv(
            file, dtype=str, keep_default_na=False, sep=self.separator, skiprows=self.above,
            chunksize=CHUNK,
        ) as chunks:  # fmt: skip
            for table in chunks:
                # pandas takes the first column for the names of the rows and shifts all others.
                if not isinstance(table.index, pd.RangeIndex):
                    raise ValueError(
                        "rows have more cells than the first line names; is it without a name?"
                    )
                table.columns = table.columns.str.strip()
                yield table

    def check_cells(self) -> tuple[int, int]:
        """Raise BadInput naming the first row that has not as many cells as the first line names.

        pandas accepts a row of fewer without a warning. Also for text of another encoding. Returns
        the first row with a field that spans lines, and how many such rows there are.
        """
        width, row, spanning, first, last_line = 0, -1, 0, 0, 0
        with open_text(self.path) as file:
            for _ in range(self.above):
                file.readline()
            reader = csv.reader(file, delimiter=self.separator)
            for cells in reader:
                lines, last_line = reader.line_num - last_line, reader.line_num
                if not cells or (len(cells) == 1 and not cells[0].strip()):
                    continue  # pandas skips blank lines
                row += 1
                width = width or len(cells)
                if lines > 1 and row:
                    spanning, first = spanning + 1, first or row
                if len(cells) == width and "".join(cells).isascii():
                    continue
                where = f"{self.path}: row {row} (line {last_line + self.above})"
                check_encoding(where, cells)
                if len(cells) != width:
                    remedy = "was the file cut? Give every row all its cells"
                    if len(cells) > width:
                        remedy = f"put text that holds {self.separator!r} into quotes"
                    raise BadInput(
                        f"{where}: {len(cells)} cells where the first line names {width}; {remedy}"
                    )
        return first, spanning


def check_encoding(where: str, texts: Iterable[str]) -> None:
    """Raise BadInput quoting the first text with bytes that are not of the file's encoding."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            written = text.encode("utf-8", "surrogateescape")[:60]
            raise BadInput(
                f"{where}: not UTF-8 (it would be {written.decode('cp1252', 'replace')!r} in "
                f"Windows-1252); {SAVE}, or name its encoding: iconv -f CP1252 -t UTF-8 FILE > NEW"
            ) from None


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise BadInput when two columns have one name."""
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise BadInput(f"{path}: two columns are named {repeated[0]}; rename or drop one of them")


def parquet_chunks(path: Path) -> Iterator[pd.DataFrame]:
    """Yield the rows of a Parquet file."""
    # Without a buffer a row group, which may be the complete file, would lie in memory.
    with pq.ParquetFile(path, buffer_size=2**18, pre_buffer=False) as file:
        check_names(path, file.schema_arrow.names)
        batches: Iterable[Any] = file.iter_batches(CHUNK)
        if not file.metadata.num_rows:
            batches = [pa.RecordBatch.from_pylist([], schema=file.schema_arrow)]
        for batch in batches:
            # pandas's own notes on an index would take that column away.
            yield pa.Table.from_batches([batch]).to_pandas(
                types_mapper=NULLABLE.get, ignore_metadata=True
            )


def json_chunks(path: Path) -> Iterator[pd.DataFrame]:
    """Yield the rows of JSON Lines; raises BadInput naming a line that is no object."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(named := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in it")
        return named

    # Not through pandas, which reads integers beside missing values as floats: ids above 2^53
    # would become equal.
    number = 0
    with open_text(path) as file:
        while lines := file.readlines(CHUNK_BYTES):
            rows = []
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                check_encoding(f"{path}: line {number}", [line])
                try:
                    row = json.loads(line, object_pairs_hook=without_repeats)
                    if "\\ud" in line.lower():
                        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair fails
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number}: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number}: not a JSON object")
                rows.append(row)
            yield pd.DataFrame(rows, dtype=object)
