"""Two scores of a pair as one: their weighted mean, the weight chosen where labels are known."""

from dataclasses import dataclass

import numpy as np

from dist_train.evaluation.f1_curve import SAME_F1, f1_curve

WEIGHTS = tuple(step / 20 for step in range(21))
"""Weights of the first score that are tried."""


@dataclass(frozen=True)
class Fusion:
    """The weight of the first score (the second has the rest), and the threshold of the mean."""

    weight: float
    threshold: float

    def score(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The weighted mean of two scores (P,), float32 (P,)."""
        first, second = (np.asarray(scores, np.float64) for scores in (first, second))
        return (self.weight * first + (1 - self.weight) * second).astype(np.float32)


def union_of_pairs(*lists: tuple[np.ndarray, np.ndarray], items: int) -> tuple[np.ndarray, ...]:
    """Every pair of any of the lists once: i, j (P,) int64, i < j, ascending.

    lists: i and j of each, i < j < items.
    """
    keys = np.unique(np.concatenate([np.asarray(i, np.int64) * items + j for i, j in lists]))
    return keys // items, keys % items


def choose_fusion(
    groups: np.ndarray, i: np.ndarray, j: np.ndarray, first: np.ndarray, second: np.ndarray
) -> Fusion:
    """The weight and threshold of the highest mean per-item F1; of equal weights the most even.

    groups: (N,) label groups; i, j: (P,) each pair once; first, second: (P,) scores of every pair.
    Raises ValueError without items, or for a score that is NaN.
    """
    best, chosen = -1.0, Fusion(0.5, 1.0)
    for weight in sorted(WEIGHTS, key=lambda share: abs(share - 0.5)):
        scores = Fusion(weight, 0.0).score(first, second)
        threshold, f1 = f1_curve(groups, i, j, scores).best()
        if f1 > best + SAME_F1:
            best, chosen = f1, Fusion(weight, threshold)
    return chosen
