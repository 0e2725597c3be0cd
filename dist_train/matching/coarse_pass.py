"""The coarse pass: candidates of a block product, the pairs whose score may be high enough.

The products of a kernel are cheap and have a wide margin. A pair that reaches its score floor
within that margin is multiplied again over the float32 rows, without copying them side by side
(FAISS's indexed inner product). What remains is within rounding of the floor and goes on to the
exact scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_train.matching.kernels import Kernel, Prepared, sum_error
from dist_train.matching.nearest import Nearest

WIDE = 1e-3
"""With margins above this candidates are re-computed; below, nearly all of them are wanted."""
STRIP = 256
"""Rows of a product that are compared at a time."""
Candidates = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions (P,) among the query rows and among the database rows, and coarse scores (P,)."""


@dataclass
class CoarsePassStats:
    """Observed errors of the coarse pass: evidence that its margin holds."""

    error: float = 0.0
    """Largest difference from the true score among the products that were checked."""
    margin: float = 0.0
    """Largest margin that was allowed for."""
    checked: int = 0

    def add(self, truth: np.ndarray, values: np.ndarray) -> None:
        """Compare coarse scores (P,) with true ones; those that are not finite do not count."""
        difference = np.abs(truth.astype(np.float64) - values)
        difference = difference[np.isfinite(difference)]
        self.checked += len(difference)
        self.error = max(self.error, float(difference.max(initial=0.0)))


@dataclass(frozen=True)
class Chunk:
    """Some rows of a block, as a kernel multiplies them and as they are stored."""

    ids: np.ndarray
    """Row numbers int64 (n,)."""
    prepared: Prepared
    modalities: Sequence[tuple[float, np.ndarray]]
    """Weight and stored rows float32 (n, D) of each modality; the weights sum to one."""


def candidates_of(
    kernel: Kernel,
    queries: Chunk,
    database: Chunk,
    same: bool,
    score_floor: float,
    nearest: Nearest | None,
    stats: CoarsePassStats,
) -> Candidates:
    """All pairs whose score may reach `score_floor` or be among the best of an item in `nearest`.

    `same`: both chunks are the same rows; each pair is then given once, self-matches are left out.
    """
    products = kernel.product(queries.prepared, database.prepared)
    margin = kernel.margin(queries.prepared, database.prepared)
    stats.margin = max(stats.margin, margin)
    # The score that a pair must reach for its query item (n,), and for its database item (m,).
    rows = columns = np.asarray(score_floor, np.float64)
    if nearest is not None:
        if same:
            products.fill_diagonal_(0 if products.dtype == torch.uint8 else -torch.inf)
        bounds = []
        for chunk, axis in ((queries, 1), (database, 0)):
            places = np.searchsorted(nearest.rows, chunk.ids)  # the items of both chunks are there
            kth_best = nearest.kth_best[places].astype(np.float64)
            # For items without k neighbours yet, the k-th best of these products is a bound.
            missing = np.flatnonzero(np.isneginf(kth_best))
            if len(missing) and products.shape[axis] > nearest.k:
                lines = torch.from_numpy(missing).to(products.device)
                some = products.index_select(1 - axis, lines)
                best = torch.topk(some, nearest.k, dim=axis).values.select(axis, nearest.k - 1)
                kth_best[missing] = kernel.to_scores(best.cpu().numpy()) - margin
            bounds.append(np.minimum(score_floor, kth_best))
        rows, columns = bounds
    lowest = kernel.to_products(rows - margin), kernel.to_products(columns - margin)
    at, by = _at_least(products, *lowest)
    if same:
        at, by = at[at < by], by[at < by]
    values = products[torch.from_numpy(at), torch.from_numpy(by)].cpu().numpy()
    values = kernel.to_scores(values)
    if kernel.device.type == "cpu" and margin > WIDE:
        scores, off = _recomputed(queries, database, at, by)
        stats.add(scores, values)
        least = np.broadcast_to(rows, len(queries.ids))[at]
        least = np.minimum(least, np.broadcast_to(columns, len(database.ids))[by])
        keep = scores >= least - off
        at, by, values = at[keep], by[keep], values[keep]
    return at, by, values


def _at_least(
    products: torch.Tensor, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (P,), (P,) of products that reach the bound of their row or of their column.

    `rows` (n,) and `columns` (m,) are the bounds; if they are scalars, one bound holds for all.
    """
    if products.device.type != "cpu":
        reached = products >= torch.from_numpy(rows).to(products.device)[..., None]
        if rows.ndim:
            reached |= products >= torch.from_numpy(columns).to(products.device)
        at, by = reached.nonzero().cpu().numpy().T
        return at, by
    values, found = products.numpy(), []
    # In strips, so that the masks stay in the cache.
    masks = np.empty((2, STRIP, values.shape[1]), bool)
    for start in range(0, len(values), STRIP):
        strip = values[start : start + STRIP]
        reached, more = masks[:, : len(strip)]
        if rows.ndim:
            np.greater_equal(strip, rows[start : start + STRIP, None], out=reached)
            np.greater_equal(strip, columns[None], out=more)
            reached |= more
        else:
            np.greater_equal(strip, rows, out=reached)
        found.append(np.flatnonzero(reached) + start * values.shape[1])
    return np.divmod(np.concatenate(found), values.shape[1])


def _recomputed(
    queries: Chunk, database: Chunk, at: np.ndarray, by: np.ndarray
) -> tuple[np.ndarray, float]:
    """Scores float64 (P,) from float32 products of the stored rows, and their largest error."""
    # Imported only here: a training's validation never comes here, and its loaders fork.
    from dist_train.matching.faiss_library import faiss

    assert not len(at) or (at.max() < len(queries.ids) and by.max() < len(database.ids))
    where = [np.ascontiguousarray(places, np.int64) for places in (at, by)]
    scores, dots, width = np.zeros(len(at)), np.empty(len(at), np.float32), 0
    both = zip(queries.modalities, database.modalities, strict=True)
    for (weight, rows), (_, others) in both:
        assert all(side.dtype == np.float32 and side.flags.c_contiguous for side in (rows, others))
        pointers = [faiss.swig_ptr(x) for x in (rows, where[0], others, where[1], dots)]
        faiss.pairwise_indexed_inner_product(rows.shape[1], len(at), *pointers)
        scores += weight * dots
        width += rows.shape[1]
    return scores, sum_error(width + 16) * queries.prepared.length * database.prepared.length
