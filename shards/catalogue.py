"""Reading a catalogue: one row a posting, from CSV, TSV, Parquet or JSON Lines."""

from pathlib import Path

import pandas as pd

from shards.errors import BadInput

COLUMNS = ("posting_id", "image", "title", "label_group")
READERS = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".tsv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False, sep="\t"),
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
}


def read_catalogue(path: Path, columns: dict[str, str] | None = None) -> pd.DataFrame:
    """Read and check a catalogue.

    `columns` maps our names to the file's (`{"posting_id": "sku"}`). Returns text columns
    posting_id, image, title, label_group ("" where empty or missing) and then every other
    column of the file as it is. Raises BadInput naming the file and the row.
    """
    table = _load(path)
    for ours, theirs in (columns or {}).items():
        _rename(table, path, ours, theirs)
    if "posting_id" not in table:
        names = ", ".join(map(str, table.columns))
        raise BadInput(
            f"{path}: no column posting_id (found: {names}); "
            "name it with --columns posting_id=THEIR_NAME"
        )
    if "image" not in table and "title" not in table:
        raise BadInput(f"{path}: neither a column image nor a column title")
    for name in COLUMNS:
        table[name] = _text(table[name]) if name in table else ""
    _check_ids(table, path)
    others = [name for name in table.columns if name not in COLUMNS]
    return table[[*COLUMNS, *others]].reset_index(drop=True)


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


def _rename(table: pd.DataFrame, path: Path, ours: str, theirs: str) -> None:
    if ours not in COLUMNS:
        raise BadInput(f"--columns {ours}={theirs}: {ours} is not one of {', '.join(COLUMNS)}")
    if theirs not in table:
        raise BadInput(f"{path}: no column {theirs} (--columns {ours}={theirs})")
    if ours != theirs:
        table.drop(columns=[ours], errors="ignore", inplace=True)
        table.rename(columns={theirs: ours}, inplace=True)


def _text(column: pd.Series) -> pd.Series:
    # A group read as 17.0 beside an empty cell and as 17 elsewhere must be one group.
    def clean(value: object) -> str:
        if value is None or value is pd.NA or value != value:
            return ""
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)

    return column.map(clean).astype(object)


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
