"""Label groups as whole numbers, and how many items each holds."""

import numpy as np
import pandas as pd


def group_codes(groups) -> tuple[np.ndarray, np.ndarray]:
    """Number the label groups and count their items.

    groups: (N,) integers or strings. Returns (codes (N,) int64 in 0..G-1, sizes (N,) int64,
    the number of items in the group of each item, itself included).
    Raises ValueError for an item without a label group: as one group together, all such items
    would count as the same product.
    """
    codes, names = pd.factorize(np.asarray(groups))
    codes = codes.astype(np.int64)
    missing = (codes < 0) | _is_empty(names)[codes] if len(names) else codes < 0
    if missing.any():
        first = int(np.flatnonzero(missing)[0])
        raise ValueError(
            f"{int(missing.sum())} items have no label group, the first is row {first}: "
            "leave them out before scoring"
        )
    return codes, np.bincount(codes, minlength=1)[codes]


def _is_empty(names: np.ndarray) -> np.ndarray:
    return np.array([isinstance(name, str) and not name for name in names], dtype=bool)
