"""Scores of predicted pairs against label groups, one value an item.

Pairs are unordered, each given once. Every item always predicts itself and is its own right
answer, as in the Shopee price match competition, so nobody scores zero.
"""

import numpy as np

from dist_train.evaluation.groups import group_codes

# Bounds the bootstrap's weights to 32 MiB at a time, however many products there are.
WEIGHTS_AT_ONCE = 4 << 20


def per_item_f1(groups, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """F1 of every item: 2 * right / (predicted + group size), itself included in all three.

    groups: (N,) label groups; i, j: (P,) int64 rows, each pair once, i != j.
    Returns (N,) float64 in (0, 1]. Raises ValueError for an item without a group.
    """
    right, predicted, sizes = _counts(groups, i, j)
    return 2.0 * right / (predicted + sizes)


def precision_recall(groups, i: np.ndarray, j: np.ndarray) -> tuple[float, float]:
    """Mean over items of right / predicted and of right / group size, itself included."""
    right, predicted, sizes = _counts(groups, i, j)
    return float(np.mean(right / predicted)), float(np.mean(right / sizes))


def recall_at_1(groups, nearest: np.ndarray) -> float:
    """Share of items whose nearest other item is of their group.

    nearest: (N,) int64 row of the nearest other item, -1 for none, which counts as wrong.
    Items alone in their group have no right answer and are left out; nan if all are alone.
    """
    codes, sizes = group_codes(groups)
    nearest = np.asarray(nearest, dtype=np.int64)
    asked = sizes > 1
    if not asked.any():
        return float("nan")
    right = (nearest >= 0) & (codes[nearest] == codes)
    return float(right[asked].mean())


def bootstrap_interval(
    values: np.ndarray, groups, *, rounds: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values, drawing label groups, not items.

    Items of one product rise and fall together, so drawing items one by one would give an
    interval that is too narrow (Field and Welsh 2007, the cluster bootstrap).
    values: (N,) float; groups: (N,). Returns (low, high). Raises ValueError without items.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no items: there is no mean to put an interval around")
    kinds, share, drawn = _kinds_of_group(values, group_codes(groups)[0])
    means = _bootstrap_means(kinds, share, drawn, rounds, np.random.default_rng(seed))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, groups, *, rounds: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ours - theirs on the same items, and its 95 % bootstrap interval by product.

    What is hard for both cancels: the interval is narrower than those of the two means. Drawn are
    label groups, each with the differences of all its items (Efron and Tibshirani 1993, paired).
    ours, theirs: (N,) values of the same items; groups: (N,). Returns (mean, low, high).
    Raises ValueError for different lengths or without items.
    """
    ours, theirs = (np.asarray(values, np.float64) for values in (ours, theirs))
    if ours.shape != theirs.shape:
        raise ValueError(f"values of {len(ours)} and of {len(theirs)} items are no pairs")
    difference = ours - theirs
    low, high = bootstrap_interval(difference, groups, rounds=rounds, seed=seed)
    return float(difference.mean()), low, high


def _counts(groups, i, j) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, predicted and true members of every item, (N,) int64 each."""
    codes, sizes = group_codes(groups)
    i, j = np.asarray(i, dtype=np.int64), np.asarray(j, dtype=np.int64)
    same = codes[i] == codes[j]
    return 1 + _degrees(i[same], j[same], len(codes)), 1 + _degrees(i, j, len(codes)), sizes


def _degrees(i: np.ndarray, j: np.ndarray, items: int) -> np.ndarray:
    return np.bincount(i, minlength=items) + np.bincount(j, minlength=items)


def _kinds_of_group(values, codes) -> tuple[np.ndarray, np.ndarray, int]:
    """Distinct (sum, items) of the groups (K, 2), their shares (K,), the number of groups.

    Groups with the same sum and size are interchangeable in the draw, and F1 takes few values,
    so K is far below the number of groups. Rounding joins sums that differ by addition order.
    """
    sums = np.bincount(codes, weights=values).round(12)
    rows = np.stack([sums, np.bincount(codes)], axis=1)
    kinds, times = np.unique(rows, axis=0, return_counts=True)
    return kinds, times / len(rows), len(rows)


def _bootstrap_means(kinds, share, drawn, rounds, rng) -> np.ndarray:
    """Mean over the items of `drawn` groups drawn with replacement, (rounds,)."""
    step, totals = max(1, WEIGHTS_AT_ONCE // len(kinds)), []
    for start in range(0, rounds, step):
        times = rng.multinomial(drawn, share, size=min(step, rounds - start))
        # No matrix product: in what order it adds depends on how many rows it is given.
        totals.append(np.stack([(times * column).sum(axis=1) for column in kinds.T]))
    sums, items = np.concatenate(totals, axis=1)
    return sums / items
