"""The candidates of a block product: the pairs whose score may be wanted.

The products of a kernel are cheap and have a wide margin. What comes within that margin is
multiplied again over the float32 rows, pair by pair, without laying them side by side (FAISS's
indexed inner product). What that leaves is within rounding of wanted, and goes to the scores that
decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_train.matching.kernels import Kernel, Prepared, rounding
from dist_train.matching.nearest import Nearest

WIDE = 1e-3
"""Margins above this are worth a second look; what is left at less is nearly all wanted."""
STRIP = 256
"""Rows of a product that are compared at a time."""
Candidates = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places (P,) in the one side and in the other, and the products (P,) found there."""


@dataclass
class FirstPass:
    """What the first pass was seen to do: proof that its margin holds."""

    error: float = 0.0
    """Largest difference from the true product among those looked at."""
    margin: float = 0.0
    """Largest that was allowed for."""
    checked: int = 0

    def note(self, truth: np.ndarray, values: np.ndarray) -> None:
        """Compare products (P,) with the truth."""
        difference = np.abs(truth.astype(np.float64) - values)
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


def candidates_of(
    kernel: Kernel,
    one: Side,
    other: Side,
    same: bool,
    floor: float,
    near: Nearest | None,
    seen: FirstPass,
) -> Candidates:
    """All places whose score may reach `floor`, or be among the best of an item in `near`.

    `same`: the sides are the same rows, each pair is given once and none of a row with itself.
    """
    products = kernel.product(one.prepared, other.prepared)
    margin = kernel.margin(one.prepared, other.prepared)
    seen.margin = max(seen.margin, margin)
    rows = columns = np.asarray(floor, np.float64)
    if near is not None:
        if same:
            products.fill_diagonal_(0 if products.dtype == torch.uint8 else -torch.inf)
        rows = np.minimum(floor, _floors(products, one.ids, 1, near, kernel, margin))
        columns = np.minimum(floor, _floors(products, other.ids, 0, near, kernel, margin))
    at, by = _at_least(products, kernel.steps(rows - margin), kernel.steps(columns - margin))
    if same:
        at, by = at[at < by], by[at < by]
    values = kernel.value(products[torch.from_numpy(at), torch.from_numpy(by)].cpu().numpy())
    if kernel.device.type == "cpu" and margin > WIDE:
        scores, off = _second_look(one, other, at, by)
        seen.note(scores, values)
        least = np.broadcast_to(rows, len(one.ids))[at]
        least = np.minimum(least, np.broadcast_to(columns, len(other.ids))[by])
        keep = scores >= least - off
        at, by, values = at[keep], by[keep], values[keep]
    return at, by, values


def _floors(
    products: torch.Tensor,
    ids: np.ndarray,
    axis: int,
    near: Nearest,
    kernel: Kernel,
    margin: float,
) -> np.ndarray:
    """The score (n,) that a neighbour of each item `ids` must reach; `axis` runs over neighbours.

    Of an item of which nothing is known yet it is bounded by the k-th best of these products.
    """
    floors = near.of(ids).astype(np.float64)
    missing = np.flatnonzero(np.isneginf(floors))
    if len(missing) and products.shape[axis] > near.k:
        some = products.index_select(1 - axis, torch.from_numpy(missing).to(products.device))
        best = torch.topk(some, near.k, dim=axis).values.select(axis, near.k - 1)
        floors[missing] = kernel.value(best.cpu().numpy()) - margin
    return floors


def _at_least(
    products: torch.Tensor, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places (P,), (P,) of products at the floor of their row or of their column.

    Of two floors () that are the same for all only the first is looked at.
    """
    if products.device.type != "cpu":
        reached = products >= torch.from_numpy(rows).to(products.device)[..., None]
        if rows.ndim:
            reached |= products >= torch.from_numpy(columns).to(products.device)
        at, by = reached.nonzero().cpu().numpy().T
        return at, by
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


def _second_look(
    one: Side, other: Side, at: np.ndarray, by: np.ndarray
) -> tuple[np.ndarray, float]:
    """Scores float64 (P,) from float32 products of the rows, and how far off they may be."""
    # Not before it is needed: a training's validation never is here, and its loaders fork.
    from dist_train.matching.faiss_library import faiss

    assert not len(at) or (at.max() < len(one.ids) and by.max() < len(other.ids))
    where = [np.ascontiguousarray(places, np.int64) for places in (at, by)]
    scores, dots, width = np.zeros(len(at)), np.empty(len(at), np.float32), 0
    for (weight, rows), (_, others) in zip(one.parts, other.parts, strict=True):
        assert all(side.dtype == np.float32 and side.flags.c_contiguous for side in (rows, others))
        pointers = [faiss.swig_ptr(x) for x in (rows, where[0], others, where[1], dots)]
        faiss.pairwise_indexed_inner_product(rows.shape[1], len(at), *pointers)
        scores += weight * dots
        width += rows.shape[1]
    return scores, rounding(width + 16) * one.prepared.length * other.prepared.length
