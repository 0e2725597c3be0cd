"""Scores of predicted pairs against label groups, one value an item.

Pairs are unordered, each given once. Every item always predicts itself and is its own right
answer, as in the Shopee price match competition, so no item scores zero.
"""

from typing import TypedDict

import numpy as np
import pandas as pd

# Bounds the bootstrap's weights to 32 MiB at a time, however many products there are.
WEIGHTS_AT_ONCE = 4 << 20
LEVEL = 0.95
"""Share of the bootstrap's means that an interval holds."""
BANDS = (1, 2, 3, 5, 10, 20)
"""Smallest label group of each band of sizes: pairs are easy to complete, large groups are not."""


class GroupSizeScore(TypedDict):
    """Mean F1 of the items in label groups of size_from to size_to items, and how many they are."""

    size_from: int
    size_to: int
    items: int
    f1: float


def group_codes(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the label groups and count their items.

    groups: (N,) integers or strings. Returns (codes (N,) int64 in 0..G-1, sizes (N,) int64,
    the number of items in the group of each item, itself included).
    Raises ValueError for an item without a label group: as one group together, all such items
    would count as the same product.
    """
    groups = np.asarray(groups)
    codes = pd.factorize(groups)[0]
    missing = (codes < 0) | (groups == "")
    if missing.any():
        raise ValueError(
            f"{int(missing.sum())} items have no label group, the first is row "
            f"{int(np.flatnonzero(missing)[0])}: leave them out before scoring"
        )
    return codes, np.bincount(codes, minlength=1)[codes]


def per_item_scores(
    groups: np.ndarray, i: np.ndarray, j: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1, precision and recall of every item among themselves, (N,) float64 in (0, 1] each.

    groups: (N,) label groups; i, j: (P,) int64 rows, each pair once, i != j.
    Raises ValueError for an item without a group.
    """
    codes, sizes = group_codes(groups)
    ends = np.stack([i, j])
    hits = ends[:, codes[ends[0]] == codes[ends[1]]]
    right, predicted = (np.bincount(p.ravel(), minlength=len(codes)) for p in (hits, ends))
    return scores_of_counts(right, predicted - right, sizes)


def scores_of_counts(
    right: np.ndarray, wrong: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """F1, precision and recall of items by their right and wrong matches, (n,) float64 each.

    2 * right / (predicted + size), right / predicted and right / size, where the item itself is
    predicted and right.
    right, wrong: (n,) matches beside the item itself; sizes: (n,) items of its product, itself
    included.
    """
    right = right + 1
    predicted = right + wrong
    return 2.0 * right / (predicted + sizes), right / predicted, right / sizes


def recall_at_1(groups: np.ndarray, nearest: np.ndarray) -> float:
    """Share of items whose nearest other item is of their group.

    nearest: (N,) int64 row of the nearest other item, -1 for none, which counts as wrong.
    Items alone in their group have no right answer and are left out; NaN if all are alone.
    """
    codes, sizes = group_codes(groups)
    nearest = np.asarray(nearest, dtype=np.int64)
    shared = sizes > 1
    if not shared.any():
        return float("nan")
    right = (nearest >= 0) & (codes[nearest] == codes)
    return float(right[shared].mean())


def by_group_size(groups: np.ndarray, f1: np.ndarray) -> list[GroupSizeScore]:
    """Mean F1 of the items in groups of 1, 2, 3-4, 5-9, 10-19, and 20 or more items.

    groups: (N,); f1: (N,) of each item. One entry for every band that has items; the last band
    ends at the largest group.
    """
    sizes = group_codes(groups)[1]
    band = np.searchsorted(BANDS, sizes, side="right") - 1
    items = np.bincount(band, minlength=len(BANDS))
    total = np.bincount(band, weights=f1, minlength=len(BANDS))
    ends = [*(start - 1 for start in BANDS[1:]), int(sizes.max(initial=BANDS[-1]))]
    return [
        {"size_from": start, "size_to": end, "items": int(count), "f1": float(f1_sum / count)}
        for start, end, count, f1_sum in zip(BANDS, ends, items, total, strict=True)
        if count
    ]


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray, rounds: int = 1000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values, drawing label groups, not items.

    Scores within one product are correlated, so drawing items one by one would give an interval
    that is too narrow (Field and Welsh 2007, the cluster bootstrap).
    values: (N,) float; groups: (N,). Returns (low, high). Raises ValueError without items.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no items: there is no mean to put an interval around")
    codes = group_codes(groups)[0]
    # Groups of equal sum and size are interchangeable in the draw, and F1 takes few values: so the
    # distinct (sum, size) are drawn by their share, which are far fewer than the groups. Rounding
    # joins sums that differ by the order of addition.
    totals = np.stack([np.bincount(codes, weights=values).round(12), np.bincount(codes)], axis=1)
    kinds, counts = np.unique(totals, axis=0, return_counts=True)
    generator, step, drawn = np.random.default_rng(0), max(1, WEIGHTS_AT_ONCE // len(kinds)), []
    for start in range(0, rounds, step):
        size = min(step, rounds - start)
        times = generator.multinomial(len(totals), counts / len(totals), size=size)
        # No matrix product: the order of its additions depends on the number of rows.
        drawn.append(np.stack([(times * column).sum(axis=1) for column in kinds.T]))
    sums, sizes = np.concatenate(drawn, axis=1)
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(sums / sizes, [tail, 1.0 - tail])
    return float(low), float(high)


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray
) -> tuple[float, float, float]:
    """Mean of ours - theirs on the same items, and its 95 % bootstrap interval by product.

    What is hard for both cancels: the interval is narrower than those of the two means. Label
    groups are drawn with the differences of all their items (Efron and Tibshirani 1993, paired).
    ours, theirs: (N,) values of the same items; groups: (N,). Returns (mean, low, high).
    Raises ValueError without items.
    """
    difference = ours - theirs
    low, high = bootstrap_interval(difference, groups, rounds=10_000)
    return float(difference.mean()), low, high
