"""Mean per-item F1 at every threshold that makes a difference, from one sort of the pairs.

Also the weight of two scores whose mean has the best curve.
"""

import logging
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from dist_train.evaluation.metrics import group_codes

# Two means of the same fractions added in another order may differ in the last digits; such
# a difference must not decide between two thresholds, nor whether a precision is reached.
SAME_F1 = 1e-12
LEAST_PAIRS_PER_ITEM = 100.0
"""Far more than are true where products have few items."""
MOST_PAIRS = 20_000_000
"""Pairs beyond LEAST_PAIRS_PER_ITEM: they are held in memory, some 100 bytes each."""
WEIGHTS = tuple(step / 20 for step in range(21))
"""Weights of the first of two scores that are tried."""
POINTS = 1000
"""Entries of a saved curve, 4 at least."""
log = logging.getLogger(__name__)


class SavedCurve(TypedDict):
    """An F1 curve as threshold.json holds it."""

    threshold: list[float]
    f1: list[float]
    precision: list[float]
    base: float
    items: int


@dataclass(frozen=True)
class F1Curve:
    """thresholds (K,) float32, distinct scores descending; f1 and precision (K,) float64, their
    means over items when every pair with score >= thresholds[k] is a match; base: F1 without any
    pair, every item matching only itself; items: how many. Scores and thresholds compare as
    float32."""

    thresholds: np.ndarray
    f1: np.ndarray
    precision: np.ndarray
    base: float
    items: int

    def best(self) -> tuple[float, float]:
        """(threshold, f1) of the highest F1; of equals, the one with the fewest pairs.

        The threshold lies midway between the last score it accepts and the first it refuses,
        as far from both as float32 allows, so that rounding elsewhere moves no pair across.
        Where no pair helps it lies just above the highest score (1.0 without pairs).
        """
        return self._between(self._best_entry())

    def precise(self, precision: float) -> tuple[float, float]:
        """(threshold, f1) of the most pairs whose mean precision is `precision` or more.

        The threshold lies as that of `best`.
        """
        reached = np.flatnonzero(self.precision >= precision - SAME_F1)
        return self._between(int(reached[-1]) if len(reached) else None)

    def _between(self, k: int | None) -> tuple[float, float]:
        """(threshold, f1) of entry k, or of no pair at all."""
        if k is None:
            above = [np.nextafter(score, np.float32(np.inf)) for score in self.thresholds[:1]]
            return float(above[0] if above else 1.0), self.base
        threshold = self.thresholds[k]
        if k + 1 < len(self.thresholds):
            refused = self.thresholds[k + 1]
            middle = np.float32((float(threshold) + float(refused)) / 2)
            # The midpoint of two neighbouring float32 has no float32 between them to round to.
            threshold = middle if middle > refused else threshold
        return float(threshold), float(self.f1[k])

    def at(self, threshold: float) -> float:
        """Mean per-item F1 when every pair with score >= threshold is a match."""
        accepted = int(np.count_nonzero(self.thresholds >= np.float32(threshold)))
        return float(self.f1[accepted - 1]) if accepted else self.base

    def as_json(self) -> SavedCurve:
        """At most POINTS entries as lists: first, last, evenly spaced, and the best with the entry
        after it, so that `best` is unchanged. float32 and float64 survive JSON exactly."""
        last = len(self.f1) - 1
        kept = np.arange(last + 1)
        if last >= POINTS:
            kept = np.linspace(0, last, POINTS - 2).round().astype(np.int64)
            k = self._best_entry()
            if k is not None:
                kept = np.union1d(kept, [k, min(k + 1, last)])
        return {
            "threshold": self.thresholds[kept].astype(np.float64).tolist(),
            "f1": self.f1[kept].tolist(),
            "precision": self.precision[kept].tolist(),
            "base": self.base,
            "items": self.items,
        }

    @classmethod
    def from_json(cls, saved: SavedCurve) -> "F1Curve":
        """The curve that `as_json` wrote. Raises KeyError for a missing field."""
        thresholds = np.asarray(saved["threshold"], dtype=np.float32)
        f1, precision = (np.asarray(saved[name], np.float64) for name in ("f1", "precision"))
        return cls(thresholds, f1, precision, float(saved["base"]), int(saved["items"]))

    def _best_entry(self) -> int | None:
        """The first entry of the highest F1; None where none is better than no pair at all."""
        top = self.f1.max(initial=-np.inf)
        if top <= self.base + SAME_F1:
            return None
        return int(np.argmax(self.f1 >= top - SAME_F1))


def f1_curve(groups: np.ndarray, i: np.ndarray, j: np.ndarray, scores: np.ndarray) -> F1Curve:
    """The exact curve of items that are matched with one another.

    groups: (N,); i, j: (P,) int64, each pair once, i != j; scores: (P,), rounded to float32.
    Raises ValueError without items, or for a score that is NaN.
    """
    codes, sizes = group_codes(groups)
    right = np.tile(codes[i] == codes[j], 2)
    return f1_curve_of_queries(sizes, np.concatenate([i, j]), right, ~right, np.tile(scores, 2))


def f1_curve_of_queries(
    sizes: np.ndarray, query: np.ndarray, right: np.ndarray, wrong: np.ndarray, scores: np.ndarray
) -> F1Curve:
    """The exact curve, over every distinct score, of items that are matched with a catalogue.

    A match changes the F1 of its query only. So walk the matches of every query from its highest
    score down, note by how much its F1 moves at each score, and add the moves of all up along the
    scores. Matches of equal score enter together. The result does not depend on their order.

    sizes: (n,) postings of the product of each query, itself included; query: (P,) int64, the
    query of a match, 0 to n - 1; right: (P,) bool; wrong: (P,) by how much it counts as wrong, in
    multiples of 2^-20, whose sums are exact; scores: (P,), rounded to float32. O(P log P) time.
    Raises ValueError as `f1_curve` does.
    """
    scores = np.asarray(scores, dtype=np.float32)
    if not len(sizes):
        raise ValueError("no items: there is no mean F1")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    negated, level = np.unique(-scores, return_inverse=True)  # level 0 is the highest score
    levels = max(len(negated), 1)
    # Sorted by query and within a query by level.
    key = query * levels + level
    order = np.argsort(key)
    key = key[order]
    item = key // levels
    begins = np.searchsorted(item, item)

    def sums(counts: np.ndarray) -> np.ndarray:
        total = np.cumsum(counts)
        return total - (total - counts)[begins]

    right_here, wrong_here = sums(right[order]), sums(wrong[order])
    # Of the matches of one query and level the last one counts.
    last = np.diff(key, append=-1) != 0
    item, level = item[last], key[last] % levels
    # With the item itself, which is predicted and right.
    right_here = 1 + right_here[last]
    predicted = right_here + wrong_here[last]
    is_first = np.diff(item, prepend=-1) != 0

    def means(after: np.ndarray, alone: np.ndarray) -> np.ndarray:
        before = np.where(is_first, alone[item], np.roll(after, 1))
        total = np.bincount(level, weights=after - before, minlength=len(negated))
        return alone.mean() + np.cumsum(total) / len(sizes)

    alone = 2.0 / (1.0 + sizes)
    f1 = means(2.0 * right_here / (predicted + sizes[item]), alone)
    precision = means(right_here / predicted, np.ones(len(sizes)))
    return F1Curve(-negated, f1, precision, float(np.mean(alone)), len(sizes))


def weighted_mean(weight: float, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean of two scores (P,), float32 (P,); the second has the rest of the weight."""
    first, second = (np.asarray(scores, np.float64) for scores in (first, second))
    return (weight * first + (1 - weight) * second).astype(np.float32)


def choose_weight(
    groups: np.ndarray, i: np.ndarray, j: np.ndarray, first: np.ndarray, second: np.ndarray
) -> float:
    """The weight of the highest mean per-item F1 at its best threshold; of equals the most even.

    groups: (N,) label groups; i, j: (P,) each pair once; first, second: (P,) scores of every pair.
    Raises ValueError without items, or for a score that is NaN.
    """
    best, chosen = -1.0, 0.5
    for weight in sorted(WEIGHTS, key=lambda share: abs(share - 0.5)):
        f1 = f1_curve(groups, i, j, weighted_mean(weight, first, second)).best()[1]
        if f1 > best + SAME_F1:
            best, chosen = f1, weight
    return chosen


def pairs_per_item(groups: np.ndarray) -> float:
    """Pairs an item that a curve needs to hold the best threshold of any useful matcher.

    Twice as many as are true, so that none is missed because wrong ones score above it: from a
    curve that ends earlier, large products would seem to be found less well than they are.
    groups: (N,) label groups. Raises ValueError for an item without one.
    """
    sizes = group_codes(groups)[1]
    if not len(sizes):
        return LEAST_PAIRS_PER_ITEM
    # Each of an item's n - 1 true pairs is shared by two items, so it counts for a half.
    wanted = max(LEAST_PAIRS_PER_ITEM, float((sizes - 1).mean()))
    most = max(LEAST_PAIRS_PER_ITEM, MOST_PAIRS / len(sizes))
    if wanted > most:
        log.warning(
            f"{len(sizes)} items have {wanted:.0f} others of their product on average: only the "
            f"best {most:.0f} pairs an item are scored, F1 may be higher"
        )
    return min(wanted, most)
