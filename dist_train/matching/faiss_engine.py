"""The engine that searches the FAISS shards of a saved index.

FAISS has no symmetric join: a query block searches a shard. A pair is reported by the item of the
lower row number, so shards wholly before the query block are searched for neighbours only.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.matching.blocks import BlockPair
from dist_train.matching.engines import RowPairs
from dist_train.matching.faiss_library import (
    EXACT,
    faiss,
    gpus,
    on_cpu,
    on_gpu,
    read_faiss,
    set_nprobe,
)
from dist_train.matching.kernels import CoarsePassStats, U, use_threads
from dist_train.matching.nearest import Nearest
from dist_train.matching.vectors import ItemVectors

MORE = 8
"""Neighbours requested beyond k: FAISS ranks by scores that are rounded differently."""
GPU_MOST = 2_048
"""The largest k of FAISS's search on a GPU."""
FLOAT16_ERROR = 2.0**-11
"""Largest relative error of rounding to float16."""
QUERIES = 4_096
CHECKED = 8
"""Scores of each search that are compared with the exact ones."""
Hits = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Query position, row number and score (P,) of what a search found."""


class FaissEngine:
    """Searches the saved shards, one in memory at a time."""

    name, symmetric, disjoint_area = "faiss", False, 0

    def __init__(
        self,
        vectors: ItemVectors,
        shards: Sequence[Path],
        about: dict[str, Any],
        size: int,
        k: int = 0,
        device: str = "cpu",
    ) -> None:
        """`about` is the index.json of these `shards`; query blocks have `size` rows."""
        use_threads()
        self.vectors, self.stored_rows = vectors, vectors.stored_rows
        N, bounds = len(vectors), [range(first, last) for first, last in about["rows"]]
        self.shards = list(zip(shards, bounds, strict=True))
        self.block_rows = [range(n, min(n + size, N)) for n in range(0, N, size)]
        self.device, self.nprobe = device, about["recall"].get("nprobe", 0)
        self.kind, self.exact = about["kind"], about["kind"] in EXACT
        self.loaded: OrderedDict[int, Any] = OrderedDict()
        self.margin = rounding_margin(vectors, about["kind"])
        if not self.exact:
            self.margin += about["recall"].get("margin", 0.0)
        self.stats = CoarsePassStats(margin=self.margin)
        # Shard by shard, so that a worker that scores them in turn reads each shard once.
        self.block_pairs: list[BlockPair] = []
        for number, (_, held) in enumerate(self.shards):
            for block, rows in enumerate(self.block_rows):
                # Pairs (i, j) with i in the block, j in the shard and i <= j.
                both = max(0, min(rows.stop, held.stop) - max(rows.start, held.start))
                area = max(0, min(rows.stop, held.start) - rows.start) * len(held)
                area += both * (held.stop - max(rows.start, held.start)) - both * (both - 1) // 2
                if area or k:
                    self.block_pairs.append(BlockPair(len(self.block_pairs), block, number, area))

    def candidates(
        self, block_pair: BlockPair, score_floor: float, nearest: Nearest | None = None
    ) -> Iterator[RowPairs]:
        block, number = self.block_rows[block_pair.query], block_pair.database
        (path, held), k = self.shards[number], 0 if nearest is None else nearest.k
        if number not in self.loaded:
            self.loaded.clear()
            shard = read_faiss(path, self.vectors.width, len(held))
            set_nprobe(shard, self.nprobe)  # before it is copied: on a GPU it is set differently
            # On a GPU FAISS silently ignores the selector of rows, so all rows must be wanted.
            masks = [mask[held.start : held.stop] for mask in self.vectors.kinds.values()]
            all_wanted = all(mask.all() or not mask.any() for mask in masks)
            if gpus() > 0 and self.device == "cuda" and (all_wanted or not self.exact):
                shard = on_gpu(shard)
            self.loaded[number] = shard
        for start in range(block.start, block.stop, QUERIES):
            rows = range(start, min(start + QUERIES, block.stop))
            for kind, mask in self.vectors.kinds.items():
                queries, able = self.vectors.queries(rows, kind)
                who = np.flatnonzero(able)
                if len(who) and mask[held.start : held.stop].any():
                    found = self._search(self.loaded[number], queries[who], mask, score_floor, k)
                    query, database, scores = who[found[0]] + start, found[1], found[2]
                    truth = self.vectors.scores(query[:CHECKED], database[:CHECKED])["score"]
                    self.stats.add(truth, scores[:CHECKED])
                    yield query, database

    def _search(
        self, shard: Any, queries: np.ndarray, mask: np.ndarray, score_floor: float, k: int
    ) -> Hits:
        """What scores `score_floor` or more, and the k nearest, among the rows of `mask` (N,)."""
        search = ShardSearch(shard, mask, self.kind, self.margin)
        # Rounded down and one step lower: FAISS keeps what is above the radius, not what equals it.
        least = np.nextafter(np.float32(score_floor - self.margin), np.float32(-np.inf))
        query, row, score = search.range(queries, float(least))
        if k:
            both = zip((query, row, score), search.nearest(queries, k), strict=True)
            query, row, score = (np.concatenate(pair) for pair in both)
        here = mask[row]  # an approximate kind searched all rows, those of other kinds as well
        code = query[here] * len(self.vectors) + row[here]
        _, first = np.unique(code, return_index=True)
        return query[here][first], row[here][first], score[here][first]


class ShardSearch:
    """Searches one shard for the rows of a mask (N,); an approximate kind for all rows."""

    def __init__(self, shard: Any, mask: np.ndarray, kind: str, margin: float) -> None:
        self.shard, self.margin, self.parameters = shard, margin, None
        if kind in EXACT and not mask.all():
            # Kept alive as an attribute: FAISS holds a bare pointer to it.
            self.selector = faiss.IDSelectorBatch(np.flatnonzero(mask))
            self.parameters = faiss.SearchParameters(sel=self.selector)

    def range(self, queries: np.ndarray, least: float) -> Hits:
        """All hits above `least`; by growing k where the kind has no range search."""
        try:
            self.shard.range_search(np.zeros((1, self.shard.d), np.float32), 1.0)
        except RuntimeError:
            found = self._search_until(queries, 64, lambda scores: np.float32(least))
            query, row, score = (side[found[2] > least] for side in found)
            return query, row, score
        limits, scores, ids = self.shard.range_search(queries, least, params=self.parameters)
        return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), ids, scores

    def nearest(self, queries: np.ndarray, k: int) -> Hits:
        """All hits that may be among the k best besides the query item itself."""

        def least(scores: np.ndarray) -> np.ndarray:
            few = scores.shape[1] <= k
            return scores[:, -1] if few else scores[:, k] - 2 * self.margin

        return self._search_until(queries, k + 1 + MORE, least)

    def _search_until(
        self, queries: np.ndarray, k: int, least: Callable[[np.ndarray], Any]
    ) -> Hits:
        """The best k, 2 k, ... of each query until one is below `least`.

        Beyond GPU_MOST the search continues on the CPU.
        """
        shard, k, unfinished = self.shard, min(k, GPU_MOST), np.arange(len(queries))
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        while len(unfinished):
            if k > GPU_MOST and shard is self.shard:
                shard = on_cpu(shard)
            k = min(k, shard.ntotal)
            scores, ids = shard.search(queries[unfinished], k, params=self.parameters)
            # Where fewer rows can be found the last ids are -1.
            full = (scores[:, -1] >= least(scores)) & (ids[:, -1] >= 0) & (k < shard.ntotal)
            row, rank = np.nonzero(ids[~full] >= 0)
            found.append((unfinished[~full][row], ids[~full][row, rank], scores[~full][row, rank]))
            unfinished = unfinished[full]
            k = 2 * k if k >= GPU_MOST else min(2 * k, GPU_MOST)
        where, ids, scores = (np.concatenate(side) for side in zip(*found, strict=True))
        return where, ids, scores


def rounding_margin(vectors: ItemVectors, kind: str) -> float:
    """The most by which an exact kind's score may differ from the true one."""
    # Where a GPU searches, the query is in float16 too: the half-precision error counts twice.
    relative = (vectors.width + 16) * U + (2 * FLOAT16_ERROR if kind == "SQfp16" else 0.0)
    # The longest query is of an item with one modality: divided by the root of its weight.
    longest = 1 / np.sqrt(min(one.weight for one in vectors.modalities.values()))
    return float(1.01 * relative * longest + 2.0**-24)
