"""Probabilities of pairs averaged with those of their items' accepted neighbours.

Two postings of one product resemble the same others: a pair gains where the neighbours of one item
match the other item as well, and loses where they do not.
"""

from collections.abc import Iterator

import numpy as np
from scipy import sparse

PRODUCTS_AT_ONCE = 20_000_000
"""Products of two probabilities that are summed in memory at one time; one row alone may exceed
it."""


def smoothed(
    items: int, i: np.ndarray, j: np.ndarray, probability: np.ndarray, accepted: float = 0.5
) -> np.ndarray:
    """The probabilities of P pairs, each averaged with the mean of its neighbours': (P,) float32.

    For items a and b, the neighbours' mean is that over the accepted neighbours c of a of the
    probabilities of (c, b), weighted by those of (a, c), and the same with a and b exchanged,
    averaged. An item is an accepted neighbour of itself with probability 1; a pair that is no
    candidate has probability 0.

    items: N; i, j: (P,) rows, i != j, each unordered pair once; probability: (P,) from 0 to 1.
    accepted: the lowest probability of an accepted neighbour. The result is the same to the bit
    however the rows are cut into blocks.
    """
    pairs = sparse.coo_matrix((probability.astype(np.float64), (i, j)), shape=(items, items))
    graph = (pairs + pairs.T + sparse.identity(items)).tocsr()
    neighbours = graph.copy()
    neighbours.data[neighbours.data < accepted] = 0
    neighbours.eliminate_zeros()
    neighbours = sparse.diags(1 / neighbours.sum(axis=1).A1) @ neighbours
    both = np.zeros(len(i), np.float32)
    for start, stop in row_blocks(_products(neighbours, graph), PRODUCTS_AT_ONCE):
        means = neighbours[start:stop] @ graph
        means.sort_indices()  # so that an entry is found by bisection
        for row, column in ((i, j), (j, i)):
            here = np.flatnonzero((row >= start) & (row < stop))
            if not len(here):
                continue
            mean = np.asarray(means[row[here] - start, column[here]]).ravel()
            # Rounded before it is added: which of the two comes first must not matter.
            both[here] += mean.astype(np.float32)
    return (probability.astype(np.float32) + both / 2) / 2


def row_blocks(cost: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks (start, stop) whose cost (N,) sums to at most `most`, or of one row."""
    total = np.r_[0, np.cumsum(cost)]
    start = 0
    while start < len(cost):
        stop = int(np.searchsorted(total, total[start] + most, side="right")) - 1
        stop = max(start + 1, stop)
        yield start, stop
        start = stop


def _products(left: sparse.csr_matrix, right: sparse.csr_matrix) -> np.ndarray:
    """Products (N,) that each row of left @ right sums."""
    pattern = sparse.csr_matrix((np.ones(left.nnz), left.indices, left.indptr), left.shape)
    return (pattern @ np.diff(right.indptr)).astype(np.int64)
