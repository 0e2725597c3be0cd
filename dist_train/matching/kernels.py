"""First passes over a tile: low precision, each with a margin that is proven, not guessed.

With x^ the rounded form of a row x and d_x = |x - x^| measured row by row, Cauchy-Schwarz gives
|x.y - x^.y^| <= d_x |y| + |x^| d_y. The sum itself, in float32 and in any order, is off by at most
n u / (1 - n u) |x^| |y^|, u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

U = 2.0**-24
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 3}
"""Of a value of a row in all forms together, by kernel; of integers the two forms, and what the
allocator loses between so many blocks of their size (measured)."""


@dataclass(frozen=True)
class Prepared:
    """Some rows as a kernel multiplies them; largest length and rounding error among them."""

    values: Any
    rows: int
    width: int
    length: float
    error: float


class Kernel(ABC):
    """Multiplies prepared rows; its products, in steps of its own, bound the true ones."""

    def __init__(self, name: str, device: torch.device) -> None:
        """`name` is one of BYTES."""
        self.name, self.device = name, device

    @property
    def one_form(self) -> bool:
        """Asking and asked rows are prepared alike."""
        return True

    @abstractmethod
    def left(self, rows: np.ndarray) -> Prepared:
        """Asking rows, float32 (n, d)."""

    @abstractmethod
    def right(self, rows: np.ndarray) -> Prepared:
        """Asked rows, float32 (m, d)."""

    @abstractmethod
    def product(self, left: Prepared, right: Prepared) -> torch.Tensor:
        """(n, m), to be read through `steps` and `value`; good until the next product."""

    @abstractmethod
    def margin(self, left: Prepared, right: Prepared) -> float:
        """By how much a product of these rows may differ from the true one."""

    @abstractmethod
    def steps(self, scores: np.ndarray) -> np.ndarray:
        """Products below these stand for scores below `scores`."""

    @abstractmethod
    def value(self, products: np.ndarray) -> np.ndarray:
        """The score that a product stands for; -inf where it is only an upper bound."""


class FloatKernel(Kernel):
    """float32 on a CPU through NumPy's BLAS; bfloat16 where the CPU has it; float16 on a GPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(str(dtype).removeprefix("torch."), device)
        self.dtype = dtype
        self._memory = np.empty(0, np.float32)
        # Off by default only on the newest versions; with it on, sums are rounded to float16.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False

    def left(self, rows: np.ndarray) -> Prepared:
        """See Kernel."""
        whole = torch.from_numpy(rows)
        values = whole.to(self.dtype)
        error = 0.0
        if self.dtype != torch.float32:
            error = float((whole.double() - values.double()).norm(dim=1).max())
        return Prepared(values.to(self.device), rows.shape[0], rows.shape[1], _length(rows), error)

    def right(self, rows: np.ndarray) -> Prepared:
        """See Kernel: the same form."""
        return self.left(rows)

    def product(self, left: Prepared, right: Prepared) -> torch.Tensor:
        """See Kernel."""
        if self.device.type == "cuda":
            return torch.mm(left.values, right.values.T, out_dtype=torch.float32)
        if self.dtype == torch.float32:
            # The same memory for every product: fresh pages would cost as much as reading them.
            if self._memory.size < left.rows * right.rows:
                self._memory = np.empty(left.rows * right.rows, np.float32)
            out = self._memory[: left.rows * right.rows].reshape(left.rows, right.rows)
            # NumPy's BLAS: torch's is a third as fast on some processors.
            np.matmul(left.values.numpy(), right.values.numpy().T, out=out)
            return torch.from_numpy(out)
        return torch.mm(left.values, right.values.T).float()

    def margin(self, left: Prepared, right: Prepared) -> float:
        """See Kernel; 16 more roundings than products: of weights, of the rows, of the score."""
        lengths = (left.length + left.error) * (right.length + right.error)
        share = rounding(left.width + 16)
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            share += 2.0**-8  # the product itself comes in bfloat16
        return share * lengths + _apart(left, right)

    def steps(self, scores: np.ndarray) -> np.ndarray:
        """See Kernel."""
        return np.asarray(scores, np.float32)

    def value(self, products: np.ndarray) -> np.ndarray:
        """See Kernel."""
        return products


class Int8Kernel(Kernel):
    """Eight-bit integers through torch's quantised product (FBGEMM, oneDNN), CPU only.

    Asking rows have 7 bits: with 8 the pairwise sums of processors without VNNI would saturate.
    Products come as one byte, in STEPs from -ZERO STEP on; cut off below, so an upper bound there.
    """

    STEP, ZERO = 1 / 200, 50

    def __init__(self) -> None:
        super().__init__("int8", torch.device("cpu"))

    @property
    def one_form(self) -> bool:
        """See Kernel."""
        return False

    def left(self, rows: np.ndarray) -> Prepared:
        """See Kernel."""
        scale = max(float(np.abs(rows).max()), 1e-6) / 63
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.quantize_per_tensor(torch.from_numpy(rows), scale, 64, torch.quint8)
        return self._prepared(values, values, rows)

    def right(self, rows: np.ndarray) -> Prepared:
        """See Kernel."""
        scale = max(float(np.abs(rows).max()), 1e-6) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.quantize_per_tensor(torch.from_numpy(rows), scale, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(values, None)
        return self._prepared(packed, values, rows)

    def _prepared(self, packed: Any, values: torch.Tensor, rows: np.ndarray) -> Prepared:
        error = values.dequantize().numpy() - rows
        return Prepared(packed, rows.shape[0], rows.shape[1], _length(rows), _length(error))

    def product(self, left: Prepared, right: Prepared) -> torch.Tensor:
        """See Kernel."""
        out = torch.ops.quantized.linear(left.values, right.values, self.STEP, self.ZERO)
        # The bytes where they lie: int_repr would copy them into fresh pages.
        nothing = torch.empty(0, dtype=torch.uint8)
        return nothing.set_(out.untyped_storage(), 0, out.shape, out.stride())

    def margin(self, left: Prepared, right: Prepared) -> float:
        """See Kernel; the integer sum is exact, a step is lost where it becomes a byte."""
        lengths = (left.length + left.error) * (right.length + right.error)
        return _apart(left, right) + self.STEP + 16 * U * lengths

    def steps(self, scores: np.ndarray) -> np.ndarray:
        """See Kernel."""
        found = np.floor(np.asarray(scores, np.float64) / self.STEP) + self.ZERO
        return np.clip(np.nan_to_num(found, neginf=0), 0, 255).astype(np.uint8)

    def value(self, products: np.ndarray) -> np.ndarray:
        """See Kernel."""
        scores = (products.astype(np.float32) - self.ZERO) * np.float32(self.STEP)
        return np.where(products == 0, -np.inf, scores)


def rounding(n: int) -> float:
    """Largest relative error of a float32 sum of `n` products, in any order."""
    return n * U / (1 - n * U)


def kernels_for(device: torch.device, bf16: bool) -> list[Kernel]:
    """The kernels that work here, the plain one first; each is tried against float64."""
    if device.type == "cuda":
        return [FloatKernel(torch.float16, device)]
    found: list[Kernel] = [FloatKernel(torch.float32, device)]
    found += [FloatKernel(torch.bfloat16, device)] if bf16 else []
    found += [Int8Kernel()] if _works(Int8Kernel()) else []
    return found


def _works(kernel: Kernel) -> bool:
    """Its products lie within its margin: on unit rows, and on rows that would saturate."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((96, 136)).astype(np.float32)
    signs = np.where(rng.random((96, 136)) < 0.95, 1, -1).astype(np.float32)
    for rows in (unit, signs):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        try:
            left, right = kernel.left(rows[:32]), kernel.right(rows)
            products = kernel.product(left, right).numpy()
        except (RuntimeError, AttributeError, NotImplementedError):
            return False
        truth = rows[:32].astype(np.float64) @ rows.astype(np.float64).T
        truth, margin = np.minimum(truth, 1.02), kernel.margin(left, right)
        if (products < kernel.steps(truth - margin)).any():
            return False
        if (kernel.value(products) > truth + margin).any():
            return False
    return True


def _apart(left: Prepared, right: Prepared) -> float:
    return left.error * right.length + (left.length + left.error) * right.error


def _length(rows: np.ndarray) -> float:
    # A little up: the norm itself is computed in float32.
    return float(np.sqrt(np.einsum("nd,nd->n", rows, rows).max(initial=0))) * (1 + 1e-5)
