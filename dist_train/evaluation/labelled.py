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


def scoring_obstacle(groups: np.ndarray) -> str:
    """Why no F1 of items of the label groups (n,) tells good matches from bad ones; "" if one does.

    Where every item is alone, matching nothing is perfect, and where all are one product, matching
    everything is.
    """
    products, sizes = np.unique(groups, return_counts=True)
    if not len(products):
        return "no item has a label_group"
    if sizes.max() < 2:
        return f"none of the {len(products)} products has two items, so no match can be right"
    return "all items are of one product, so no match can be wrong" if len(products) < 2 else ""
