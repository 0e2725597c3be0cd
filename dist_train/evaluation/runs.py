"""Runs of equal neighbours in a sorted array."""

import numpy as np


def runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each element of a sorted array (P,): where its run begins, and its place in it.

    Returns two (P,) int64 arrays; places count from zero.
    """
    position = np.arange(len(keys))
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = keys[1:] != keys[:-1]
    begins = np.maximum.accumulate(np.where(fresh, position, 0))
    return begins, position - begins
