"""Photos that appear where they should not: in two splits, or in two label groups."""

import numpy as np
import pandas as pd

# Either one says that two photos are the same: the bytes, or the picture.
PHOTO_KEYS = ("sha256", "phash")
# Nothing is learned from these, so a photo shared with them gives nothing away.
UNLEARNED = "unlabelled"


def twins(table: pd.DataFrame) -> pd.DataFrame:
    """Which items share their photo with an item of another split or another label group.

    table: columns split, label_group, sha256, phash; each may be missing or hold empty values,
    and an empty value equals nothing and differs from nothing. The unlabelled split counts as
    empty. Returns bool columns crosses_split and crosses_group with the index of the table.
    """
    splits = _codes(table, "split", unknown=UNLEARNED)
    labels = _codes(table, "label_group")
    crosses_split = np.zeros(len(table), dtype=bool)
    crosses_group = np.zeros(len(table), dtype=bool)
    for name in PHOTO_KEYS:
        photos = _codes(table, name)
        crosses_split |= _differs_within(photos, splits)
        crosses_group |= _differs_within(photos, labels)
    found = {"crosses_split": crosses_split, "crosses_group": crosses_group}
    return pd.DataFrame(found, index=table.index)


def _codes(table: pd.DataFrame, name: str, unknown: str = "") -> np.ndarray:
    """Distinct values as 0, 1, ...; -1 for an empty one, and everywhere without the column."""
    if name not in table:
        return np.full(len(table), -1)
    values = table[name].astype(object)
    return pd.factorize(values.mask(values.isin(["", unknown])))[0]


def _differs_within(photos: np.ndarray, values: np.ndarray) -> np.ndarray:
    """True where some item of the same photo has another value; both known."""
    known = (photos >= 0) & (values >= 0)
    by_photo = pd.Series(values[known]).groupby(photos[known])
    differs = np.zeros(len(photos), dtype=bool)
    differs[known] = (by_photo.transform("min") != by_photo.transform("max")).to_numpy()
    return differs
