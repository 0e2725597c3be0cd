"""What an engine is, and the one that multiplies blocks of the stored rows.

An engine may propose too much, never too little; the scores of ItemVectors decide afterwards.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from dist_train.distributed.memory import trim_allocators
from dist_train.matching.blocks import CHUNK, Block, Tile, area_apart, common_parts, tiles_of
from dist_train.matching.coarse_pass import Candidates, FirstPass, Side, candidates_of
from dist_train.matching.kernels import Kernel
from dist_train.matching.nearest import Nearest
from dist_train.matching.rows import finite, read_rows
from dist_train.matching.threads import use_threads
from dist_train.matching.vectors import ItemVectors, weighted_rows

LOOKED_AT = 64
"""Candidates of a batch whose first score is compared with the one that decides."""
TOGETHER, MOST_TOGETHER = 16_384, 262_144
"""Candidates in a batch: to score a few takes as long as many, and many take room."""
Parts = tuple[str, ...]
Found = tuple[np.ndarray, np.ndarray]


class Engine(Protocol):
    """Anything that finds candidates."""

    name: str
    exact: bool
    """Every pair at the floor is proposed, by construction."""
    both_ways: bool
    """A found pair tells of both its items; else only the asking ones learn their neighbours."""
    seen: FirstPass
    tiles: list[Tile]
    apart: int
    """Unordered pairs that no tile holds because the two have no part in common."""

    def rows(self, tile: Tile) -> np.ndarray:
        """Ascending row numbers of the items whose neighbours the tile finds."""
        ...

    def candidates(self, tile: Tile, floor: float, near: Nearest | None = None) -> Iterator[Found]:
        """Batches of (asking, found) row numbers (P,): all that score `floor` or more.

        With `near` also all that may be among the best of its items. What the caller adds to it
        between two batches raises its floors.
        """
        ...

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Stored rows of a part, float64: those of the last candidates at the least."""
        ...

    def release(self) -> None:
        """Let go of what is in memory: all tiles are done."""
        ...


@dataclass
class _Loaded:
    """A block in memory: its rows float32, and its chunks as they are multiplied."""

    stored: dict[str, np.ndarray]
    sides: dict[tuple[Parts, str], list[Side]] = field(default_factory=dict)


class GemmEngine:
    """Multiplies blocks of the stored rows with each other, every unordered pair of them once."""

    name, exact, both_ways = "gemm", True, True

    def __init__(
        self,
        views: ItemVectors,
        blocks: list[Block],
        kernel: Kernel,
        held: int = 2,
        first_new: int = 0,
    ) -> None:
        """At most `held` (2 or more) of the blocks stay in memory.

        Pairs of rows that both lie before `first_new` are left out.
        """
        use_threads()
        self.views, self.blocks, self.kernel = views, blocks, kernel
        self.tiles = tiles_of(blocks, first_new)
        self.seen, self.apart = FirstPass(), area_apart(views, first_new)
        self._held, self._at = held, set[int]()
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()

    def rows(self, tile: Tile) -> np.ndarray:
        """See Engine."""
        ids = [self.blocks[n].ids() for n in {tile.asking, tile.asked}]
        return np.sort(np.concatenate(ids))

    def candidates(self, tile: Tile, floor: float, near: Nearest | None = None) -> Iterator[Found]:
        """See Engine."""
        one, other = self.blocks[tile.asking], self.blocks[tile.asked]
        self._at, parts = {tile.asking, tile.asked}, common_parts(one, other)
        left = self._sides(one, parts, "left", keep=tile.asked)
        right = self._sides(other, parts, "right", keep=tile.asking)
        waiting: list[Candidates] = []
        count = 0
        for m, a in enumerate(left):
            for n, b in enumerate(right):
                if tile.asking == tile.asked and n < m:
                    continue
                same = tile.asking == tile.asked and n == m
                at, by, values = candidates_of(self.kernel, a, b, same, floor, near, self.seen)
                waiting.append((a.ids[at], b.ids[by], values))
                count += len(at)
                # Neighbours that are scored at once raise the floors of the next product.
                if count >= (TOGETHER if near is None else 1):
                    yield from self._checked(waiting)
                    waiting, count = [], 0
            if near is not None:  # then the first products of a row leave much, of changing size
                trim_allocators()
        if count:
            yield from self._checked(waiting)

    def _checked(self, waiting: list[Candidates]) -> Iterator[Found]:
        """The candidates of some products together, some of their products beside the truth."""
        # A single product may leave as much as it holds: no copy of it.
        i, j, values = (
            waiting[0]
            if len(waiting) == 1
            else (np.concatenate(side) for side in zip(*waiting, strict=True))
        )
        some = np.linspace(0, len(i) - 1, min(LOOKED_AT, len(i))).astype(np.int64)
        self.seen.note(self.views.scores(i[some], j[some], self.take)["score"], values[some])
        for start in range(0, len(i), MOST_TOGETHER):
            yield i[start : start + MOST_TOGETHER], j[start : start + MOST_TOGETHER]

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """See Engine: from the blocks of the tile that is worked on."""
        out = np.empty((len(rows), self.views.parts[name].rows.width), np.float64)
        for number in self._at:
            ids, loaded = self.blocks[number].rows, self._loaded[number]
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

    def release(self) -> None:
        """See Engine."""
        self._loaded.clear()

    def _sides(self, block: Block, parts: Parts, side: str, keep: int) -> list[Side]:
        """The chunks of a block as the kernel multiplies them on the `side` left or right."""
        loaded = self._load(block, keep)
        if (parts, side) not in loaded.sides:
            prepare = self.kernel.left if side == "left" else self.kernel.right
            total = sum(self.views.parts[name].weight for name in parts)
            sides = loaded.sides[parts, side] = []
            for start in range(0, len(block), CHUNK):
                stored = {name: loaded.stored[name][start : start + CHUNK] for name in parts}
                weighted = [(self.views.parts[name].weight / total, stored[name]) for name in parts]
                prepared = prepare(weighted_rows(self.views, parts, stored))
                sides.append(Side(block.ids(start, start + CHUNK), prepared, weighted))
            if self.kernel.one_form:
                loaded.sides[parts, "right" if side == "left" else "left"] = sides
        return loaded.sides[parts, side]

    def _load(self, block: Block, keep: int) -> _Loaded:
        """The block from memory or from its files; of the others in memory `keep` stays."""
        if block.number not in self._loaded:
            drop = [n for n in self._loaded if n != keep]
            while len(self._loaded) >= self._held and drop:
                del self._loaded[drop.pop(0)]
            stored = {}
            for name in block.parts:
                rows = self.views.parts[name].rows
                # By torch, which widens ten times as fast as NumPy.
                values = torch.from_numpy(read_rows(rows, block.rows)).float().numpy()
                stored[name] = finite(rows, block.rows, values)
            self._loaded[block.number] = _Loaded(stored)
        self._loaded.move_to_end(block.number)
        return self._loaded[block.number]
