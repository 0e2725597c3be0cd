"""The interface of an engine, and the engine that multiplies blocks of the stored rows.

An engine finds candidate pairs: some too many, never too few. Exact scores decide afterwards.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from dist_train.distributed.memory import trim_allocators
from dist_train.matching.blocks import CHUNK, Block, BlockPair, common_modalities, disjoint_area
from dist_train.matching.kernels import (
    Candidates,
    Chunk,
    CoarsePassStats,
    Form,
    Kernel,
    candidates_of,
    use_threads,
)
from dist_train.matching.nearest import Nearest
from dist_train.matching.vectors import ItemVectors, check_rows, read_rows, weighted_rows

CHECKED = 64
"""Candidates of a batch whose coarse score is compared with the exact one."""
BATCH, LARGEST_BATCH = 16_384, 262_144
"""Candidates in a batch: few take as long to score as many, and too many take memory."""
RowPairs = tuple[np.ndarray, np.ndarray]
"""Row numbers (P,) of query items and of the database items found for them."""


class Engine(Protocol):
    """Anything that finds candidates."""

    name: str
    exact: bool
    """Every pair that reaches the score floor is among the candidates, by construction."""
    symmetric: bool
    """A candidate counts for both its items; else only query items learn their neighbours."""
    vectors: ItemVectors
    stats: CoarsePassStats
    loaded: OrderedDict[int, Any]
    """What is in memory, by number of block or shard; it may be cleared between block pairs."""
    block_rows: list[Any]
    """Ascending row numbers, a range or (n,), of each query block; if symmetric, of each block."""
    block_pairs: list[BlockPair]
    disjoint_area: int
    """Unordered pairs that no block pair holds because the items have no common modality."""

    def candidates(
        self, block_pair: BlockPair, score_floor: float, nearest: Nearest | None = None
    ) -> Iterator[RowPairs]:
        """Batches of (query, database) row numbers (P,): all that score `score_floor` or more.

        With `nearest` also all that may be among the best k of its items. What the caller adds to
        it between two batches raises the scores that the next candidates must reach.
        """
        ...

    def stored_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Stored rows of a modality, float64 (n, D), at least for the last candidates' items."""
        ...


@dataclass
class _LoadedBlock:
    """A block in memory: its rows (n, D) float32 by modality, and its chunks by their form."""

    stored: dict[str, np.ndarray]
    chunks: dict[tuple[tuple[str, ...], str], list[Chunk]] = field(default_factory=dict)


class GemmEngine:
    """Multiplies blocks of the stored rows with each other, every unordered pair of them once."""

    name, exact, symmetric = "gemm", True, True

    def __init__(
        self, vectors: ItemVectors, blocks: list[Block], kernel: Kernel, held: int = 2
    ) -> None:
        """At most `held` (2 or more) of the blocks stay in memory."""
        use_threads()
        self.vectors, self.blocks, self.kernel = vectors, blocks, kernel
        self.block_rows = [block.rows for block in blocks]
        self.stats, self.disjoint_area = CoarsePassStats(), disjoint_area(vectors)
        self._held, self._current = held, set[int]()
        self.loaded: OrderedDict[int, _LoadedBlock] = OrderedDict()
        self.block_pairs: list[BlockPair] = []
        for a, one in enumerate(blocks):
            partners = [b for b in range(a, len(blocks)) if common_modalities(one, blocks[b])]
            # Ascending, those of the next block descending: one block changes at a time.
            for b in partners if a % 2 == 0 else reversed(partners):
                area = len(one) * (len(one) + 1) // 2 if a == b else len(one) * len(blocks[b])
                self.block_pairs.append(BlockPair(len(self.block_pairs), a, b, area))

    def candidates(
        self, block_pair: BlockPair, score_floor: float, nearest: Nearest | None = None
    ) -> Iterator[RowPairs]:
        query, database = block_pair.query, block_pair.database
        self._current = {query, database}
        common = common_modalities(self.blocks[query], self.blocks[database])
        queries = self._chunks(query, common, "query", keep=database)
        others = self._chunks(database, common, "database", keep=query)
        waiting: list[Candidates] = []
        count = 0
        for m, one in enumerate(queries):
            for n, other in enumerate(others[m:] if query == database else others):
                same = query == database and n == 0
                at, by, values = candidates_of(
                    self.kernel, one, other, same, score_floor, nearest, self.stats
                )
                waiting.append((one.ids[at], other.ids[by], values))
                count += len(at)
                # Neighbours that are scored at once raise the bounds of the next product.
                if count >= (BATCH if nearest is None else 1):
                    yield from self._batches(waiting)
                    waiting, count = [], 0
            if nearest is not None:  # the first products of a row have many candidates, then few
                trim_allocators()
        if count:
            yield from self._batches(waiting)

    def _batches(self, waiting: list[Candidates]) -> Iterator[RowPairs]:
        """The candidates of some products together; some of their scores are checked."""
        if len(waiting) == 1:  # of a single product, which may be large, no copy is made
            i, j, values = waiting[0]
        else:
            i, j, values = (np.concatenate(side) for side in zip(*waiting, strict=True))
        some = np.linspace(0, len(i) - 1, min(CHECKED, len(i))).astype(np.int64)
        truth = self.vectors.scores(i[some], j[some], self.stored_rows)["score"]
        self.stats.add(truth, values[some])
        for start in range(0, len(i), LARGEST_BATCH):
            yield i[start : start + LARGEST_BATCH], j[start : start + LARGEST_BATCH]

    def stored_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        # All of them lie in the blocks of the current block pair.
        out = np.empty((len(rows), self.vectors.modalities[name].rows.width), np.float64)
        for number in self._current:
            ids, loaded = self.blocks[number].rows, self.loaded[number]
            if isinstance(ids, range):
                mine = (rows >= ids.start) & (rows < ids.stop)
                place = rows[mine] - ids.start
            else:
                place = np.searchsorted(ids, rows).clip(max=len(ids) - 1)
                mine = ids[place] == rows
                place = place[mine]
            if mine.any():
                out[mine] = loaded.stored[name][place]
        return out

    def _chunks(self, number: int, common: tuple[str, ...], form: Form, keep: int) -> list[Chunk]:
        """The chunks of a block over the `common` modalities, prepared in one form.

        A block that is not in memory is read; of the others in memory the block `keep` stays.
        """
        block, vectors, kernel = self.blocks[number], self.vectors.modalities, self.kernel
        if number not in self.loaded:
            drop = [n for n in self.loaded if n != keep]
            while len(self.loaded) >= self._held and drop:
                del self.loaded[drop.pop(0)]
            stored = {}
            for name in block.modalities:
                # torch widens ten times as fast as NumPy.
                values = torch.from_numpy(read_rows(vectors[name].rows, block.rows)).float().numpy()
                stored[name] = check_rows(vectors[name], block.rows, values)
            self.loaded[number] = _LoadedBlock(stored)
        self.loaded.move_to_end(number)
        loaded, key = self.loaded[number], (common, "any" if kernel.one_form else form)
        if key not in loaded.chunks:
            total = sum(vectors[name].weight for name in common)
            chunks = loaded.chunks[key] = []
            for start in range(0, len(block), CHUNK):
                stored = {name: loaded.stored[name][start : start + CHUNK] for name in common}
                weighted = [(vectors[name].weight / total, stored[name]) for name in common]
                prepared = kernel.prepare(weighted_rows(self.vectors, common, stored), form)
                chunks.append(Chunk(block.ids(start, start + CHUNK), prepared, weighted))
        return loaded.chunks[key]
