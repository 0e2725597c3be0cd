"""Groups of items: the connected components of their matches."""

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

LEAST_WAITING = 250_000
"""Matches that are collected before they are merged into the groups of a few items."""


class Groups:
    """The connected components of matches that come batch by batch; it holds a number an item."""

    def __init__(self, items: int) -> None:
        self._lowest = np.arange(items)
        """For each item, the lowest known item of its group."""
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def join(self, i: np.ndarray, j: np.ndarray) -> None:
        """Put the items of each match i, j (P,) into one group."""
        self._waiting.append((i, j))
        # A merge goes over all items, so it waits for about as many matches.
        if sum(len(one) for one, _ in self._waiting) > max(LEAST_WAITING, len(self._lowest) // 4):
            self._merge()

    def numbers(self) -> np.ndarray:
        """Group number (N,) of each item, the groups numbered by their first item."""
        self._merge()
        return np.unique(self._lowest, return_inverse=True)[1]

    def _merge(self) -> None:
        """Bring `_lowest` up to date with the matches that wait."""
        if not self._waiting:
            return
        i, j = (self._lowest[np.concatenate(side)] for side in zip(*self._waiting, strict=True))
        self._waiting = []
        items = len(self._lowest)
        graph = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(items, items))
        component = connected_components(graph, directed=False)[1]
        first = np.unique(component, return_index=True)[1]
        self._lowest = first[component][self._lowest]
