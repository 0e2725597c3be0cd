"""The engine that searches the FAISS shards of a saved index.

FAISS knows no symmetric join: a block of asking items searches a shard. It answers for the pairs
with the asking item first, so shards wholly before the block are searched for neighbours only.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.matching.blocks import Tile
from dist_train.matching.engines import FirstPass, Floors, Found
from dist_train.matching.faiss_library import faiss, gpus, on_gpu, use_threads
from dist_train.matching.kernels import U
from dist_train.matching.kinds import EXACT, set_nprobe
from dist_train.matching.views import Views

MORE = 8
"""Neighbours beyond those wanted: FAISS ranks by scores that are rounded otherwise."""
GPU_MOST = 2_048
"""The largest k of FAISS's own search on a GPU."""
HALF = 2.0**-11
ASKING = 4_096
Answer = tuple[np.ndarray, np.ndarray]


class FaissEngine:
    """Searches the saved shards, one in memory at a time."""

    name, both_ways = "faiss", False

    def __init__(
        self, views: Views, shards: Sequence[tuple[Path, range]], asking: Sequence[range],
        about: dict[str, Any], k: int = 0, device: str = "cpu",
    ) -> None:  # fmt: skip
        """`shards` with the rows they hold; blocks of rows `asking`; `about` is index.json."""
        use_threads()
        self.views, self.shards, self.asking = views, list(shards), list(asking)
        self.device, self.nprobe = device, about["recall"].get("nprobe", 0)
        self.exact = about["kind"] in EXACT
        self.tiles = _tiles([rows for _, rows in self.shards], self.asking, k)
        self.seen, self.apart = FirstPass(), 0
        self._loaded: OrderedDict[int, Any] = OrderedDict()
        rounding = (views.width + 16) * U + (HALF if about["kind"] == "SQfp16" else 0.0)
        # Of an item with one part the query is longer: that part divided by the root of its weight.
        longest = 1 / np.sqrt(min(part.weight for part in views.parts.values()))
        self.margin = 1.01 * rounding * longest + 2.0**-24
        if not self.exact:
            self.margin += about["recall"].get("margin", 0.0)
        self.seen.margin = self.margin

    def rows(self, tile: Tile) -> np.ndarray:
        """See Engine."""
        return np.asarray(self.asking[tile.asking], np.int64)

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """See Engine."""
        return self.views.take(name, rows)

    def candidates(self, tile: Tile, floors: Floors) -> Iterator[Found]:
        """See Engine."""
        block, shard = self.asking[tile.asking], self._shard(tile.asked)
        held = self.shards[tile.asked][1]
        for start in range(block.start, block.stop, ASKING):
            rows = range(start, min(start + ASKING, block.stop))
            for kind, mask in self.views.kinds.items():
                queries, asks = self.views.queries(rows, kind)
                who = np.flatnonzero(asks)
                if not len(who) or not mask[held.start : held.stop].any():
                    continue
                asking, found, scores = self._search(shard, queries[who], mask, floors)
                self._look(who[asking] + start, found, scores)
                yield who[asking] + start, found

    def _search(
        self, shard: Any, queries: np.ndarray, mask: np.ndarray, floors: Floors
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # Held in a variable: FAISS keeps a bare pointer to the selector.
        selector = None
        if self.exact and not mask.all():
            selector = faiss.IDSelectorBatch(np.flatnonzero(mask))
        parameters = None if selector is None else faiss.SearchParameters(sel=selector)
        search = _Search(shard, parameters, self.margin)
        # Rounded down and one below: FAISS keeps what is above the radius, not at it.
        least = np.nextafter(np.float32(floors.pair() - self.margin), np.float32(-np.inf))
        if (gpus() and self.device == "cuda") or not _has_range_search(shard):
            hits = search.range_by_nearest(queries, float(least))
        else:
            hits = search.range(queries, float(least))
        if floors.k:
            near = search.nearest(queries, floors.k)
            hits = tuple(np.concatenate(pair) for pair in zip(hits, near, strict=True))
        here = mask[hits[1]]  # an approximate kind searched all rows, of other kinds as well
        code = hits[0][here] * len(self.views) + hits[1][here]
        _, first = np.unique(code, return_index=True)
        return hits[0][here][first], hits[1][here][first], hits[2][here][first]

    def _shard(self, number: int) -> Any:
        if number not in self._loaded:
            self._loaded.clear()
            index = faiss.read_index(str(self.shards[number][0]))
            if gpus() and self.device == "cuda":
                index = on_gpu(index)
            set_nprobe(index, self.nprobe)
            self._loaded[number] = index
        return self._loaded[number]

    def _look(self, asking: np.ndarray, found: np.ndarray, scores: np.ndarray) -> None:
        some = slice(0, 8)
        truth = self.views.scores(asking[some], found[some])["score"]
        difference = np.abs(truth.astype(np.float64) - scores[some])
        difference = difference[np.isfinite(difference)]
        self.seen.checked += len(difference)
        self.seen.error = max(self.seen.error, float(difference.max(initial=0.0)))


class _Search:
    """One shard, asked with one set of parameters."""

    def __init__(self, shard: Any, parameters: Any, margin: float) -> None:
        self.shard, self.parameters, self.margin = shard, parameters, margin

    def range(self, queries: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query, id, score) above `least`."""
        limits, scores, ids = self.shard.range_search(queries, least, params=self.parameters)
        return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), ids, scores

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All that may be among the k best beside the asking item itself."""

        def least(scores: np.ndarray) -> np.ndarray:
            few = scores.shape[1] <= k
            return scores[:, -1] if few else scores[:, k] - 2 * self.margin

        found, _ = self._grow(queries, k + 1 + MORE, least, self.shard.ntotal)
        return found

    def range_by_nearest(
        self, queries: np.ndarray, least: float, most: int = GPU_MOST
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `range`, where there is no range search: more neighbours until one is below.

        Items that have more than `most` go through a copy on the CPU.
        """
        found, open_ = self._grow(queries, 64, lambda scores: np.float32(least), most)
        where, ids, scores = (side[found[2] > least] for side in found)
        if not len(open_):
            return where, ids, scores
        cpu = faiss.index_gpu_to_cpu(self.shard) if gpus() else self.shard
        again = _Search(cpu, self.parameters, self.margin).range(queries[open_], least)
        return (np.concatenate([where, open_[again[0]]]), np.concatenate([ids, again[1]]),
                np.concatenate([scores, again[2]]))  # fmt: skip

    def _grow(
        self, queries: np.ndarray, k: int, least: Callable[[np.ndarray], Any], most: int
    ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """Ask for k and, where even the last may be wanted, for twice as many again.

        Also the queries whose `most` were not enough; nothing is returned for these.
        """
        most = min(most, self.shard.ntotal)
        open_, found = np.arange(len(queries)), [_nothing()]
        while len(open_):
            k = min(k, most)
            scores, ids = self.shard.search(queries[open_], k, params=self.parameters)
            # Where there are fewer in reach the last ids are -1.
            full = (scores[:, -1] >= least(scores)) & (ids[:, -1] >= 0) & (k < self.shard.ntotal)
            row, rank = np.nonzero(ids[~full] >= 0)
            found.append((open_[~full][row], ids[~full][row, rank], scores[~full][row, rank]))
            open_ = open_[full]
            if k == most:
                break
            k *= 2
        where, ids, scores = (np.concatenate(side) for side in zip(*found, strict=True))
        return (where, ids, scores), open_


def _has_range_search(shard: Any) -> bool:
    try:
        shard.range_search(np.zeros((1, shard.d), np.float32), 1.0)
    except RuntimeError:
        return False
    return True


def _nothing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)


def _tiles(shards: list[range], asking: list[range], k: int) -> list[Tile]:
    """Shard by shard, so that each is read once by a worker that takes its tiles in turn."""
    found: list[Tile] = []
    for number, held in enumerate(shards):
        for block, rows in enumerate(asking):
            area = _area(rows, held)
            if area or k or rows.start >= shards[-1].stop:  # canaries stand in no shard
                found.append(Tile(len(found), block, number, area))
    return found


def _area(rows: range, held: range) -> int:
    """Pairs (i, j) with i among the asking, j in the shard and i <= j."""
    first, last = max(rows.start, held.start), min(rows.stop, held.stop)
    both = max(0, last - first)
    before = max(0, min(rows.stop, held.start) - rows.start)
    return before * len(held) + both * (held.stop - first) - both * (both - 1) // 2
