"""The engine that searches the FAISS shards of a saved index, as one.

A module of its own: importing faiss starts threads that a forked loader would not survive, so
only the stages that search import it.
"""

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from dist_train.matching.engines import SLACK, Found, nearest_rows
from dist_train.matching.views import Views


class FaissEngine:
    """Searches the saved shards of an index, as one."""

    def __init__(self, views: Views, shards: Sequence[Path]) -> None:
        self.views = views
        self.shards = [faiss.read_index(str(path)) for path in shards]

    def search(self, rows: range, floor: float, k: int) -> Found:
        """See Engine. The asking row itself is among its nearest and is left out by its id."""
        queries = self.views.queries(rows)
        asking, found, near = [], [], []
        for shard in self.shards:
            # FAISS keeps scores above the radius, not at it.
            limits, _, ids = shard.range_search(queries, float(np.float32(floor - SLACK)))
            asking.append(np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))))
            found.append(ids)
            near.append(shard.search(queries, min(k + 1, shard.ntotal)))
        scores, ids = (np.hstack([part[n] for part in near]) for n in (0, 1))
        return Found(
            np.concatenate(asking) + rows.start, np.concatenate(found),
            nearest_rows(scores, ids, np.asarray(rows), k),
        )  # fmt: skip
