"""How the first pass goes: every sketch that may be the cheapest, tried on a tile of a sample."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dist_train.matching.faiss_library import faiss
from dist_train.matching.kernels import Kernel
from dist_train.matching.passes import FirstPass, Side, left_of_tile
from dist_train.matching.sketches import Sketch
from dist_train.matching.threads import use_threads

MEASURED_FROM = 8_192
"""Items; with fewer the plain kernel is done before others are measured."""
AXES_FROM = 32
"""Items for each column; with fewer, to find the axes takes longer than they save."""
ASKING, HELD = 1_024, 512
"""Rows that a tile is tried on; rows that the axes are not fitted to and cuts are compared on."""
SURVIVOR_SECONDS = 0.4e-6
"""About what one place costs that the first product leaves."""
TRIES = 3


@dataclass(frozen=True)
class Choice:
    """A sketch, and what the sample says of it."""

    sketch: Sketch
    nanoseconds: float
    """Measured for a pair of rows: product, scan and second look."""
    survivors: float
    """Share of the pairs that the first product leaves."""

    def __str__(self) -> str:
        columns = self.sketch.columns
        if not self.nanoseconds:
            return f"{self.sketch.kernel.name}, all columns (too few items to measure others)"
        kind = "columns" if columns is not None and columns.ndim == 1 else "turned axes"
        cut = "all columns" if columns is None else f"{columns.shape[-1]} {kind} and a bound"
        return (
            f"{self.sketch.kernel.name}, {cut}: {self.nanoseconds:.2f} ns a pair, "
            f"{self.survivors:.1e} of the pairs left"
        )


@dataclass
class _Trial:
    """The floors of a tile of the sample: none but that of pairs."""

    floor: float
    k: int = 0

    def pair(self) -> float:
        return self.floor

    def nearest(self, rows: np.ndarray) -> None:
        return None

    def among(self, rows: np.ndarray) -> int:
        return self.k


def choose_sketch(
    rows: np.ndarray, kernels: list[Kernel], floor: float, nearest: float, ends: list[int],
    items: int,
) -> list[Choice]:  # fmt: skip
    """What can be done for sample `rows` float32 (n, D) of `items`, the cheapest first.

    `ends` are the widths of the parts laid side by side: each part alone is one of the cuts.
    `nearest` is the share of all items wanted as neighbours of each; above 0 the products must be
    scores on both sides, so nothing is cut off.
    """
    if len(kernels) == 1 or len(rows) < 4:
        return [Choice(Sketch(kernels[0]), 0.0, 0.0)]
    if nearest:
        scores = rows[: len(rows) // 2] @ rows[len(rows) // 2 :].T
        floor = min(floor, float(np.quantile(scores[:HELD], max(0.0, 1 - nearest))))
    choices = measured([Sketch(kernel) for kernel in kernels], rows, floor)
    if not nearest and rows.shape[1] >= 64 and len(rows) >= 4 * HELD:
        cuts = _cuts(rows, choices, floor, ends, items)
        choices += measured(cuts, rows, floor) if cuts else []
    return sorted(choices, key=lambda choice: choice.nanoseconds)


def measured(sketches: list[Sketch], rows: np.ndarray, floor: float) -> list[Choice]:
    """Time a tile of the sample by each of the sketches, in turns, the best of some tries."""
    tiles = [_tile(sketch, rows) for sketch in sketches]
    best, left = [float("inf")] * len(sketches), [0.0] * len(sketches)
    for _ in range(TRIES):
        for n, (sketch, (one, other)) in enumerate(zip(sketches, tiles, strict=True)):
            seen, pairs = FirstPass(), len(one.ids) * len(other.ids)
            # The processor's time: others on the machine must not decide.
            begin = time.process_time()
            left_of_tile(sketch, one, other, False, _Trial(floor), seen)
            best[n] = min(best[n], (time.process_time() - begin) / pairs)
            left[n] = seen.checked / pairs
    return [Choice(s, 1e9 * b, n) for s, b, n in zip(sketches, best, left, strict=True)]


def faiss_nanoseconds(rows: np.ndarray, kind: str, floor: float) -> float:
    """What FAISS's range search takes for an unordered pair of the sample, which it finds twice."""
    use_threads()
    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.add(rows)
    asking, best = rows[:HELD], float("inf")
    for _ in range(TRIES):
        begin = time.process_time()
        index.range_search(asking, floor)
        best = min(best, (time.process_time() - begin) / (len(asking) * len(rows)))
    return 2e9 * best


def _tile(sketch: Sketch, rows: np.ndarray) -> tuple[Side, Side]:
    half = min(ASKING, len(rows) // 2)
    sides = []
    for prepare, start, stop in ((sketch.left, 0, half), (sketch.right, half, 3 * half)):
        some = np.ascontiguousarray(rows[start:stop])
        ids = np.arange(start, start + len(some))
        sides.append(Side(ids, prepare(some), [(1.0, some)]))
    return sides[0], sides[1]


def _cuts(
    rows: np.ndarray, plain: list[Choice], floor: float, ends: list[int], items: int
) -> list[Sketch]:
    """For each kernel the cut that promises most, where one promises anything."""
    found: list[Sketch] = []
    bases = _bases(rows, ends, items)
    for choice in plain:
        kernel, D = choice.sketch.kernel, rows.shape[1]
        best, seconds = None, choice.nanoseconds * 1e-9
        for base, spread in bases:
            trial = Sketch(kernel, spread(D // 2))
            one, other = _tile(trial, rows[-2 * HELD :])
            margin = trial.margin(one.prepared, other.prepared)
            for k, share in _survivors(rows[-HELD:] @ base, floor - margin):
                width = k + trial.width(D) - D // 2
                cost = choice.nanoseconds * 1e-9 * width / D + share * SURVIVOR_SECONDS
                if cost < seconds:
                    best, seconds = Sketch(kernel, spread(k)), cost
        found += [best] if best is not None else []
    return found


Base = tuple[np.ndarray, Callable[[int], np.ndarray]]


def _bases(rows: np.ndarray, ends: list[int], items: int) -> list[Base]:
    """Orders of all columns, as matrices (D, D), and how the first k of each are told."""
    energy, D = (rows * rows).sum(0), rows.shape[1]
    part = np.searchsorted(ends, np.arange(D), side="right")
    alone = range(len(ends)) if len(ends) > 1 else []
    orders = [np.argsort(-energy), *(np.lexsort((-energy, part != one)) for one in alone)]
    found: list[Base] = [
        (np.eye(D, dtype=np.float32)[:, order], lambda k, o=order: np.sort(o[:k]))
        for order in orders
    ]
    if items >= AXES_FROM * D and _directions(rows) < 0.7 * D:
        axes = _axes(rows[: -2 * HELD])
        found.append((axes, lambda k: _spread(axes[:, :k])))
    return found


def _directions(rows: np.ndarray) -> float:
    """About over how many directions unit rows are spread: 1 / mean of (x.y)^2, x and y apart."""
    a, b = rows[:HELD], rows[HELD : 2 * HELD]
    return 1.0 / max(float(np.mean((a @ b.T) ** 2)), 1e-9)


def _axes(rows: np.ndarray) -> np.ndarray:
    """Axes float32 (D, D), those first along which the rows are longest."""
    _, axes = np.linalg.eigh(rows.T @ rows)
    return np.ascontiguousarray(axes[:, ::-1], dtype=np.float32)


def _spread(axes: np.ndarray) -> np.ndarray:
    """Other axes of the same space, along which rows are about equally long: integers like that."""
    k = axes.shape[1]
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((k, k)))
    return np.ascontiguousarray(axes.astype(np.float64) @ turn, dtype=np.float32)


def _survivors(turned: np.ndarray, least: float) -> list[tuple[int, float]]:
    """(k, share of the pairs whose bound by the first k columns reaches `least`)."""
    step = 32 if turned.shape[1] > 128 else 8
    at, by = np.triu_indices(len(turned), 1)
    apart = np.ones((len(turned), len(turned)), bool)
    apart[at, by] = False
    whole = np.einsum("nd,nd->n", turned, turned)
    kept, bound = np.zeros(len(turned), np.float32), np.zeros_like(apart, np.float32)
    found = []
    for start in range(0, turned.shape[1] - step, step):
        more = turned[:, start : start + step]
        bound += more @ more.T
        kept += np.einsum("nd,nd->n", more, more)
        rest = np.sqrt(np.maximum(whole - kept, 0))
        reached = (bound + np.outer(rest, rest) >= least) & ~apart
        found.append((start + step, float(reached.sum()) / len(at)))
    return found
