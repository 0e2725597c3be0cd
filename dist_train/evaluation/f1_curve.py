"""Mean per-item F1 at every threshold that makes a difference, from one sort of the pairs."""

from dataclasses import dataclass

import numpy as np

from dist_train.evaluation.groups import group_codes
from dist_train.evaluation.runs import runs

# Two means of the same fractions added in another order may differ in the last digits; such
# a difference must not decide between two thresholds.
SAME_F1 = 1e-12


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
            return self._above_all(), self.base
        return self._below(k), float(self.f1[k])

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

    def as_json(self) -> dict:
        return {
            "threshold": self.thresholds.astype(np.float64).tolist(),
            "f1": self.f1.tolist(),
            "base": self.base,
            "items": self.items,
        }

    @classmethod
    def from_json(cls, saved: dict) -> "F1Curve":
        """The curve that `as_json` wrote. Raises KeyError for a missing field."""
        thresholds = np.asarray(saved["threshold"], dtype=np.float32)
        f1 = np.asarray(saved["f1"], dtype=np.float64)
        return cls(thresholds, f1, float(saved["base"]), int(saved["items"]))

    def _best_entry(self) -> int | None:
        top = self.f1.max(initial=-np.inf)
        if top <= self.base + SAME_F1:
            return None
        return int(np.argmax(self.f1 >= top - SAME_F1))

    def _above_all(self) -> float:
        if not len(self.thresholds):
            return 1.0
        return float(np.nextafter(self.thresholds[0], np.float32(np.inf)))

    def _below(self, k: int) -> float:
        score = self.thresholds[k]
        if k + 1 == len(self.thresholds):
            return float(score)
        refused = self.thresholds[k + 1]
        # The midpoint of two neighbouring float32 has no float32 between them to round to.
        middle = np.float32((float(score) + float(refused)) / 2)
        return float(middle if middle > refused else score)


def f1_curve(groups, i: np.ndarray, j: np.ndarray, scores: np.ndarray) -> F1Curve:
    """The exact curve over every distinct score.

    Accepting the pair (a, b) changes the F1 of a and of b only. So walk the pairs of every
    item from its highest score down, note by how much its F1 moves at each score, and add the
    moves of all items up along the scores. Pairs of equal score enter together. The result
    does not depend on the order of the pairs.

    groups: (N,); i, j: (P,) int64, each pair once, i != j; scores: (P,), rounded to float32.
    O(P log P) time. Raises ValueError without items, or for a score that is not a number.
    """
    codes, sizes = group_codes(groups)
    scores = np.asarray(scores, dtype=np.float32)
    if not len(codes):
        raise ValueError("no items: there is no mean F1")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are not a number")
    base = float(np.mean(2.0 / (1.0 + sizes)))
    order, level, thresholds = _levels(scores)
    i, j = np.asarray(i, dtype=np.int64)[order], np.asarray(j, dtype=np.int64)[order]
    at_level, moves = _moves(codes, sizes, i, j, level)
    total = np.bincount(at_level, weights=moves, minlength=len(thresholds))
    return F1Curve(thresholds, base + np.cumsum(total) / len(codes), base, len(codes))


def _levels(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of descending score (P,), the level of each pair in that order (P,), and the score
    of each level (K,)."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    first = np.ones(len(ranked), dtype=bool)
    first[1:] = ranked[1:] != ranked[:-1]
    return order, np.cumsum(first) - 1, ranked[first]


def _moves(codes, sizes, i, j, level) -> tuple[np.ndarray, np.ndarray]:
    """For each (item, level) that has pairs: the level, and by how much the item's F1 moves.

    i, j, level: (P,) in descending order of score.
    """
    item, right, level = _from_both_ends(i, j, codes[i] == codes[j], level)
    begins, place = runs(item)
    counted = np.cumsum(right)
    right_here = counted - (counted - right)[begins]
    # itself is predicted and right, and `place` counts from zero
    after = 2.0 * (1 + right_here) / (2 + place + sizes[item])
    last = _last_of(item, level)
    item, level, after = item[last], level[last], after[last]
    alone = 2.0 / (1.0 + sizes[item])
    before = np.where(runs(item)[1] == 0, alone, np.roll(after, 1))
    return level, after - before


def _from_both_ends(i, j, right, level) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair once for each of its items: item, right, level, (2P,) sorted by item and
    within an item still by level."""
    item = np.stack([i, j], axis=1).ravel()
    by_item = np.argsort(item, kind="stable")
    return item[by_item], np.repeat(right, 2)[by_item], np.repeat(level, 2)[by_item]


def _last_of(item: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Where the next element has another item or another level."""
    last = np.ones(len(item), dtype=bool)
    last[:-1] = (item[1:] != item[:-1]) | (level[1:] != level[:-1])
    return last
