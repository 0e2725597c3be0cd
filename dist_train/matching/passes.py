"""What a first pass leaves of a tile: the places whose score may be wanted.

The products of a sketch are cheap and have a wide margin. What they leave is multiplied again over
all columns in float32, pair by pair, without laying the rows side by side (FAISS's indexed inner
product). What that leaves is within rounding of wanted, and goes to the scores that decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dist_train.matching.kernels import Kernel, Prepared, rounding
from dist_train.matching.sketches import Sketch

WIDE = 1e-3
"""Margins above this are worth a second look; what is left at less is nearly all wanted."""
STRIP = 256
"""Rows of a product that are compared at a time."""
Places = tuple[np.ndarray, np.ndarray]


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

    def among(self, rows: np.ndarray) -> int:
        """How many of the best among `rows` hold the k best that count: canaries do not."""
        ...


@dataclass
class FirstPass:
    """What the first pass was seen to do: proof that its margin holds."""

    error: float = 0.0
    """Largest difference from the true product among those looked at."""
    margin: float = 0.0
    """Largest that was allowed for."""
    checked: int = 0

    def note(self, truth: np.ndarray, values: np.ndarray, only_above: bool) -> None:
        """Compare products (P,) with the truth; `only_above`: they are bounds from above."""
        difference = truth.astype(np.float64) - values
        difference = difference if only_above else np.abs(difference)
        difference = difference[np.isfinite(difference)]
        self.checked += len(difference)
        self.error = max(self.error, float(difference.max(initial=0.0)))


@dataclass(frozen=True)
class Side:
    """Some rows of a tile: as the kernel multiplies them, and as they are."""

    ids: np.ndarray
    """Row numbers int64 (n,)."""
    prepared: Prepared
    parts: Sequence[tuple[float, np.ndarray]]
    """Weight and stored rows float32 (n, D) of each part; the weights sum to one."""


def left_of_tile(
    sketch: Sketch, one: Side, other: Side, same: bool, floors: Floors, seen: FirstPass
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (P,), (P,) in the two sides that may be wanted, and their first products (P,).

    `same`: the sides are the same rows, each pair is given once and none of a row with itself.
    """
    kernel, a, b = sketch.kernel, one.prepared, other.prepared
    products, margin = kernel.product(a, b), sketch.margin(a, b)
    seen.margin = max(seen.margin, margin)
    rows, columns = floors.nearest(one.ids), floors.nearest(other.ids)
    if rows is not None and columns is not None:
        if same:
            products.fill_diagonal_(0 if products.dtype == torch.uint8 else -torch.inf)
        wanted = floors.among(other.ids), floors.among(one.ids)
        rows = np.maximum(rows, _kth(products, rows, 1, wanted[0], kernel, margin))
        columns = np.maximum(columns, _kth(products, columns, 0, wanted[1], kernel, margin))
    least = _least(floors.pair(), rows, columns)
    at, by = _at_least(products, *(kernel.steps(np.asarray(x, np.float64) - margin) for x in least))
    if same:
        at, by = at[at < by], by[at < by]
    found = products[torch.from_numpy(at), torch.from_numpy(by)].cpu().numpy()
    values = kernel.value(found)
    if kernel.device.type == "cpu" and (sketch.cuts or margin > WIDE):
        scores, off = _second_look(one, other, at, by)
        seen.note(scores, values, sketch.cuts)
        keep = scores >= np.minimum(_of(least[0], at), _of(least[1], by)) - off
        at, by, values = at[keep], by[keep], values[keep]
    return at, by, values


def _second_look(
    one: Side, other: Side, at: np.ndarray, by: np.ndarray
) -> tuple[np.ndarray, float]:
    """Scores float64 (P,) of float32 products over all columns, and how far off they may be."""
    scores, columns = np.zeros(len(at)), 0
    for (weight, rows), (_, others) in zip(one.parts, other.parts, strict=True):
        scores += weight * _products_at(rows, others, at, by)
        columns += rows.shape[1]
    return scores, rounding(columns + 16) * one.prepared.length * other.prepared.length


def _products_at(
    rows: np.ndarray, others: np.ndarray, at: np.ndarray, by: np.ndarray
) -> np.ndarray:
    """Inner products float32 (P,) of rows[at] and others[by], both float32 and contiguous."""
    # Not before it is needed: a training's validation never is here, and its loaders fork.
    from dist_train.matching.faiss_library import faiss

    out = np.empty(len(at), np.float32)
    assert all(side.dtype == np.float32 and side.flags.c_contiguous for side in (rows, others))
    assert not len(at) or (at.max() < len(rows) and by.max() < len(others))
    where = [np.ascontiguousarray(places, np.int64) for places in (at, by)]
    pointers = [faiss.swig_ptr(x) for x in (rows, where[0], others, where[1], out)]
    faiss.pairwise_indexed_inner_product(rows.shape[1], len(at), *pointers)
    return out


def _of(floors: np.ndarray | float, places: np.ndarray) -> np.ndarray | float:
    return floors[places] if isinstance(floors, np.ndarray) and floors.ndim else floors


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


def _at_least(products: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> Places:
    """Places (P,), (P,) of products at the floor of their row or of their column."""
    if products.device.type != "cpu":
        return _at_least_on_device(products, rows, columns)
    values, found = products.numpy(), []
    # In strips, so that what is compared stays near the processor.
    room = np.empty((2, STRIP, values.shape[1]), bool)
    for start in range(0, len(values), STRIP):
        strip = values[start : start + STRIP]
        reached, more = room[:, : len(strip)]
        if rows.ndim:
            np.greater_equal(strip, rows[start : start + STRIP, None], out=reached)
            np.greater_equal(strip, columns[None], out=more)
            reached |= more
        else:
            np.greater_equal(strip, rows, out=reached)
        found.append(np.flatnonzero(reached) + start * values.shape[1])
    return np.divmod(np.concatenate(found), values.shape[1])


def _at_least_on_device(products: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> Places:
    least = torch.from_numpy(np.asarray(rows)).to(products.device)
    if rows.ndim:
        reached = products >= least[:, None]
        reached |= products >= torch.from_numpy(columns).to(products.device)
    else:
        reached = products >= least
    at, by = reached.nonzero().cpu().numpy().T
    return at, by
