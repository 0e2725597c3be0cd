"""Matches to groups of postings."""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

WAITING = 250_000
"""Pairs that wait for a few items to be settled."""


def components(items: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Group number (N,) of each item: the connected components of its matches (P,).

    Numbered by their first item, so the numbers do not depend on the order of the pairs.
    """
    graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(items, items))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


class Groups:
    """The same groups, of pairs that come batch by batch: one number an item is held."""

    def __init__(self, items: int) -> None:
        self._lowest = np.arange(items)
        """Of each item, an item of its group: the lowest so far."""
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def join(self, i: np.ndarray, j: np.ndarray) -> None:
        """Items i and j (P,) belong together."""
        self._waiting.append((i, j))
        # Settling goes over all items, so it waits for about as many pairs.
        if sum(len(one) for one, _ in self._waiting) > max(WAITING, len(self._lowest) // 4):
            self._settle()

    def numbers(self) -> np.ndarray:
        """Group number (N,) of each item, numbered by their first item."""
        self._settle()
        first, number = np.unique(self._lowest, return_inverse=True)
        assert (self._lowest[first] == first).all()
        return number

    def _settle(self) -> None:
        if not self._waiting:
            return
        i, j = (self._lowest[np.concatenate(side)] for side in zip(*self._waiting, strict=True))
        self._waiting = []
        known, place = np.unique(np.concatenate([i, j]), return_inverse=True)
        group = components(len(known), place[: len(i)], place[len(i) :])
        # Groups are numbered by their first, so the first of each number is the lowest.
        _, first = np.unique(group, return_index=True)
        now = np.arange(len(self._lowest))
        now[known] = known[first][group]
        self._lowest = now[self._lowest]
