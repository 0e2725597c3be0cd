"""Which items are scored: labelled, of one split, without a near-duplicate in another split."""

import numpy as np
import pandas as pd

from shards.pack.items import UNLEARNED


def near_duplicates_across_splits(items: pd.DataFrame) -> pd.Series:
    """Which items (N,) have a near-duplicate photo in another split; bool, indexed as `items`.

    items: columns photo_group (below 0: no photo) and split. The photos of one photo group are
    near-duplicates, as pack found them. A missing split differs from none, nor does the
    unlabelled split: no encoder is trained on it, so a photo shared with it leaks nothing.
    """
    groups = items.photo_group.fillna(-1)
    known = items.split.where((groups >= 0) & ~items.split.isin(["", UNLEARNED]))
    return known.notna() & (known.groupby(groups).transform("nunique") > 1)


def labelled_rows(items: pd.DataFrame, split: str) -> np.ndarray:
    """Rows (n,) of `split` that have a label and no near-duplicate in another split, ascending.

    items: columns split, label_group and photo_group.
    """
    labelled = (items.split == split) & (items.label_group != "")
    return np.flatnonzero(labelled & ~near_duplicates_across_splits(items))
