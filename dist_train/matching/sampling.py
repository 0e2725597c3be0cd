"""What a sample of rows says before the join begins."""

import numpy as np

from dist_train.matching.blocks import CHUNK
from dist_train.matching.rows import read_rows
from dist_train.matching.vectors import ItemVectors, subset, weighted_rows

SAMPLE, ASKING = 4_096, 256
"""Rows that the kernels are timed on; rows that the floor is estimated from."""
HIGHEST_FLOOR = 0.999
"""No budget raises the floor above it: copies of one photo must not be dropped, however many, and
two float16 rows of the same numbers score 0.9996 to 1.0004."""


def sample_rows(views: ItemVectors) -> np.ndarray:
    """Weighted rows float32 (n, D) of SAMPLE items of the most frequent kind, evenly spread."""
    kind, mask = max(views.kinds.items(), key=lambda item: item[1].sum())
    rows = np.flatnonzero(mask)
    rows = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64)]
    # In another order, so that neighbours in the catalogue do not all fall into one half.
    rows = np.random.default_rng(0).permutation(rows)
    names = tuple(views.parts) if kind == "complete" else (kind,)
    return weighted_rows(views, names, {name: views.take(name, rows) for name in names})


def floor_of_sample(views: ItemVectors, pairs_per_item: float) -> float:
    """The score above which a sample of rows says there are about `pairs_per_item` N pairs.

    Rounded up to 1/1000, so that it is the same on every machine, from 0.05 to HIGHEST_FLOOR.
    """
    rows = np.unique(np.linspace(0, len(views) - 1, min(len(views), ASKING)).astype(np.int64))
    sample = subset(views, rows)
    # Each pair is seen from both its items, and each item sees itself.
    keep = max(1, int((2 * pairs_per_item + 1) * len(rows)))
    best, lowest = np.zeros(0, np.float32), -np.inf
    # Blocks of one size: what is held must not grow with the items.
    for start in range(0, len(views), CHUNK):
        block = range(start, min(start + CHUNK, len(views)))
        scores = scores_with(views, sample, block)
        best = np.concatenate([best, scores[scores > lowest]])
        if len(best) >= keep:
            best = np.partition(best, len(best) - keep)[len(best) - keep :]
            lowest = best[0]
    rounded = float(np.ceil(max(float(lowest), -1.0) * 1000) / 1000)
    return min(max(0.05, rounded), HIGHEST_FLOOR)


def scores_with(views: ItemVectors, sample: ItemVectors, block: range) -> np.ndarray:
    """Float32 scores (n, len(block)); -inf without a common part."""
    total = np.zeros((len(sample), len(block)), np.float32)
    weights = np.zeros_like(total)
    everything = range(len(sample))
    for name, part in views.parts.items():
        few = sample.parts[name]
        here = np.outer(few.present, part.present[block.start : block.stop])
        asked = read_rows(part.rows, block).astype(np.float32)
        dots = read_rows(few.rows, everything).astype(np.float32) @ asked.T
        total += np.float32(part.weight) * dots * here
        weights += np.float32(part.weight) * here
    return np.where(weights > 0, total / np.maximum(weights, 1e-9), -np.inf).astype(np.float32)
