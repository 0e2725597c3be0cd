"""The coarse pass: products of low precision, and the pairs whose score may be high enough.

A kernel's products are cheap and have a wide, proven margin. A pair that reaches its score floor
within that margin is multiplied again over the float32 rows, without copying them side by side
(FAISS's indexed inner product). What remains is within rounding of the floor and goes on to the
exact scores.

With x^ the rounded form of a row x and d_x = |x - x^| measured row by row, Cauchy-Schwarz gives
|x.y - x^.y^| <= d_x |y| + |x^| d_y. The sum itself, in float32 and in any order, is off by at most
n u / (1 - n u) |x^| |y^|, u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
"""

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from dist_train.matching.nearest import Nearest

U = 2.0**-24
Form = Literal["query", "database"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 3}
"""Bytes of a number of a row as each kernel multiplies it; for int8 the query form, the database
form and what the allocator loses between so many arrays of their size (measured)."""
WIDE = 1e-3
"""With margins above this candidates are re-computed; below, nearly all of them are wanted."""
STRIP = 256
"""Rows of a product that are compared at a time."""
Candidates = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions (P,) among the query rows and among the database rows, and coarse scores (P,)."""


@dataclass(frozen=True)
class Prepared:
    """Rows (n, D) as a kernel multiplies them; the largest length and rounding error of a row."""

    values: Any
    """A tensor; of the integer kernel's database rows torch's packed weights."""
    rows: int
    width: int
    length: float
    error: float


class Kernel:
    """Multiplies rows in float32, on CPUs that have it in bfloat16, on GPUs in float16."""

    one_form = True
    """Query and database rows are prepared alike."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.name = str(dtype).removeprefix("torch.")
        self._memory = np.empty(0, np.float32)
        # Off by default only in the newest versions; when on, sums are rounded to float16.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False

    def prepare(self, rows: np.ndarray, form: Form) -> Prepared:
        """Rows float32 (n, D) in the form in which they are multiplied."""
        exact, error = torch.from_numpy(rows), 0.0
        values = exact.to(self.dtype)
        if self.dtype != torch.float32:
            error = float((exact.double() - values.double()).norm(dim=1).max())
        return Prepared(values.to(self.device), len(rows), rows.shape[1], _longest(rows), error)

    def product(self, queries: Prepared, database: Prepared) -> torch.Tensor:
        """Products (n, m), for `to_scores` and `to_products`; valid until the next product."""
        left, right = queries.values, database.values
        if self.device.type == "cuda":
            return torch.mm(left, right.T, out_dtype=torch.float32)
        if self.dtype != torch.float32:
            return torch.mm(left, right.T).float()
        # The same memory for every product: fresh pages would cost as much as reading them.
        if self._memory.size < queries.rows * database.rows:
            self._memory = np.empty(queries.rows * database.rows, np.float32)
        out = self._memory[: queries.rows * database.rows].reshape(queries.rows, database.rows)
        # NumPy's BLAS: torch's takes three times as long on some processors.
        np.matmul(left.numpy(), right.numpy().T, out=out)
        return torch.from_numpy(out)

    def margin(self, queries: Prepared, database: Prepared) -> float:
        """The most by which the score of a product of these rows may differ from the true one."""
        lengths, rounded = _error_bounds(queries, database)
        # 16 more roundings than products: of weights, of the rows, of the score.
        share = sum_error(queries.width + 16)
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            share += 2.0**-8  # the product itself is rounded to bfloat16
        return share * lengths + rounded

    def to_products(self, scores: np.ndarray) -> np.ndarray:
        """The lowest products that stand for `scores` or more."""
        return np.asarray(scores, np.float32)

    def to_scores(self, products: np.ndarray) -> np.ndarray:
        """The scores that products stand for; -inf where a product is only an upper bound."""
        return products


class Int8Kernel(Kernel):
    """Eight-bit integers through torch's quantised product (FBGEMM, oneDNN), CPU only.

    Query rows have 7 bits: with 8 the pairwise sums of processors without VNNI would saturate.
    A product is one byte: steps of STEP from the score -ZERO STEP on, below which it is cut off
    and so an upper bound.
    """

    STEP, ZERO = 1 / 200, 50
    one_form = False

    def __init__(self) -> None:
        super().__init__(torch.int8, torch.device("cpu"))

    def prepare(self, rows: np.ndarray, form: Form) -> Prepared:
        most, zero, dtype = (63, 64, torch.quint8) if form == "query" else (127, 0, torch.qint8)
        scale = max(float(np.abs(rows).max()), 1e-6) / most
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.quantize_per_tensor(torch.from_numpy(rows), scale, zero, dtype)
            packed = values if form == "query" else torch.ops.quantized.linear_prepack(values, None)
        error = _longest(values.dequantize().numpy() - rows)
        return Prepared(packed, len(rows), rows.shape[1], _longest(rows), error)

    def product(self, queries: Prepared, database: Prepared) -> torch.Tensor:
        out = torch.ops.quantized.linear(queries.values, database.values, self.STEP, self.ZERO)
        # The bytes where they lie: int_repr would copy them into fresh pages.
        nothing = torch.empty(0, dtype=torch.uint8)
        return nothing.set_(out.untyped_storage(), 0, out.shape, out.stride())

    def margin(self, queries: Prepared, database: Prepared) -> float:
        lengths, rounded = _error_bounds(queries, database)
        # The integer sum is exact; one step is lost when it becomes a byte.
        return rounded + self.STEP + 16 * U * lengths

    def to_products(self, scores: np.ndarray) -> np.ndarray:
        found = np.floor(np.asarray(scores, np.float64) / self.STEP) + self.ZERO
        return np.clip(np.nan_to_num(found, neginf=0), 0, 255).astype(np.uint8)

    def to_scores(self, products: np.ndarray) -> np.ndarray:
        scores = (products.astype(np.float32) - self.ZERO) * np.float32(self.STEP)
        return np.where(products == 0, -np.inf, scores)


def _error_bounds(one: Prepared, other: Prepared) -> tuple[float, float]:
    """The largest |x^| |y^|, and the largest d_x |y| + |x^| d_y, of rows x and y of the two."""
    rounded = one.error * other.length + (one.length + one.error) * other.error
    return (one.length + one.error) * (other.length + other.error), rounded


def _longest(rows: np.ndarray) -> float:
    # Slightly more than the longest norm, which is itself computed in float32.
    return float(np.sqrt(np.einsum("nd,nd->n", rows, rows).max(initial=0))) * (1 + 1e-5)


def sum_error(n: int) -> float:
    """Largest relative error of a float32 sum of `n` products, in any order."""
    return n * U / (1 - n * U)


def kernels_for(device: torch.device, bf16: bool) -> list[Kernel]:
    """The kernels that work on `device`, float32 first on a CPU.

    The integer kernel is first checked against float64 here: on unit rows and on rows whose sums
    come near saturation its products must lie within its margin.
    """
    if device.type == "cuda":
        return [Kernel(torch.float16, device)]
    found: list[Kernel] = [Kernel(torch.float32, device)]
    found += [Kernel(torch.bfloat16, device)] if bf16 else []
    rng, kernel = np.random.default_rng(0), Int8Kernel()
    unit = rng.standard_normal((96, 136)).astype(np.float32)
    signs = np.where(rng.random((96, 136)) < 0.95, 1, -1).astype(np.float32)
    for rows in (unit, signs):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        try:
            queries, database = kernel.prepare(rows[:32], "query"), kernel.prepare(rows, "database")
            products = kernel.product(queries, database).numpy()
        except (RuntimeError, AttributeError, NotImplementedError):
            return found
        truth = rows[:32].astype(np.float64) @ rows.astype(np.float64).T
        truth, margin = np.minimum(truth, 1.02), kernel.margin(queries, database)
        too_low = products < kernel.to_products(truth - margin)
        if too_low.any() or (kernel.to_scores(products) > truth + margin).any():
            return found
    return [*found, kernel]


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
    rows, columns = (np.full(len(chunk.ids), score_floor) for chunk in (queries, database))
    if nearest is not None:
        if same:
            products.fill_diagonal_(0 if products.dtype == torch.uint8 else -torch.inf)
        for chunk, bounds, axis in ((queries, rows, 1), (database, columns, 0)):
            places = np.searchsorted(nearest.rows, chunk.ids)  # the items of both chunks are there
            kth_best = nearest.kth_best[places].astype(np.float64)
            # For items without k neighbours yet, the k-th best of these products is a bound.
            missing = np.flatnonzero(np.isneginf(kth_best))
            if len(missing) and products.shape[axis] > nearest.k:
                lines = torch.from_numpy(missing).to(products.device)
                some = products.index_select(1 - axis, lines)
                best = torch.topk(some, nearest.k, dim=axis).values.select(axis, nearest.k - 1)
                kth_best[missing] = kernel.to_scores(best.cpu().numpy()) - margin
            np.minimum(bounds, kth_best, out=bounds)
    lowest = None if nearest is None else kernel.to_products(columns - margin)
    at, by = _at_least(products, kernel.to_products(rows - margin), lowest)
    if same:
        at, by = at[at < by], by[at < by]
    values = kernel.to_scores(products[torch.from_numpy(at), torch.from_numpy(by)].cpu().numpy())
    if kernel.device.type == "cpu" and margin > WIDE:
        scores, off = _recomputed(queries, database, at, by)
        stats.add(scores, values)
        keep = scores >= np.minimum(rows[at], columns[by]) - off
        at, by, values = at[keep], by[keep], values[keep]
    return at, by, values


def _at_least(
    products: torch.Tensor, rows: np.ndarray, columns: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (P,), (P,) of products that reach the bound of their row (n,) or column (m,)."""
    if products.device.type != "cpu":
        reached = products >= torch.from_numpy(rows).to(products.device)[:, None]
        if columns is not None:
            reached |= products >= torch.from_numpy(columns).to(products.device)
        at, by = reached.nonzero().cpu().numpy().T
        return at, by
    values, found = products.numpy(), []
    # In strips, so that the masks stay in the cache.
    masks = np.empty((2, STRIP, values.shape[1]), bool)
    for start in range(0, len(values), STRIP):
        strip = values[start : start + STRIP]
        reached, more = masks[:, : len(strip)]
        np.greater_equal(strip, rows[start : start + STRIP, None], out=reached)
        if columns is not None:
            reached |= np.greater_equal(strip, columns, out=more)
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


def use_threads() -> None:
    """Use OMP_NUM_THREADS threads, or this rank's share of the processors.

    This holds for FAISS and for the BLAS and OpenMP of every library loaded so far. Ranks that were
    started without a launcher would each use all processors. FAISS is not imported for this: a
    process that has imported it must not fork.
    """
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // ranks)))
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
    threadpool_limits(threads)
