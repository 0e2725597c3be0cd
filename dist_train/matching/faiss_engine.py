"""The engine that searches the FAISS shards of a saved index, as one.

A module of its own: importing faiss starts threads that a forked loader would not survive, so
only the stages that search import it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dist_train.matching.engines import SLACK, Found, nearest_rows
from dist_train.matching.views import Views


class FaissEngine:
    """Searches the saved shards of an index."""

    def __init__(self, views: Views, shards: Sequence[Path]) -> None:
        self.views = views
        self.shards = [faiss.read_index(str(path)) for path in shards]

    def search(self, rows: range, floor: float, k: int) -> Found:
        """See Engine. The asking row itself is among its nearest and is left out by its id."""
        asking, found, near = [], [], []
        for kind, mask in self.views.kinds.items():
            queries, asks = self.views.queries(rows, kind)
            who = np.flatnonzero(asks)
            for shard in self.shards if len(who) and mask.any() else ():
                hits = _search(shard, queries[who], mask, floor, k)
                asking.append(who[hits[0]] + rows.start)
                found.append(hits[1])
                near.append(_for_all(hits[2], hits[3], who, len(rows)))
        if not near:
            nothing = np.zeros(0, np.int64)
            return Found(nothing, nothing, np.full((len(rows), k), -1))
        scores, ids = (np.hstack([part[n] for part in near]) for n in (0, 1))
        nearest = nearest_rows(scores, ids, np.asarray(rows), k)
        return Found(np.concatenate(asking), np.concatenate(found), nearest)


def _search(
    shard: Any, queries: np.ndarray, mask: np.ndarray, floor: float, k: int
) -> tuple[np.ndarray, ...]:
    """Candidates (query, id) at the floor, then scores and ids of the k + 1 nearest."""
    # Held in a variable: FAISS keeps a bare pointer to the selector.
    selector = None if mask.all() else faiss.IDSelectorBatch(np.flatnonzero(mask))
    parameters = faiss.SearchParameters(sel=selector) if selector is not None else None
    # FAISS keeps scores above the radius, not at it.
    limits, _, ids = shard.range_search(
        queries, float(np.float32(floor - SLACK)), params=parameters
    )
    query = np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)))
    scores, nearest = shard.search(queries, min(k + 1, shard.ntotal), params=parameters)
    return query, ids, scores, nearest


def _for_all(
    scores: np.ndarray, ids: np.ndarray, who: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of those who asked among all rows of the block; -1 for the others."""
    all_scores = np.full((rows, scores.shape[1]), -np.inf, np.float32)
    all_ids = np.full((rows, ids.shape[1]), -1, np.int64)
    all_scores[who], all_ids[who] = scores, ids
    return all_scores, all_ids
