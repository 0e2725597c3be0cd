"""A sharded index searched as one, and how much of the truth it finds, with an interval."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from dist_train.matching.blocks import CHUNK
from dist_train.matching.faiss_engine import Hits, ShardSearch, rounding, search_of
from dist_train.matching.faiss_library import faiss
from dist_train.matching.index_kinds import EXACT, set_nprobe
from dist_train.matching.sampling import floor_of_sample, scores_with
from dist_train.matching.vectors import ItemVectors, subset

K = 50
RANGE_PAIRS = 20.0
TARGET = 0.95
"""Lower limit of recall@50 that more lists are looked into for."""


class ShardedIndex:
    """The shards of an index, searched as one."""

    def __init__(
        self, shards: Sequence[Path], kind: str, nprobe: int = 0, memory: int | None = None
    ) -> None:
        """Shards of a `kind`; what is beyond `memory` bytes is read again by every search."""
        self.paths, self.kind, self.nprobe, self._held = list(shards), kind, nprobe, {}
        self._room = sys.maxsize if memory is None else memory

    def probe(self, nprobe: int) -> None:
        """Look into so many lists of every shard from now on."""
        self.nprobe = nprobe

    def shards(self) -> Iterator[Any]:
        """The FAISS indexes, one after the other."""
        for path in self.paths:
            shard = self._held.get(path) or faiss.read_index(str(path))
            if path not in self._held and path.stat().st_size <= self._room:
                self._held[path], self._room = shard, self._room - path.stat().st_size
            set_nprobe(shard, self.nprobe)
            yield shard

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids (n, k) of the best of all shards; -inf and -1 where there are fewer."""
        found = [shard.search(np.ascontiguousarray(queries), k) for shard in self.shards()]
        scores, ids = (np.hstack(side) for side in zip(*found, strict=True))
        scores = np.where(ids < 0, -np.inf, scores)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def nearest(self, views: ItemVectors, rows: np.ndarray, k: int) -> np.ndarray:
        """The k nearest (n, k) of items, ranked by the score that decides; -1 for none.

        More than k are asked for, and all ties, so that what FAISS rounds otherwise, or in which
        shard a row lies, changes no rank.
        """
        margin = 2 * self.margin(views)
        best = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        # After every shard, so that what is held does not grow with their number.
        for found in self._found(views, rows, lambda shard, asking: shard.nearest(asking, 2 * k)):
            item, ids, score = map(np.concatenate, zip(best, found, strict=True))
            best = _best(item, ids, score, 2 * k, margin)
        item, ids, _ = best
        item, ids = item[ids != rows[item]], ids[ids != rows[item]]
        score = views.scores(rows[item], ids)["score"]
        item, ids, score = (side[~np.isnan(score)] for side in (item, ids, score))
        order = np.lexsort((ids, -score, item))
        item, ids = item[order], ids[order]
        rank = np.arange(len(item)) - np.searchsorted(item, item)
        out = np.full((len(rows), k), -1)
        out[item[rank < k], rank[rank < k]] = ids[rank < k]
        return out

    def margin(self, views: ItemVectors) -> float:
        """By how much an exact kind's scores may be off; of others nothing is promised."""
        return rounding(views, self.kind) if self.kind in EXACT else 0.0

    def at_least(self, views: ItemVectors, rows: np.ndarray, least: float) -> np.ndarray:
        """Codes n len(views) + id of what a search for `least` and above finds for each item n."""
        below = float(np.nextafter(np.float32(least), np.float32(-np.inf)))
        found = self._found(views, rows, lambda shard, asking: shard.range(asking, below))
        return np.concatenate([item * len(views) + ids for item, ids, _ in found])

    def _found(
        self, views: ItemVectors, rows: np.ndarray, ask: Callable[[ShardSearch, np.ndarray], Hits]
    ) -> Iterator[Hits]:
        """(item, id, score), each once, of what a shard answers, by its kinds of rows."""
        sample = subset(views, rows)
        for shard in self.shards():
            codes, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
            for kind, mask in views.kinds.items():
                queries, asks = sample.queries(range(len(rows)), kind)
                who = np.flatnonzero(asks)
                if len(who):
                    search = search_of(shard, views, mask, self.kind)
                    item, ids, score = ask(search, queries[who])
                    codes.append((who[item] * len(views) + ids)[mask[ids]])
                    scores.append(score[mask[ids]])
            code, first = np.unique(np.concatenate(codes), return_index=True)
            yield *np.divmod(code, len(views)), np.concatenate(scores)[first]


def _best(item: np.ndarray, ids: np.ndarray, score: np.ndarray, k: int, margin: float) -> Hits:
    """(item, id, score) of those that may be among the k best of their item beside itself."""
    order = np.lexsort((ids, -score, item))
    item, ids, score = item[order], ids[order], score[order]
    rank = np.arange(len(item)) - np.searchsorted(item, item)
    last = np.full(int(item.max(initial=-1)) + 1, -np.inf)
    last[item[rank == k]] = score[rank == k]
    keep = score >= last[item] - margin
    return item[keep], ids[keep], score[keep]


def measured_recall(
    views: ItemVectors, index: ShardedIndex, rows: int, lists: int
) -> dict[str, Any]:
    """What index.json says of an index's answers, over evenly spread complete items.

    With `lists`, twice as many of them are looked into until recall@50 is surely at TARGET.
    """
    here = np.flatnonzero(views.complete)
    some = np.unique(here[np.linspace(0, len(here) - 1, min(rows, len(here))).astype(np.int64)])
    if not len(some):
        return {"nprobe": min(lists, 1)}
    floor = floor_of_sample(views, RANGE_PAIRS)
    wanted, least, within = _truth(views, some, floor)
    nprobe = min(lists, 1)
    while True:
        index.probe(nprobe)
        found = index.nearest(views, some, K)
        # By their scores: of many that tie for the last place any will do.
        hits = np.minimum((_scores(views, some, found) >= least[:, None]).sum(1), wanted)
        at_k = interval(int(hits.sum()), int(wanted.sum()))
        if nprobe >= lists or at_k["low"] >= TARGET:
            break
        nprobe = min(2 * nprobe, lists)
    margin = index.margin(views) if index.kind in EXACT else _error(views, index, some)
    return {
        "rows": len(some), "nprobe": nprobe, "recall_at_50": at_k, "range_floor": floor,
        "range_recall": _range_recall(views, index, some, within, floor - margin),
        "margin": margin,
    }  # fmt: skip


def interval(hits: int, of: int) -> dict[str, float]:
    """A share and its 95 % interval (Clopper and Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0
    return {"found": hits, "of": of, "share": hits / of if of else 1.0, "low": low, "high": high}


def _truth(
    views: ItemVectors, some: np.ndarray, floor: float
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """How many nearest of the items there are, at most K, the score (n,) of the last of them, and
    all rows at the floor."""
    sample, within = subset(views, some), []
    ids, known = np.full((len(some), 0), -1), np.zeros((len(some), 0), np.float32)
    for start in range(0, len(views), CHUNK):
        block = range(start, min(start + CHUNK, len(views)))
        scores = scores_with(views, sample, block)
        own = np.flatnonzero((some >= block.start) & (some < block.stop))
        scores[own, some[own] - block.start] = -np.inf
        at, by = np.nonzero(scores >= floor)
        within.append(np.stack([at, by + block.start]))
        # Of the blocks so far, twice as many as are wanted: rounding may change places.
        here = np.where(scores > -np.inf, np.arange(block.start, block.stop), -1)
        ids, known = np.hstack([ids, here]), np.hstack([known, scores])
        if ids.shape[1] > 2 * K:
            best = np.argpartition(-known, 2 * K - 1, axis=1)[:, : 2 * K]
            ids, known = (np.take_along_axis(side, best, 1) for side in (ids, known))
    score = -np.sort(-_scores(views, some, ids), axis=1)[:, :K]
    wanted = (score > -np.inf).sum(1)
    last = np.take_along_axis(score, np.maximum(wanted, 1)[:, None] - 1, 1)[:, 0]
    item, found = np.hstack(within)
    return wanted, last, [found[item == n] for n in range(len(some))]


def _scores(views: ItemVectors, some: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The scores that decide of items with rows (n, k); -inf for the row -1, or for no score."""
    score = views.scores(np.repeat(some, ids.shape[1]), ids.ravel().clip(min=0))["score"]
    score = score.reshape(ids.shape)
    return np.where((ids < 0) | np.isnan(score), np.float32(-np.inf), score)


def _range_recall(
    views: ItemVectors,
    index: ShardedIndex,
    some: np.ndarray,
    within: list[np.ndarray],
    least: float,
) -> dict[str, float]:
    """Of the rows that score at the floor, those that a search for `least` and above finds."""
    wanted = np.concatenate([n * len(views) + rows for n, rows in enumerate(within)])
    found = np.isin(wanted, index.at_least(views, some, least))
    return interval(int(found.sum()), len(wanted))


def _error(views: ItemVectors, index: ShardedIndex, some: np.ndarray) -> float:
    """The difference from the true score that 999 of 1000 answers stay below."""
    queries, _ = subset(views, some).queries(range(len(some)), "complete")
    scores, ids = index.search(queries, K)
    truth = views.scores(np.repeat(some, ids.shape[1]), ids.ravel().clip(min=0))["score"]
    difference = np.abs(truth.reshape(ids.shape) - scores)[(ids >= 0)]
    difference = difference[np.isfinite(difference)]
    return float(np.quantile(difference, 0.999)) if len(difference) else 0.0
