"""What the first pass multiplies: all columns of the rows, or some and a bound on the others.

Exact pruning. A score is the sum over some columns plus the rest, and the rest is at most the
product of the lengths of what was cut off: s <= x_c.y_c + |x_r| |y_r| (Cauchy-Schwarz; the prefix
bound of Panorama). The length rides along as one more column, so one product gives the bound.
With the image columns alone it says s >= t => cos_image >= (t - w_t) / w_i.

The columns may also be axes B (D, k) of a subspace that holds most of the rows' length. With
G = B'B, d = |G - I| and z = B'x: x.y = z_x' G^-1 z_y + x_r.y_r, so s <= z_x.z_y + d / (1 - d)
|z_x| |z_y| + |x_r| |y_r| and |x_r|^2 <= |x|^2 - (1 - d) |z_x|^2: B need not be perfect. Its float32
products are off by at most h |x|, h = sqrt((1 + d) k) times the rounding of a sum of D.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dist_train.matching.kernels import Int8Kernel, Kernel, Prepared, rounding
from dist_train.matching.views import Views

SAMPLE = 4_096
"""Rows that say how the first pass goes."""


@dataclass(frozen=True)
class Sketch:
    """A kernel and what it multiplies.

    `columns`: None, all of them, and products are scores; the numbers (k,) of some; or axes (D, k)
    float32. Of the last two products are bounds on scores from above.
    """

    kernel: Kernel
    columns: np.ndarray | None = None

    @property
    def cuts(self) -> bool:
        """A product may be more than the score; it is never less, but for the margin."""
        return self.columns is not None

    def width(self, all_columns: int) -> int:
        """Values that stand for a row."""
        return all_columns if self.columns is None else self.columns.shape[-1] + self._copies

    @property
    def _copies(self) -> int:
        # As one large column among small ones the length would coarsen the integers of all.
        return 16 if isinstance(self.kernel, Int8Kernel) else 1

    @cached_property
    def _axes_off(self) -> tuple[float, float]:
        """d and h of the module's docstring; nothing where columns are merely picked."""
        if self.columns is None or self.columns.ndim == 1:
            return 0.0, 0.0
        axes = self.columns.astype(np.float64)
        d = float(np.linalg.norm(axes.T @ axes - np.eye(axes.shape[1]))) + 1e-12
        assert d < 1e-3, "the axes are not at right angles"
        return d, float(np.sqrt((1 + d) * axes.shape[1])) * rounding(axes.shape[0])

    def margin(self, left: Prepared, right: Prepared) -> float:
        """By how much a product of these rows may lie below the true one, or beside it."""
        d, h = self._axes_off
        off = d / (1 - d) * (1 + h) ** 2 + 2 * h + h * h
        return self.kernel.margin(left, right) + 1.01 * off * left.length * right.length

    def left(self, rows: np.ndarray) -> Prepared:
        """Asking rows, float32 (n, D)."""
        return self.kernel.left(self._cut(rows))

    def right(self, rows: np.ndarray) -> Prepared:
        """Asked rows, float32 (m, D)."""
        return self.kernel.right(self._cut(rows))

    def _cut(self, rows: np.ndarray) -> np.ndarray:
        if self.columns is None:
            return np.ascontiguousarray(rows)
        k = self.columns.shape[-1]
        out = np.empty((len(rows), k + self._copies), np.float32)
        kept = out[:, :k]
        if self.columns.ndim == 1:
            np.take(rows, self.columns, axis=1, out=kept, mode="clip")
        else:
            np.matmul(rows, self.columns, out=kept)
        whole = np.einsum("nd,nd->n", rows, rows)
        d, h = self._axes_off
        # Up: two float32 sums of at most D squares are subtracted, and the axes are not perfect.
        off = whole * np.float32(rows.shape[1] * 2.0**-22 + 1.01 * (d + 2 * h))
        rest = np.sqrt(np.maximum(whole - np.einsum("nd,nd->n", kept, kept), 0) + off) * (1 + 1e-6)
        out[:, k:] = (rest / np.sqrt(self._copies))[:, None]
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


def wide(rows: np.ndarray) -> np.ndarray:
    """Stored rows as float32; torch does it ten times as fast as NumPy."""
    return torch.from_numpy(rows).float().numpy()
