"""Validation scores by their definitions, over every pair and every threshold, in float64."""

import numpy as np


def reference_scores(vectors: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Of vectors (N, D) with label groups (N,): see `f1_at` and recall at 1.

    `f1` is the highest over all thresholds, `recall_at_1` the share of the items that are not
    alone in their group whose nearest other item is of it.
    """
    cosines = cosines_of(vectors)
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    f1 = [f1_at(cosines, groups, threshold) for threshold in np.unique(pairs)]
    nearest = (cosines - 9 * np.eye(len(cosines))).argmax(1)
    shared = np.array([(groups == group).sum() > 1 for group in groups])
    right = groups[nearest] == groups
    alone = f1_at(cosines, groups, np.inf)
    return {
        "f1": max([alone, *f1]), "f1_self_match": alone, "items": len(groups),
        "recall_at_1": right[shared].mean(),
    }  # fmt: skip


def cosines_of(vectors: np.ndarray) -> np.ndarray:
    """(N, N)."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


def f1_at(cosines: np.ndarray, groups: np.ndarray, threshold: float) -> float:
    """Mean over items of 2 |predicted and right| / (|predicted| + |right|), itself in all."""
    predicted = (cosines >= threshold) | np.eye(len(groups), dtype=bool)
    right = groups[:, None] == groups[None]
    both = (predicted & right).sum(1)
    return float(np.mean(2 * both / (predicted.sum(1) + right.sum(1))))
