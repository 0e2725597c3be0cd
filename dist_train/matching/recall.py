"""A sharded index searched as one, and its recall against exact scores, with an interval."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from dist_train.matching.blocks import CHUNK
from dist_train.matching.faiss_engine import Hits, ShardSearch, rounding_margin
from dist_train.matching.faiss_library import EXACT, faiss, set_nprobe
from dist_train.matching.nearest import ranks
from dist_train.matching.sampling import coarse_scores, sampled_score_floor
from dist_train.matching.vectors import ItemVectors, subset

K = 50
RANGE_PAIRS = 20.0
"""Pairs for each item that reach the score floor of the range recall."""
TARGET = 0.95
"""Lower limit of recall@50; more lists are searched until it is reached."""


class ShardedIndex:
    """The shards of an index, searched as one."""

    def __init__(self, shards: Sequence[Path], kind: str, memory: float = float("inf")) -> None:
        """Shards beyond `memory` bytes are read again by every search."""
        self.paths, self.kind, self._free = list(shards), kind, memory
        self.nprobe = 0
        """Lists of every shard that are searched; it can be changed at any time."""
        self._held: dict[Path, Any] = {}

    def shards(self) -> Iterator[Any]:
        """The FAISS indexes, one after the other."""
        for path in self.paths:
            shard = self._held.get(path) or faiss.read_index(str(path))
            if path not in self._held and path.stat().st_size <= self._free:
                self._held[path], self._free = shard, self._free - path.stat().st_size
            set_nprobe(shard, self.nprobe)
            yield shard

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids (n, k) of the best of all shards; -inf and -1 where there are fewer."""
        found = [shard.search(np.ascontiguousarray(queries), k) for shard in self.shards()]
        scores, ids = (np.hstack(side) for side in zip(*found, strict=True))
        scores = np.where(ids < 0, -np.inf, scores)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def nearest(self, vectors: ItemVectors, rows: np.ndarray, k: int) -> np.ndarray:
        """The k nearest (n, k) of items, ranked by exact score; -1 for none.

        More than k are searched for, with all ties, so that neither FAISS's rounding nor the shard
        of a row changes a rank.
        """
        item, ids, score = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        # Cut down after every shard, so that memory does not grow with their number.
        for found in self._found(vectors, rows, lambda shard, some: shard.nearest(some, 2 * k)):
            both = zip((item, ids, score), found, strict=True)
            item, ids, score = _by_rank(*map(np.concatenate, both))
            rank = ranks(item)
            last = np.full(int(item.max(initial=-1)) + 1, -np.inf)
            last[item[rank == 2 * k]] = score[rank == 2 * k]
            keep = score >= last[item] - 2 * self.margin(vectors)
            item, ids, score = item[keep], ids[keep], score[keep]
        item, ids = item[ids != rows[item]], ids[ids != rows[item]]
        score = vectors.scores(rows[item], ids)["score"]
        item, ids, score = _by_rank(*(side[~np.isnan(score)] for side in (item, ids, score)))
        rank = ranks(item)
        out = np.full((len(rows), k), -1)
        out[item[rank < k], rank[rank < k]] = ids[rank < k]
        return out

    def margin(self, vectors: ItemVectors) -> float:
        """The largest error of an exact kind's scores; 0 for others, which promise nothing."""
        return rounding_margin(vectors, self.kind) if self.kind in EXACT else 0.0

    def at_least(self, vectors: ItemVectors, rows: np.ndarray, least: float) -> np.ndarray:
        """Codes n N + id of what a search for scores of `least` and above finds for each item n."""
        below = float(np.nextafter(np.float32(least), np.float32(-np.inf)))
        found = self._found(vectors, rows, lambda shard, queries: shard.range(queries, below))
        return np.concatenate([item * len(vectors) + ids for item, ids, _ in found])

    def _found(
        self,
        vectors: ItemVectors,
        rows: np.ndarray,
        search: Callable[[ShardSearch, np.ndarray], Hits],
    ) -> Iterator[Hits]:
        """The hits of each shard, each once, with item numbers (P,) in place of queries."""
        sample = subset(vectors, rows)
        for shard in self.shards():
            codes, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
            for kind, mask in vectors.kinds.items():
                queries, able = sample.queries(range(len(rows)), kind)
                who = np.flatnonzero(able)
                if len(who):
                    one = ShardSearch(shard, mask, self.kind, self.margin(vectors))
                    item, ids, score = search(one, queries[who])
                    codes.append((who[item] * len(vectors) + ids)[mask[ids]])
                    scores.append(score[mask[ids]])
            code, first = np.unique(np.concatenate(codes), return_index=True)
            item, ids = np.divmod(code, len(vectors))
            yield item, ids, np.concatenate(scores)[first]


def _by_rank(item: np.ndarray, ids: np.ndarray, score: np.ndarray) -> Hits:
    """Hits (P,) by item, then by falling score, then by id."""
    order = np.lexsort((ids, -score, item))
    return item[order], ids[order], score[order]


def measured_recall(
    vectors: ItemVectors, index: ShardedIndex, rows: int, lists: int
) -> dict[str, Any]:
    """The entry `recall` of index.json, over `rows` evenly spread complete items.

    If the index has `lists`, twice as many of them are searched until the lower limit of recall@50
    reaches TARGET. The margin of an approximate kind is what the errors of 999 of 1000 scores stay
    below.
    """
    here = np.flatnonzero(vectors.complete)
    some = np.unique(here[np.linspace(0, len(here) - 1, min(rows, len(here))).astype(np.int64)])
    if not len(some):
        return {"nprobe": min(lists, 1)}
    score_floor = sampled_score_floor(vectors, RANGE_PAIRS)
    wanted, least, within = _exact_answers(vectors, some, score_floor)
    index.nprobe = min(lists, 1)
    while True:
        found = index.nearest(vectors, some, K)
        # Compared by score: of several that tie for the last place any will do.
        hits = np.minimum((_scores(vectors, some, found) >= least[:, None]).sum(1), wanted)
        at_k = interval(int(hits.sum()), int(wanted.sum()))
        if index.nprobe >= lists or at_k["low"] >= TARGET:
            break
        index.nprobe = min(2 * index.nprobe, lists)
    margin = index.margin(vectors)
    if index.kind not in EXACT:
        queries, _ = subset(vectors, some).queries(range(len(some)), "complete")
        scores, ids = index.search(queries, K)
        error = np.abs(_scores(vectors, some, ids)[ids >= 0] - scores[ids >= 0])
        error = error[np.isfinite(error)]
        margin = float(np.quantile(error, 0.999)) if len(error) else 0.0
    codes = np.isin(within, index.at_least(vectors, some, score_floor - margin))
    return {
        "rows": len(some),
        "nprobe": index.nprobe,
        "recall_at_50": at_k,
        "range_floor": score_floor,
        "range_recall": interval(int(codes.sum()), len(within)),
        "margin": margin,
    }


def interval(hits: int, of: int) -> dict[str, float]:
    """A share and its 95 % interval (Clopper and Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0
    return {"found": hits, "of": of, "share": hits / of if of else 1.0, "low": low, "high": high}


def _exact_answers(
    vectors: ItemVectors, some: np.ndarray, score_floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The right answers for items `some` (n,), found by brute force.

    How many neighbours (n,) each has, at most K; the score (n,) of the last of them; codes n N + id
    (P,) of all rows that reach the score floor.
    """
    sample, within = subset(vectors, some), []
    ids, known = np.full((len(some), 0), -1), np.zeros((len(some), 0), np.float32)
    for start in range(0, len(vectors), CHUNK):
        block = range(start, min(start + CHUNK, len(vectors)))
        scores = coarse_scores(sample, vectors, block)
        own = np.flatnonzero((some >= block.start) & (some < block.stop))
        scores[own, some[own] - block.start] = -np.inf
        at, by = np.nonzero(scores >= score_floor)
        within.append(at * len(vectors) + by + block.start)
        # Twice as many as are wanted of the blocks so far: rounding may change ranks.
        here = np.where(scores > -np.inf, np.arange(block.start, block.stop), -1)
        ids, known = np.hstack([ids, here]), np.hstack([known, scores])
        if ids.shape[1] > 2 * K:
            best = np.argpartition(-known, 2 * K - 1, axis=1)[:, : 2 * K]
            ids, known = (np.take_along_axis(side, best, 1) for side in (ids, known))
    score = -np.sort(-_scores(vectors, some, ids), axis=1)[:, :K]
    wanted = (score > -np.inf).sum(1)
    last = np.take_along_axis(score, np.maximum(wanted, 1)[:, None] - 1, 1)[:, 0]
    return wanted, last, np.concatenate(within)


def _scores(vectors: ItemVectors, some: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Exact scores (n, k) of items with rows `ids` (n, k); -inf for the row -1, or for no score."""
    score = vectors.scores(np.repeat(some, ids.shape[1]), ids.ravel().clip(min=0))["score"]
    score = score.reshape(ids.shape)
    return np.where((ids < 0) | np.isnan(score), np.float32(-np.inf), score)
