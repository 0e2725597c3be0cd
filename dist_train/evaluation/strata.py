"""F1 by size of the label group: pairs are easy to complete, large groups are not."""

import numpy as np
import pandas as pd

from dist_train.evaluation.groups import group_codes

BANDS = (1, 2, 3, 5, 10, 20)


def by_group_size(groups, f1: np.ndarray) -> pd.DataFrame:
    """Mean F1 of the items in groups of 1, 2, 3-4, 5-9, 10-19, and 20 or more items.

    groups: (N,); f1: (N,) per item. Returns one row for every band that has items:
    size_from, size_to (the last band ends at the largest group), items, f1.
    """
    sizes = group_codes(groups)[1]
    band = np.searchsorted(BANDS, sizes, side="right") - 1
    items = np.bincount(band, minlength=len(BANDS))
    total = np.bincount(band, weights=np.asarray(f1, dtype=np.float64), minlength=len(BANDS))
    ends = [start - 1 for start in BANDS[1:]] + [int(sizes.max(initial=BANDS[-1]))]
    rows = pd.DataFrame({"size_from": BANDS, "size_to": ends, "items": items})
    rows["f1"] = total / np.maximum(items, 1)
    return rows[items > 0].reset_index(drop=True)
