"""A sharded index searched as one, and how much of the truth it finds, with an interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from dist_train.matching.faiss_library import faiss
from dist_train.matching.kinds import set_nprobe
from dist_train.matching.sampling import floor_of_sample, scores_with
from dist_train.matching.views import Views, subset
from dist_train.runtime import row_blocks

K = 50
RANGE_PAIRS = 20.0
TARGET = 0.95
"""Lower limit of recall@50 that more lists are looked into for."""


class ShardedIndex:
    """The shards of an index, searched as one."""

    def __init__(self, shards: Sequence[Path], nprobe: int = 0) -> None:
        self.shards = [faiss.read_index(str(path)) for path in shards]
        self.probe(nprobe)

    def probe(self, nprobe: int) -> None:
        """Look into so many lists of every shard from now on."""
        for shard in self.shards:
            set_nprobe(shard, nprobe)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids (n, k) of the best of all shards; -inf and -1 where there are fewer."""
        found = [shard.search(np.ascontiguousarray(queries), k) for shard in self.shards]
        scores, ids = (np.hstack(side) for side in zip(*found, strict=True))
        scores = np.where(ids < 0, -np.inf, scores)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def nearest(self, views: Views, rows: np.ndarray, k: int) -> np.ndarray:
        """The k nearest (n, k) of items, ranked by the score that decides; -1 for none.

        More than k are asked for, so that those that FAISS rounds otherwise change no rank.
        """
        sample = subset(views, rows)
        queries, _ = sample.queries(range(len(rows)), "complete")
        _, ids = self.search(queries, k + 1 + k)
        asking = np.repeat(rows, ids.shape[1])
        score = views.scores(asking, ids.ravel().clip(min=0))["score"].reshape(ids.shape)
        score = np.where((ids < 0) | (ids == rows[:, None]) | np.isnan(score), -np.inf, score)
        order = np.lexsort((ids, -score), axis=1)[:, :k]
        best = np.take_along_axis(ids, order, 1)
        return np.where(np.isneginf(np.take_along_axis(score, order, 1)), -1, best)


def measured_recall(views: Views, index: ShardedIndex, rows: int, lists: int) -> dict[str, Any]:
    """What index.json says of an index's answers, over evenly spread complete items.

    With `lists`, twice as many of them are looked into until recall@50 is surely at TARGET.
    """
    here = np.flatnonzero(views.complete)
    some = np.unique(here[np.linspace(0, len(here) - 1, min(rows, len(here))).astype(np.int64)])
    if not len(some):
        return {"nprobe": min(lists, 1)}
    floor = floor_of_sample(views, RANGE_PAIRS)
    truth, within = _truth(views, some, floor)
    nprobe = min(lists, 1)
    while True:
        index.probe(nprobe)
        found = index.nearest(views, some, K)
        wanted = truth >= 0
        hits = int(sum(np.isin(t[t >= 0], f).sum() for t, f in zip(truth, found, strict=True)))
        at_k = interval(hits, int(wanted.sum()))
        if nprobe >= lists or at_k["low"] >= TARGET:
            break
        nprobe = min(2 * nprobe, lists)
    return {
        "rows": len(some), "nprobe": nprobe, "recall_at_50": at_k, "range_floor": floor,
        "range_recall": _range_recall(views, index, some, within, floor),
        "margin": _error(views, index, some),
    }  # fmt: skip


def interval(hits: int, of: int) -> dict[str, float]:
    """A share and its 95 % interval (Clopper and Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0
    return {"found": hits, "of": of, "share": hits / of if of else 1.0, "low": low, "high": high}


def _truth(views: Views, some: np.ndarray, floor: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """The K nearest (n, K) of the items by the score that decides, and all rows at the floor."""
    sample, near, within = subset(views, some), [], []
    for block in row_blocks(len(views), smallest=4096, largest=16_384):
        scores = scores_with(views, sample, block)
        own = np.flatnonzero((some >= block.start) & (some < block.stop))
        scores[own, some[own] - block.start] = -np.inf
        few = min(2 * K, len(block))
        best = np.argpartition(-scores, few - 1, axis=1)[:, :few]
        near.append(np.where(np.take_along_axis(scores, best, 1) > -np.inf, best + block.start, -1))
        at, by = np.nonzero(scores >= floor)
        within.append(np.stack([at, by + block.start]))
    ids = np.hstack(near)
    score = views.scores(np.repeat(some, ids.shape[1]), ids.ravel().clip(min=0))["score"]
    score = np.where(ids < 0, -np.inf, score.reshape(ids.shape))
    order = np.lexsort((ids, -score), axis=1)[:, :K]
    item, found = np.hstack(within)
    best = np.where(np.isneginf(np.take_along_axis(score, order, 1)), -1,
                    np.take_along_axis(ids, order, 1))  # fmt: skip
    return best, [found[item == n] for n in range(len(some))]


def _range_recall(
    views: Views, index: ShardedIndex, some: np.ndarray, within: list[np.ndarray], floor: float
) -> dict[str, float]:
    """Of the rows that score at the floor, those among as many candidates as are asked for."""
    most = max((len(rows) for rows in within), default=0)
    queries, _ = subset(views, some).queries(range(len(some)), "complete")
    _, ids = index.search(queries, max(1, 2 * most + 1))
    hits = int(sum(np.isin(rows, found).sum() for rows, found in zip(within, ids, strict=True)))
    return interval(hits, sum(map(len, within)))


def _error(views: Views, index: ShardedIndex, some: np.ndarray) -> float:
    """The difference from the true score that 999 of 1000 answers stay below."""
    queries, _ = subset(views, some).queries(range(len(some)), "complete")
    scores, ids = index.search(queries, K)
    truth = views.scores(np.repeat(some, ids.shape[1]), ids.ravel().clip(min=0))["score"]
    difference = np.abs(truth.reshape(ids.shape) - scores)[(ids >= 0)]
    difference = difference[np.isfinite(difference)]
    return float(np.quantile(difference, 0.999)) if len(difference) else 0.0
