"""What an engine is, and the one that multiplies blocks of the stored rows.

An engine may propose too much, never too little; the scores of Views decide afterwards.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dist_train.matching.blocks import CHUNK, Block, Tile, area_apart, common_parts, tiles_of
from dist_train.matching.kernels import Prepared
from dist_train.matching.passes import FirstPass, Floors, Side, left_of_tile
from dist_train.matching.rows import finite, read_rows
from dist_train.matching.sketches import Sketch, weighted_rows, wide
from dist_train.matching.threads import use_threads
from dist_train.matching.views import Views
from dist_train.runtime import give_back

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

    def candidates(self, tile: Tile, floors: Floors) -> Iterator[Found]:
        """Batches of (asking, found) row numbers (P,)."""
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


@dataclass
class _Waiting:
    """Candidates of some products, to be scored together."""

    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    count: int = 0

    def add(self, i: np.ndarray, j: np.ndarray, values: np.ndarray) -> None:
        self.found.append((i, j, values))
        self.count += len(i)

    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All that waits; then nothing does."""
        found, self.found, self.count = self.found, [], 0
        if len(found) == 1:  # it may be as large as a product: no copy
            return found[0]
        i, j, values = (np.concatenate(side) for side in zip(*found, strict=True))
        return i, j, values


class GemmEngine:
    """Multiplies blocks of the stored rows with each other, every unordered pair of them once."""

    name, exact, both_ways = "gemm", True, True

    def __init__(
        self, views: Views, blocks: list[Block], sketches: dict[Parts, Sketch], held: int = 2,
        first_new: int = 0,
    ) -> None:  # fmt: skip
        """`sketches` by the parts compared; at most `held` (2 or more) blocks stay in memory.

        Pairs of rows that both lie before `first_new` are left out.
        """
        use_threads()
        self.views, self.blocks, self.sketches = views, blocks, sketches
        self.tiles = tiles_of(blocks, first_new)
        self.seen, self.apart = FirstPass(), area_apart(views, first_new)
        self._held, self._at = held, set[int]()
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()

    def rows(self, tile: Tile) -> np.ndarray:
        """See Engine."""
        ids = [self.blocks[n].ids() for n in {tile.asking, tile.asked}]
        return np.sort(np.concatenate(ids))

    def candidates(self, tile: Tile, floors: Floors) -> Iterator[Found]:
        """See Engine."""
        one, other = self.blocks[tile.asking], self.blocks[tile.asked]
        self._at = {tile.asking, tile.asked}
        parts = common_parts(one, other)
        sketch = self.sketches[parts]
        left = self._sides(one, parts, "left", keep=tile.asked)
        right = self._sides(other, parts, "right", keep=tile.asking)
        waiting = _Waiting()
        for m, a in enumerate(left):
            for n, b in enumerate(right):
                if tile.asking == tile.asked and n < m:
                    continue
                same = tile.asking == tile.asked and n == m
                waiting.add(*self._left(sketch, a, b, same, floors))
                # Neighbours that are scored at once raise the floors of the next product.
                if waiting.count >= (1 if floors.k else TOGETHER):
                    yield from self._looked_at(sketch, waiting)
            if floors.k:  # then the first products of a row leave much, of changing size
                give_back()
        if waiting.count:
            yield from self._looked_at(sketch, waiting)

    def _left(
        self, sketch: Sketch, a: Side, b: Side, same: bool, floors: Floors
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers (P,), (P,) that a product leaves, and their first values."""
        at, by, values = left_of_tile(sketch, a, b, same, floors, self.seen)
        return a.ids[at], b.ids[by], values

    def _looked_at(self, sketch: Sketch, waiting: _Waiting) -> Iterator[Found]:
        i, j, values = waiting.all()
        some = np.linspace(0, len(i) - 1, min(LOOKED_AT, len(i))).astype(np.int64)
        truth = self.views.scores(i[some], j[some], self.take)["score"]
        self.seen.note(truth, values[some], sketch.cuts)
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
        loaded = self._load(block, keep)
        if (parts, side) not in loaded.sides:
            sketch = self.sketches[parts]
            prepare = sketch.left if side == "left" else sketch.right
            loaded.sides[parts, side] = [
                self._side(block, loaded, parts, start, prepare)
                for start in range(0, len(block), CHUNK)
            ]
            if sketch.kernel.one_form:
                other = "right" if side == "left" else "left"
                loaded.sides[parts, other] = loaded.sides[parts, side]
        return loaded.sides[parts, side]

    def _side(
        self, block: Block, loaded: _Loaded, parts: Parts, start: int,
        prepare: Callable[[np.ndarray], Prepared],
    ) -> Side:  # fmt: skip
        stored = {name: loaded.stored[name][start : start + CHUNK] for name in parts}
        total = sum(self.views.parts[name].weight for name in parts)
        return Side(
            block.ids(start, start + CHUNK),
            prepare(weighted_rows(self.views, parts, stored)),
            [(self.views.parts[name].weight / total, stored[name]) for name in parts],
        )

    def _load(self, block: Block, keep: int) -> _Loaded:
        if block.number not in self._loaded:
            drop = [n for n in self._loaded if n != keep]
            while len(self._loaded) >= self._held and drop:
                del self._loaded[drop.pop(0)]
            self._loaded[block.number] = _Loaded({
                part: finite(rows, block.rows, wide(read_rows(rows, block.rows)))
                for part in block.parts for rows in [self.views.parts[part].rows]
            })  # fmt: skip
        self._loaded.move_to_end(block.number)
        return self._loaded[block.number]
