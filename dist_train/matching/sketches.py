"""What the first pass multiplies: all columns of the rows, or some and a bound on the others.

Exact pruning. A score is the sum over some columns plus the rest, and the rest is at most the
product of the lengths of what was cut off: s <= x_c.y_c + |x_r| |y_r| (Cauchy-Schwarz; the prefix
bound of Panorama). The length rides along as one more column, so one product gives the bound.
With the image columns alone it says s >= t => cos_image >= (t - w_t) / w_i.
"""

import time
from dataclasses import dataclass

import numpy as np

from dist_train.matching.kernels import Int8Kernel, Kernel, Prepared
from dist_train.matching.views import Views

SAMPLE = 2_048
MEASURED_FROM = 8_192
"""Items; with fewer the plain kernel is done before others are measured."""
SHARES = tuple(n / 20 for n in range(7, 20))
RESCORE_SECONDS = 5e-6
"""About what one candidate costs: two rows of 768 numbers gathered and multiplied in float64."""
SCAN_SECONDS = 0.1e-9
"""About what reading one byte of a product costs."""


@dataclass(frozen=True)
class Sketch:
    """A kernel and the columns that it multiplies; None: all of them, then products are scores."""

    kernel: Kernel
    columns: np.ndarray | None = None

    def width(self, all_columns: int) -> int:
        """Values that stand for a row."""
        return all_columns if self.columns is None else len(self.columns) + self._copies

    @property
    def _copies(self) -> int:
        # As one large column among small ones the length would coarsen the integers of all.
        return 16 if isinstance(self.kernel, Int8Kernel) else 1

    def left(self, rows: np.ndarray) -> Prepared:
        """Asking rows, float32 (n, D)."""
        return self.kernel.left(self._cut(rows))

    def right(self, rows: np.ndarray) -> Prepared:
        """Asked rows, float32 (m, D)."""
        return self.kernel.right(self._cut(rows))

    def _cut(self, rows: np.ndarray) -> np.ndarray:
        if self.columns is None:
            return np.ascontiguousarray(rows)
        out = np.empty((len(rows), self.width(rows.shape[1])), np.float32)
        kept = out[:, : len(self.columns)]
        np.take(rows, self.columns, axis=1, out=kept, mode="clip")
        squares = np.einsum("nd,nd->n", rows, rows) - np.einsum("nd,nd->n", kept, kept)
        # Up: two float32 sums of at most D squares have been subtracted.
        rest = np.sqrt(np.maximum(squares, 0) + rows.shape[1] * 2.0**-22) * (1 + 1e-6)
        out[:, len(self.columns) :] = (rest / np.sqrt(self._copies))[:, None]
        return out


def weighted_rows(
    views: Views, parts: tuple[str, ...], stored: dict[str, np.ndarray]
) -> np.ndarray:
    """Float32 rows whose products are the scores over `parts`: sqrt(weight) times the stored."""
    total = sum(views.parts[name].weight for name in parts)
    return np.hstack([
        np.asarray(stored[name], np.float32)
        * np.float32(np.sqrt(views.parts[name].weight / total))
        for name in parts
    ])  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A sketch, and what the sample says of it."""

    sketch: Sketch
    nanoseconds: float
    """Predicted for a pair of rows."""
    survivors: float
    """Share of the pairs that need their exact score."""

    def __str__(self) -> str:
        columns = self.sketch.columns
        if not self.nanoseconds:
            return f"{self.sketch.kernel.name}, all columns (too few items to measure others)"
        cut = "all columns" if columns is None else f"{len(columns)} columns and a bound"
        return (
            f"{self.sketch.kernel.name}, {cut}: {self.nanoseconds:.2f} ns a pair, "
            f"{self.survivors:.1e} of the pairs to score"
        )


def choose_sketch(
    rows: np.ndarray, kernels: list[Kernel], floor: float, nearest: float, ends: list[int]
) -> list[Choice]:
    """All that can be done for sample `rows` float32 (n, D), the cheapest first.

    `ends` are the widths of the parts laid side by side: the first part alone is one of the cuts.
    `nearest` is the share of all items wanted as neighbours of each; above 0 the products must be
    scores on both sides, so nothing is cut off.
    """
    wanted, choices = floor, []
    if nearest:
        half = len(rows) // 2
        scores = rows[:half] @ rows[half:].T if half else np.zeros((1, 1), np.float32)
        wanted = min(floor, float(np.quantile(scores, max(0.0, 1 - nearest))))
    if len(kernels) == 1:
        return [Choice(Sketch(kernels[0]), 0.0, 0.0)]
    for kernel in kernels:
        rate = measured_rate(kernel, rows)
        cuts: list[np.ndarray | None] = [None]
        if not nearest and rows.shape[1] >= 64 and kernel.device.type == "cpu":
            cuts += _cuts(rows, ends)
        for columns in cuts:
            sketch = Sketch(kernel, columns)
            share = _survivors(sketch, rows, wanted)
            flop = 2 * sketch.width(rows.shape[1])
            scan = SCAN_SECONDS * (1 if isinstance(kernel, Int8Kernel) else 4)
            seconds = flop / rate + scan + share * RESCORE_SECONDS
            choices.append(Choice(sketch, 1e9 * seconds, share))
    return sorted(choices, key=lambda choice: choice.nanoseconds)


def measured_rate(kernel: Kernel, rows: np.ndarray) -> float:
    """Operations a second of processor time in the first pass, the best of some tries."""
    some = np.resize(rows, (2048, rows.shape[1]))
    left, right = kernel.left(some), kernel.right(some)
    best = 0.0
    # The processor's time, where it is one: others on the machine must not decide.
    now = time.perf_counter if kernel.device.type == "cuda" else time.process_time
    for _ in range(3):
        begin = now()
        kernel.product(left, right)[0, 0].item()
        best = max(best, 2 * 2048 * 2048 * rows.shape[1] / max(now() - begin, 1e-9))
    return best


def _cuts(rows: np.ndarray, ends: list[int]) -> list[np.ndarray | None]:
    """The columns of the most energy first, and the first part by itself."""
    order = np.argsort(-(rows * rows).sum(0), kind="stable")
    widths = sorted({int(share * rows.shape[1]) // 16 * 16 for share in SHARES})
    cuts: list[np.ndarray | None] = [np.sort(order[:width]) for width in widths]
    if len(ends) > 1:
        cuts.append(np.arange(ends[0]))
    return cuts


def _survivors(sketch: Sketch, rows: np.ndarray, floor: float) -> float:
    """Share of the sample's pairs that the first pass leaves at the floor."""
    half = len(rows) // 2
    if half == 0:
        return 0.0
    left, right = sketch.left(rows[:half]), sketch.right(rows[half:])
    kernel = sketch.kernel
    products = kernel.product(left, right)
    least = kernel.steps(np.asarray(floor - kernel.margin(left, right)))
    return float((products >= least.item()).double().mean())
