"""Reading a catalogue: one row a posting, from CSV, TSV, Parquet or JSON Lines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from shards.errors import BadInput

COLUMNS = ("posting_id", "image", "title", "label_group")


def read_catalogue(path: Path, columns: dict[str, str] | None = None) -> pd.DataFrame:
    """Read and check a catalogue.

    `columns` maps our names to the file's (`{"posting_id": "sku"}`). Returns text columns
    posting_id, image, title, label_group ("" where empty or missing) and then every other
    column of the file as it is, or as text where its values are of several types. A column
    whose name `columns` gives to another is carried as catalogue_NAME. Raises BadInput naming
    the file and the row.
    """
    table = _renamed(_load(path), path, columns or {})
    if "posting_id" not in table:
        names = ", ".join(map(str, table.columns))
        raise BadInput(
            f"{path}: no column posting_id (found: {names}); "
            "name it with --columns posting_id=THEIR_NAME"
        )
    if "image" not in table and "title" not in table:
        raise BadInput(f"{path}: neither a column image nor a column title")
    for name in COLUMNS:
        table[name] = _text(table[name], path) if name in table else ""
    _check_ids(table, path)
    others = [name for name in table.columns if name not in COLUMNS]
    for name in others:
        table[name] = _of_one_type(table[name])
    return table[[*COLUMNS, *others]].reset_index(drop=True)


def set_aside(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Rename those columns that bear one of `names` to catalogue_NAME, made longer until free."""
    for name in names:
        if name in table:
            free = f"catalogue_{name}"
            while free in table:
                free = f"catalogue_{free}"
            table = table.rename(columns={name: free})
    return table


def _load(path: Path) -> pd.DataFrame:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: unknown kind of catalogue; use one of {', '.join(READERS)}")
    if not path.is_file():
        raise BadInput(f"{path}: not found")
    try:
        return reader(path)
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def _read_csv(path: Path, separator: str) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=str, keep_default_na=False, sep=separator)
    # pandas would take the first column for the names of the rows and shift all the others.
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("rows have more cells than the first line names; is it without a name?")
    return table


def _read_json_lines(path: Path) -> pd.DataFrame:
    # Not through pandas, which reads integers beside missing values as floats: 2^53 and above
    # would fall together.
    with path.open(encoding="utf-8-sig") as lines:
        rows = [_json_row(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    return pd.DataFrame(rows, dtype=object)


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


READERS = {
    ".csv": lambda path: _read_csv(path, ","),
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".parquet": lambda path: pd.read_parquet(path, dtype_backend="numpy_nullable"),
    ".jsonl": _read_json_lines,
}


def _renamed(table: pd.DataFrame, path: Path, columns: dict[str, str]) -> pd.DataFrame:
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise BadInput(f"--columns {ours}={theirs}: {ours} is not one of {', '.join(COLUMNS)}")
        if theirs not in table:
            raise BadInput(f"{path}: no column {theirs} (--columns {ours}={theirs})")
        if list(columns.values()).count(theirs) > 1:
            raise BadInput(f"--columns {ours}={theirs}: {theirs} is given to two names")
    table = set_aside(table, columns.keys() - columns.values())
    return table.rename(columns={theirs: ours for ours, theirs in columns.items()})


def _text(column: pd.Series, path: Path) -> pd.Series:
    # A group read as 17.0 beside an empty cell and as 17 elsewhere must be one group.
    def clean(value: Any) -> str:
        if not pd.api.types.is_scalar(value):
            raise BadInput(f"{path}: column {column.name} holds lists or objects, not text")
        if pd.isna(value):
            return ""
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    return column.astype(object).map(clean).astype(object)


def _of_one_type(column: pd.Series) -> pd.Series:
    # JSON Lines may hold values of several types in one column, items.parquet may not.
    if column.dtype != object:
        return column
    try:
        if not column.map(lambda value: isinstance(value, (dict, list))).any():
            pa.array(column, from_pandas=True)
            return column
    except (pa.ArrowException, OverflowError):
        pass
    return column.map(_as_text)


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    missing = pd.api.types.is_scalar(value) and pd.isna(value)
    return None if missing else json.dumps(value, ensure_ascii=False, default=str)


def _check_ids(table: pd.DataFrame, path: Path) -> None:
    if not len(table):
        raise BadInput(f"{path}: holds no rows")
    empty = table.index[table.posting_id == ""]
    if len(empty):
        raise BadInput(f"{path}: row {empty[0] + 1}: posting_id is empty")
    again = table.index[table.posting_id.duplicated()]
    if len(again):
        row = again[0]
        first = table.index[table.posting_id == table.posting_id[row]][0]
        raise BadInput(
            f"{path}: row {row + 1}: posting_id {table.posting_id[row]!r} stands already in row "
            f"{first + 1} ({len(again)} such rows); ids must be unique"
        )
