"""Mean per-item F1 at every threshold that makes a difference, from one sort of the pairs."""

import logging
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from dist_train.evaluation.metrics import group_codes

# Two means of the same fractions added in another order may differ in the last digits; such
# a difference must not decide between two thresholds.
SAME_F1 = 1e-12
LEAST_PAIRS_PER_ITEM = 100.0
"""Far more than are true where products have few items."""
MOST_PAIRS = 20_000_000
"""Pairs beyond LEAST_PAIRS_PER_ITEM: they are held in memory, some 100 bytes each."""
log = logging.getLogger(__name__)


class SavedCurve(TypedDict):
    """An F1 curve as threshold.json holds it."""

    threshold: list[float]
    f1: list[float]
    base: float
    items: int


@dataclass(frozen=True)
class F1Curve:
    """thresholds (K,) float32, distinct scores descending; f1 (K,) float64, the mean per-item
    F1 when every pair with score >= thresholds[k] is a match; base: F1 without any pair, every
    item matching only itself; items: how many. Scores and thresholds compare as float32."""

    thresholds: np.ndarray
    f1: np.ndarray
    base: float
    items: int

    def best(self) -> tuple[float, float]:
        """(threshold, f1) of the highest F1; of equals, the one with the fewest pairs.

        The threshold lies midway between the last score it accepts and the first it refuses,
        as far from both as float32 allows, so that rounding elsewhere moves no pair across.
        Where no pair helps it lies just above the highest score (1.0 without pairs).
        """
        k = self._best_entry()
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

    def thinned(self, points: int = 1000) -> "F1Curve":
        """At most `points` entries (4 at least): first, last, evenly spaced, and the best with
        the entry after it, so that `best` is unchanged."""
        last = len(self.f1) - 1
        if last < max(points, 4):
            return self
        kept = np.linspace(0, last, max(points, 4) - 2).round().astype(np.int64)
        k = self._best_entry()
        if k is not None:
            kept = np.union1d(kept, [k, min(k + 1, last)])
        return F1Curve(self.thresholds[kept], self.f1[kept], self.base, self.items)

    def as_json(self) -> SavedCurve:
        """The curve as lists; float32 and float64 survive JSON exactly."""
        return {
            "threshold": self.thresholds.astype(np.float64).tolist(),
            "f1": self.f1.tolist(),
            "base": self.base,
            "items": self.items,
        }

    @classmethod
    def from_json(cls, saved: SavedCurve) -> "F1Curve":
        """The curve that `as_json` wrote. Raises KeyError for a missing field."""
        thresholds = np.asarray(saved["threshold"], dtype=np.float32)
        f1 = np.asarray(saved["f1"], dtype=np.float64)
        return cls(thresholds, f1, float(saved["base"]), int(saved["items"]))

    def _best_entry(self) -> int | None:
        """The first entry of the highest F1; None where none is better than no pair at all."""
        top = self.f1.max(initial=-np.inf)
        if top <= self.base + SAME_F1:
            return None
        return int(np.argmax(self.f1 >= top - SAME_F1))


def f1_curve(groups: np.ndarray, i: np.ndarray, j: np.ndarray, scores: np.ndarray) -> F1Curve:
    """The exact curve over every distinct score.

    Accepting the pair (a, b) changes the F1 of a and of b only. So walk the pairs of every
    item from its highest score down, note by how much its F1 moves at each score, and add the
    moves of all items up along the scores. Pairs of equal score enter together. The result
    does not depend on the order of the pairs.

    groups: (N,); i, j: (P,) int64, each pair once, i != j; scores: (P,), rounded to float32.
    O(P log P) time. Raises ValueError without items, or for a score that is NaN.
    """
    codes, sizes = group_codes(groups)
    scores = np.asarray(scores, dtype=np.float32)
    if not len(codes):
        raise ValueError("no items: there is no mean F1")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are NaN")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    first = np.ones(len(ranked), dtype=bool)
    first[1:] = ranked[1:] != ranked[:-1]
    level, thresholds = np.cumsum(first) - 1, ranked[first]
    i, j = np.asarray(i, dtype=np.int64)[order], np.asarray(j, dtype=np.int64)[order]
    at_level, moves = _f1_moves(codes, sizes, i, j, level)
    total = np.bincount(at_level, weights=moves, minlength=len(thresholds))
    base = float(np.mean(2.0 / (1.0 + sizes)))
    return F1Curve(thresholds, base + np.cumsum(total) / len(codes), base, len(codes))


def runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each element of a sorted array (P,): where its run of equal elements begins, and its
    place in the run from zero, (P,) int64 each."""
    position = np.arange(len(keys))
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = keys[1:] != keys[:-1]
    begins = np.maximum.accumulate(np.where(fresh, position, 0))
    return begins, position - begins


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
            "%d items have %.0f others of their product on average: only the best %.0f pairs an "
            "item are scored, F1 may be higher",
            len(sizes),
            wanted,
            most,
        )
    return min(wanted, most)


def _f1_moves(
    codes: np.ndarray, sizes: np.ndarray, i: np.ndarray, j: np.ndarray, level: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each (item, level) that has pairs: the level, and by how much the item's F1 moves.

    codes, sizes: (N,) of `group_codes`; i, j, level: (P,) in descending order of score.
    """
    # Every pair once for each of its items, sorted by item and within an item by level.
    item = np.stack([i, j], axis=1).ravel()
    by_item = np.argsort(item, kind="stable")
    item, level = item[by_item], np.repeat(level, 2)[by_item]
    right = np.repeat(codes[i] == codes[j], 2)[by_item]
    begins, place = runs(item)
    counted = np.cumsum(right)
    right_here = counted - (counted - right)[begins]
    # The item itself is predicted and right, and `place` counts from zero.
    after = 2.0 * (1 + right_here) / (2 + place + sizes[item])
    last = np.ones(len(item), dtype=bool)
    last[:-1] = (item[1:] != item[:-1]) | (level[1:] != level[:-1])
    item, level, after = item[last], level[last], after[last]
    alone = 2.0 / (1.0 + sizes[item])
    before = np.where(runs(item)[1] == 0, alone, np.roll(after, 1))
    return level, after - before
