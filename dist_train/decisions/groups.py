"""Matches to groups of postings."""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def components(items: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Group number (N,) of each item: the connected components of its matches (P,).

    Numbered by their first item, so the numbers do not depend on the order of the pairs.
    """
    graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(items, items))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
