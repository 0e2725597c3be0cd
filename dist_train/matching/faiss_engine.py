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
from dist_train.matching.coarse_pass import FirstPass
from dist_train.matching.engines import Found
from dist_train.matching.faiss_library import faiss, gpus, on_cpu, on_gpu
from dist_train.matching.index_kinds import EXACT, set_nprobe
from dist_train.matching.kernels import U
from dist_train.matching.nearest import Nearest
from dist_train.matching.threads import use_threads
from dist_train.matching.vectors import ItemVectors

MORE = 8
"""Neighbours beyond those wanted: FAISS ranks by scores that are rounded otherwise."""
GPU_MOST = 2_048
"""The largest k of FAISS's own search on a GPU."""
HALF = 2.0**-11
ASKING = 4_096
CHECKED = 8
"""Scores of each search that are compared with those that decide."""
Hits = tuple[np.ndarray, ...]
"""Query, row number and score (P,) of what was found."""


class FaissEngine:
    """Searches the saved shards, one in memory at a time."""

    name, both_ways = "faiss", False

    def __init__(
        self, views: ItemVectors, shards: Sequence[tuple[Path, range]], asking: Sequence[range],
        about: dict[str, Any], k: int = 0, device: str = "cpu",
    ) -> None:  # fmt: skip
        """`shards` with the rows they hold; blocks of rows `asking`; `about` is index.json."""
        use_threads()
        self.views, self.shards, self.asking = views, list(shards), list(asking)
        self.device, self.nprobe = device, about["recall"].get("nprobe", 0)
        self.kind, self.exact = about["kind"], about["kind"] in EXACT
        self.tiles = _tiles([rows for _, rows in self.shards], self.asking, k)
        self.seen, self.apart = FirstPass(), 0
        self._loaded: OrderedDict[int, Any] = OrderedDict()
        self.margin = rounding(views, about["kind"])
        if not self.exact:
            self.margin += about["recall"].get("margin", 0.0)
        self.seen.margin = self.margin

    def rows(self, tile: Tile) -> np.ndarray:
        """See Engine."""
        return np.asarray(self.asking[tile.asking], np.int64)

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """See Engine."""
        return self.views.take(name, rows)

    def release(self) -> None:
        """See Engine."""
        self._loaded.clear()

    def candidates(self, tile: Tile, floor: float, near: Nearest | None = None) -> Iterator[Found]:
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
                k = 0 if near is None else near.k
                item, found, scores = self._search(shard, queries[who], mask, floor, k)
                asking, some = who[item] + start, slice(0, CHECKED)
                truth = self.views.scores(asking[some], found[some])["score"]
                self.seen.note(truth, scores[some])
                yield asking, found

    def _search(
        self, shard: Any, queries: np.ndarray, mask: np.ndarray, floor: float, k: int
    ) -> Hits:
        search = search_of(shard, self.views, mask, self.kind, self.margin)
        # Rounded down and one below: FAISS keeps what is above the radius, not at it.
        least = np.nextafter(np.float32(floor - self.margin), np.float32(-np.inf))
        hits = search.range(queries, float(least))
        if k:
            near = search.nearest(queries, k)
            hits = tuple(np.concatenate(pair) for pair in zip(hits, near, strict=True))
        here = mask[hits[1]]  # an approximate kind searched all rows, of other kinds as well
        code = hits[0][here] * len(self.views) + hits[1][here]
        _, first = np.unique(code, return_index=True)
        return hits[0][here][first], hits[1][here][first], hits[2][here][first]

    def _on_gpu(self, held: range) -> bool:
        """Without a word FAISS drops the selector of rows on a GPU: all rows must be wanted."""
        alike = all(mask[held.start : held.stop].all() or not mask[held.start : held.stop].any()
                    for mask in self.views.kinds.values())  # fmt: skip
        return gpus() > 0 and self.device == "cuda" and (alike or not self.exact)

    def _shard(self, number: int) -> Any:
        if number not in self._loaded:
            self._loaded.clear()
            index = faiss.read_index(str(self.shards[number][0]))
            set_nprobe(index, self.nprobe)  # before it is copied: there it is set another way
            if self._on_gpu(self.shards[number][1]):
                index = on_gpu(index)
            self._loaded[number] = index
        return self._loaded[number]


class ShardSearch:
    """One shard, asked for the rows of one selector (None: all)."""

    def __init__(self, shard: Any, selector: Any = None, margin: float = 0.0) -> None:
        self.shard, self.margin = shard, margin
        self.selector = selector  # held: FAISS keeps a bare pointer to it
        self.parameters = None if selector is None else faiss.SearchParameters(sel=selector)

    def range(self, queries: np.ndarray, least: float) -> Hits:
        """(query, id, score) above `least`: by k nearest where there is no range search."""
        if not _has_range_search(self.shard):
            return self.range_by_nearest(queries, least)
        limits, scores, ids = self.shard.range_search(queries, least, params=self.parameters)
        return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), ids, scores

    def nearest(self, queries: np.ndarray, k: int) -> Hits:
        """All that may be among the k best beside the asking item itself."""

        def least(scores: np.ndarray) -> np.ndarray:
            few = scores.shape[1] <= k
            return scores[:, -1] if few else scores[:, k] - 2 * self.margin

        return self._until(queries, k + 1 + MORE, least)

    def range_by_nearest(self, queries: np.ndarray, least: float, most: int = GPU_MOST) -> Hits:
        """As `range`, by more and more neighbours until one is not above."""
        found = self._until(queries, 64, lambda scores: np.float32(least), most)
        return tuple(side[found[2] > least] for side in found)

    def _until(
        self, queries: np.ndarray, k: int, least: Callable[[np.ndarray], Any], most: int = GPU_MOST
    ) -> Hits:
        """The best k, 2 k, ... until one is below `least`; beyond `most` on the CPU, if it must."""
        found, open_ = self._grow(queries, k, least, most)
        if not len(open_):
            return found
        cpu = ShardSearch(on_cpu(self.shard), self.selector, self.margin)
        again, _ = cpu._grow(queries[open_], 2 * most, least, self.shard.ntotal)
        again = (open_[again[0]], *again[1:])
        return tuple(np.concatenate(pair) for pair in zip(found, again, strict=True))

    def _grow(
        self, queries: np.ndarray, k: int, least: Callable[[np.ndarray], Any], most: int
    ) -> tuple[Hits, np.ndarray]:
        """Ask for k and, where even the last may be wanted, for twice as many again.

        Also the queries whose `most` were not enough; nothing is returned for these.
        """
        most = min(most, self.shard.ntotal)
        open_ = np.arange(len(queries))
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
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


def rounding(views: ItemVectors, kind: str = "Flat") -> float:
    """By how much an exact kind's score may differ from the true one."""
    # A query in float16 too where a GPU searches: twice a half rounding.
    relative = (views.width + 16) * U + (2 * HALF if kind == "SQfp16" else 0.0)
    # Of an item with one part the query is longer: that part divided by the root of its weight.
    longest = 1 / np.sqrt(min(part.weight for part in views.parts.values()))
    return float(1.01 * relative * longest + 2.0**-24)


def search_of(
    shard: Any, views: ItemVectors, mask: np.ndarray, kind: str, margin: float | None = None
) -> ShardSearch:
    """A search for the rows of `mask` (N,) in a shard of an exact kind; of all rows in others."""
    selector = None
    if kind in EXACT and not mask.all():
        selector = faiss.IDSelectorBatch(np.flatnonzero(mask))
    if margin is None:
        margin = rounding(views, kind) if kind in EXACT else 0.0
    return ShardSearch(shard, selector, margin)


def _has_range_search(shard: Any) -> bool:
    try:
        shard.range_search(np.zeros((1, shard.d), np.float32), 1.0)
    except RuntimeError:
        return False
    return True


def _tiles(shards: list[range], asking: list[range], k: int) -> list[Tile]:
    """Shard by shard, so that each is read once by a worker that takes its tiles in turn."""
    found: list[Tile] = []
    for number, held in enumerate(shards):
        for block, rows in enumerate(asking):
            area = _area(rows, held)
            if area or k:
                found.append(Tile(len(found), block, number, area))
    return found


def _area(rows: range, held: range) -> int:
    """Pairs (i, j) with i among the asking, j in the shard and i <= j."""
    first, last = max(rows.start, held.start), min(rows.stop, held.stop)
    both = max(0, last - first)
    before = max(0, min(rows.stop, held.start) - rows.start)
    return before * len(held) + both * (held.stop - first) - both * (both - 1) // 2
