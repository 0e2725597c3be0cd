"""Our columns among those of a file: which are there, which may be there under another name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import pandas as pd

from shards.storage.errors import BadInput

COLUMNS = ("posting_id", "image", "title", "label_group")
SPLIT = "split"
MEANT = {
    "posting_id": "id sku uid uuid guid asin posting listing item offer ad advert key",
    "image": "image images img photo photos picture pic filename file filepath path url foto bild",
    "title": "title titles name text caption description desc headline heading judul titel nama",
    "label_group": "label labels group product cluster class target category gtin ean upc mpn "
    "entity match duplicate",
    SPLIT: "split fold subset partition dataset",
}
"""Words in the names that others give to our columns."""


def check_columns(path: Path, found: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raise BadInput when a file's columns, named `found`, lack what a catalogue needs.

    `columns` has the file's names of ours where they differ.
    """
    listed = ", ".join(map(str, found))
    for ours, theirs in columns.items():
        if theirs not in found:
            near = get_close_matches(theirs, map(str, found), 1)
            hint = f"; is it {near[0]}?" if near else ""
            raise BadInput(
                f"{path}: no column {theirs} (--columns {ours}={theirs}; found: {listed}){hint}"
            )
    missing = missing_columns(found, columns)
    if "posting_id" in missing:
        raise BadInput(
            f"{path}: no column posting_id (found: {listed}); name it with "
            f"{_suggestion(found, columns, 'posting_id')}"
        )
    if {"image", "title"} <= {*missing}:
        raise BadInput(
            f"{path}: neither a column image nor a column title (found: {listed}); name one with "
            f"{_suggestion(found, columns, 'title')}"
        )


def check_image_column(
    path: Path, found: Sequence[str], columns: Mapping[str, str], images: Path | None
) -> None:
    """Raise BadInput when a folder of photos is given and no column names them."""
    if images is not None and "image" in missing_columns(found, columns):
        raise BadInput(
            f"{path}: no column image, which names the photos below --images {images} (found: "
            f"{', '.join(map(str, found))}); name it with "
            f"{_suggestion(found, columns, 'image')}, or leave --images away"
        )


def _suggestion(found: Sequence[str], columns: Mapping[str, str], *needed: str) -> str:
    """The option --columns that gives our missing columns their likely names, `needed` always."""
    names = {**columns} | dict.fromkeys(needed, "THEIR_NAME") | meant_columns(found, columns)
    return f"--columns {','.join(f'{ours}={theirs}' for ours, theirs in names.items())}"


def describe_columns(found: Sequence[str], columns: Mapping[str, str]) -> str:
    """Which of our columns are there, which are not, and which of the file's are not used."""
    missing = missing_columns(found, columns)
    named = [
        f"{ours} (their {columns[ours]})" if columns.get(ours, ours) != ours else ours
        for ours in (*COLUMNS, SPLIT)
        if ours not in missing
    ]
    parts = [f"columns {', '.join(named)}"]
    for what, names in (("not found", missing), ("not used", unused_columns(found, columns))):
        if names:
            parts.append(f"{what}: {', '.join(map(str, names))}")
    return "; ".join(parts)


def missed_columns(found: Sequence[str], columns: Mapping[str, str]) -> str:
    """A warning of columns that seem to be there under another name; empty where none is."""
    meant = meant_columns(found, columns)
    if not meant:
        return ""
    likely = ", ".join(f"{theirs} seems to be {ours}" for ours, theirs in meant.items())
    return f"{likely}, and is not used; to use it add {_suggestion(found, columns)}"


def missing_columns(found: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Those of our columns that the file does not have, under their names or those given."""
    return [
        ours
        for ours in (*COLUMNS, SPLIT)
        if columns.get(ours, ours) not in found
        or (ours not in columns and ours in columns.values())
    ]


def unused_columns(found: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """The file's columns that are none of ours; they are carried along."""
    used = {columns.get(ours, ours) for ours in (*COLUMNS, SPLIT)}
    return [name for name in found if name not in used]


def meant_columns(found: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Columns of the file whose names suggest that they are the missing ones of ours."""
    meant: dict[str, str] = {}
    for ours in missing_columns(found, columns):
        words, best = MEANT[ours].split(), None
        for name in unused_columns(found, columns):
            # productId, product-id and PRODUCT_ID are the words product and id.
            parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W\d_]+", str(name))
            parts = [part.lower() for part in parts]
            known = [words.index(part) for part in parts if part in words]
            joined = "".join(parts) == ours.replace("_", "")
            if (known or joined) and name not in meant.values():
                # Our own name first, then that of the fewest other words: id before product_id.
                rank = (not joined, len(parts) - len(known), min(known, default=0))
                best = min(best or (rank, name), (rank, name))
        if best:
            meant[ours] = best[1]
    return meant


def set_aside(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Rename columns called one of `names` to catalogue_NAME, prefixed until the name is free."""
    for name in names:
        if name in table:
            free = f"catalogue_{name}"
            while free in table:
                free = f"catalogue_{free}"
            table = table.rename(columns={name: free})
    return table
