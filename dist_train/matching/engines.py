"""What an engine is, and the one that multiplies blocks of the stored rows.

An engine may propose too much, never too little; the scores of Views decide afterwards.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from dist_train.matching.blocks import CHUNK, Block, Tile, area_apart, common_parts, tiles_of
from dist_train.matching.kernels import Kernel, Prepared
from dist_train.matching.rows import read_rows
from dist_train.matching.sketches import Sketch, weighted_rows
from dist_train.matching.views import Views

Parts = tuple[str, ...]
Found = tuple[np.ndarray, np.ndarray]


class Floors(Protocol):
    """What is wanted of a tile just now; it rises while the tile is worked on."""

    k: int
    """Neighbours wanted of every item."""

    def pair(self) -> float:
        """Pairs at this score or above."""
        ...

    def nearest(self, rows: np.ndarray) -> np.ndarray | None:
        """Of each of `rows`, neighbours at these scores or above; None: no neighbours."""
        ...


@dataclass
class FirstPass:
    """What the first pass was seen to do: proof that its margin holds."""

    error: float = 0.0
    """Largest difference from the true product among those looked at."""
    margin: float = 0.0
    """Largest that was allowed for."""
    checked: int = 0


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


@dataclass
class _Loaded:
    """A block in memory: the stored rows, and the prepared chunks by (parts, side)."""

    stored: dict[str, np.ndarray]
    chunks: dict[tuple[Parts, str], list[Prepared]] = field(default_factory=dict)


class GemmEngine:
    """Multiplies blocks of the stored rows with each other, every unordered pair of them once."""

    name, exact, both_ways = "gemm", True, True

    def __init__(
        self, views: Views, blocks: list[Block], sketches: dict[Parts, Sketch], held: int = 2
    ) -> None:
        """`sketches` by the parts compared; at most `held` (2 or more) blocks stay in memory."""
        self.views, self.blocks, self.sketches = views, blocks, sketches
        self.tiles = tiles_of(blocks)
        self.seen, self.apart = FirstPass(), area_apart(views)
        self._held = held
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()

    def rows(self, tile: Tile) -> np.ndarray:
        """See Engine."""
        ids = [self.blocks[n].ids() for n in {tile.asking, tile.asked}]
        return np.sort(np.concatenate(ids))

    def candidates(self, tile: Tile, floors: Floors) -> Iterator[Found]:
        """See Engine."""
        one, other = self.blocks[tile.asking], self.blocks[tile.asked]
        parts = common_parts(one, other)
        sketch = self.sketches[parts]
        left = self._chunks(one, parts, "left", keep=tile.asked)
        right = self._chunks(other, parts, "right", keep=tile.asking)
        for m, a in enumerate(left):
            for n, b in enumerate(right):
                if tile.asking == tile.asked and n < m:
                    continue
                same = tile.asking == tile.asked and n == m
                found = self._product(
                    sketch,
                    a,
                    b,
                    one.ids(m * CHUNK, m * CHUNK + a.rows),
                    other.ids(n * CHUNK, n * CHUNK + b.rows),
                    same,
                    floors,
                )
                if len(found[0]):
                    self._look(sketch, found)
                    yield found[:2]

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """See Engine: from the blocks in memory."""
        out = np.empty((len(rows), self.views.parts[name].rows.width), np.float64)
        for number, loaded in self._loaded.items():
            ids = self.blocks[number].rows
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

    def _chunks(self, block: Block, parts: Parts, side: str, keep: int) -> list[Prepared]:
        loaded = self._load(block, keep)
        if (parts, side) not in loaded.chunks:
            sketch = self.sketches[parts]
            prepare = sketch.left if side == "left" else sketch.right
            loaded.chunks[parts, side] = [
                prepare(weighted_rows(self.views, parts, _cut(loaded.stored, start)))
                for start in range(0, len(block), CHUNK)
            ]
            if sketch.kernel.one_form:
                other = "right" if side == "left" else "left"
                loaded.chunks[parts, other] = loaded.chunks[parts, side]
        return loaded.chunks[parts, side]

    def _load(self, block: Block, keep: int) -> _Loaded:
        if block.number not in self._loaded:
            drop = [n for n in self._loaded if n != keep]
            while len(self._loaded) >= self._held and drop:
                del self._loaded[drop.pop(0)]
            self._loaded[block.number] = _Loaded({
                part: read_rows(self.views.parts[part].rows, block.rows) for part in block.parts
            })  # fmt: skip
        self._loaded.move_to_end(block.number)
        return self._loaded[block.number]

    def _product(
        self, sketch: Sketch, a: Prepared, b: Prepared, i: np.ndarray, j: np.ndarray,
        same: bool, floors: Floors,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        kernel = sketch.kernel
        products, margin = kernel.product(a, b), kernel.margin(a, b)
        self.seen.margin = max(self.seen.margin, margin)
        rows, columns = floors.nearest(i), floors.nearest(j)
        if rows is not None and columns is not None:
            if same:
                products.fill_diagonal_(0 if products.dtype == torch.uint8 else -torch.inf)
            rows = np.maximum(rows, _kth(products, rows, 1, floors.k, kernel, margin))
            columns = np.maximum(columns, _kth(products, columns, 0, floors.k, kernel, margin))
        least = _least(floors.pair(), rows, columns)
        steps = [kernel.steps(np.asarray(x, np.float64) - margin) for x in least]
        at, by = _at_least(products, *steps)
        if same:
            at, by = at[at < by], by[at < by]
        values = products[torch.from_numpy(at), torch.from_numpy(by)].cpu().numpy()
        return i[at], j[by], kernel.value(values)

    def _look(self, sketch: Sketch, found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Compare some products with the truth; those of cut rows are bounds from above only."""
        i, j, values = (side[:8] for side in found)
        difference = self.views.scores(i, j, self.take)["score"].astype(np.float64) - values
        if sketch.columns is None:
            difference = np.abs(difference)
        difference = difference[np.isfinite(difference)]
        self.seen.checked += len(difference)
        self.seen.error = max(self.seen.error, float(difference.max(initial=0.0)))


def _least(
    pair: float, rows: np.ndarray | None, columns: np.ndarray | None
) -> tuple[np.ndarray | float, np.ndarray | float]:
    if rows is None or columns is None:
        return pair, pair
    return np.minimum(rows, pair), np.minimum(columns, pair)


def _kth(
    products: torch.Tensor, known: np.ndarray, axis: int, k: int, kernel: Kernel, margin: float
) -> np.ndarray:
    """A lower bound on the k-th best score of the items without one, from these products alone."""
    missing = np.flatnonzero(np.isneginf(known))
    out = np.full(len(known), -np.inf)
    if len(missing) and products.shape[axis] > k:
        some = products.index_select(1 - axis, torch.from_numpy(missing).to(products.device))
        best = torch.topk(some, k, dim=axis).values.select(axis, k - 1)
        out[missing] = kernel.value(best.cpu().numpy()) - margin
    return out


def _at_least(products: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> Found:
    """Places (P,), (P,) of products at the floor of their row or of their column.

    The largest of each row first: most rows have nothing to look for.
    """
    at, by = _rows_at_least(products, rows)
    if rows.ndim:
        by2, at2 = _rows_at_least(products.T, columns)
        both = np.unique(np.concatenate([at, at2]) * products.shape[1] + np.concatenate([by, by2]))
        at, by = both // products.shape[1], both % products.shape[1]
    return at, by


def _rows_at_least(products: torch.Tensor, floors: np.ndarray) -> Found:
    least = torch.from_numpy(np.asarray(floors)).to(products.device)
    high = (products.amax(1) >= least).nonzero()[:, 0]
    some = products.index_select(0, high)
    reached = some >= (least[high][:, None] if least.ndim else least)
    if reached.device.type == "cpu":  # NumPy finds the few true ones ten times as fast
        flat = np.flatnonzero(reached.contiguous().numpy())
        return high.numpy()[flat // reached.shape[1]], flat % reached.shape[1]
    where = reached.nonzero()
    return high[where[:, 0]].cpu().numpy(), where[:, 1].cpu().numpy()


def _cut(stored: dict[str, np.ndarray], start: int) -> dict[str, np.ndarray]:
    return {name: rows[start : start + CHUNK] for name, rows in stored.items()}
