"""Class centres: which rank has which, how each begins, which ones a step sees, and their AdamW.

Every value is a function of the class alone, never of the number of ranks.
"""

import torch
from torch.optim import Optimizer

INIT_BLOCK = 256
"""Classes whose centres are drawn together."""
INIT_STD = 0.05
GOLDEN = -0x61C8864680B583EB
MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Constants of SplitMix64, as signed 64-bit integers."""
ROW_BLOCK = 8_192
"""Rows that are updated at one time."""


def initial_centres(first: int, last: int, width: int, seed: int, each: int = 1) -> torch.Tensor:
    """The initial centres of the classes `first` to `last` - 1, ((last - first) * each, width).

    A function of (seed, class id) alone; the `each` sub-centres of a class are neighbours.
    """
    out = torch.empty((last - first) * each, width)
    for block in range(first // INIT_BLOCK, -(-last // INIT_BLOCK)):
        begin = block * INIT_BLOCK
        low, high = max(first, begin), min(last, begin + INIT_BLOCK)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        rows = torch.randn(INIT_BLOCK * each, width, generator=generator) * INIT_STD
        out[(low - first) * each : (high - first) * each] = rows[
            (low - begin) * each : (high - begin) * each
        ]
    return out


def classes_of_step(
    first: int, last: int, own: torch.Tensor, rate: float, seed: int, step: int
) -> torch.Tensor:
    """Ascending numbers, counted from `first`, of the classes that `step` sees, (n,) int64.

    All of `own` (those of the batch, counted from `first`), each other with probability `rate`.
    After An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face
    Recognition CNNs by Partial FC (CVPR 2022), where each rank draws as many as it holds; here each
    class is drawn by a hash of (seed, step, class id), so that the number of ranks changes nothing.
    """
    ids = torch.arange(first, last, device=own.device)
    seen = uniform(ids, seed, step) < rate
    seen[own] = True
    return seen.nonzero().squeeze(1)


def uniform(ids: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """A number in [0, 1) for each id (n,), float64, from a hash of (seed, step, id).

    SplitMix64 (Steele et al., 2014). Equal on every device; int64 products wrap.
    """
    for key in (seed, step):
        ids = ids * GOLDEN + key
        ids = (ids ^ _shifted(ids, 30)) * MIX[0]
        ids = (ids ^ _shifted(ids, 27)) * MIX[1]
        ids = ids ^ _shifted(ids, 31)
    return _shifted(ids, 64 - 53).double() / 2**53  # float64 holds 53 bits exactly


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift; torch's own shift fills with the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


class RowAdamW(Optimizer):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization (ICLR 2019), row by row.

    For one parameter (n, D), its gradient dense or sparse over rows; state `exp_avg` and
    `exp_avg_sq` (n, D) and `step` (n,) int32, as each row has its own count of steps.

    With a gradient of all rows it is AdamW. With a sparse one it reads and writes only the rows in
    it, so neither a step nor its memory grows with the classes that were not seen. A row's moments
    and weight decay stand still meanwhile, and its bias correction counts the steps that it took,
    so a row that is new, or seen for the first time late, starts as every row began.
    """

    def __init__(
        self, parameter: torch.nn.Parameter, lr: float, weight_decay: float = 0.0, eps: float = 1e-8
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": eps}
        super().__init__([parameter], options)
        state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        steps = torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device)
        self.state[parameter] = state | {"step": steps}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update the rows that have a gradient."""
        (group,) = self.param_groups
        (parameter,) = group["params"]
        if parameter.grad is None:
            return
        coalesce_gradient(parameter)
        grad = parameter.grad
        values = grad.values() if grad.is_sparse else grad
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        means, squares, steps = state["exp_avg"], state["exp_avg_sq"], state["step"]
        for start in range(0, len(values), ROW_BLOCK):
            block = slice(start, start + ROW_BLOCK)
            rows = grad.indices()[0, block] if grad.is_sparse else block
            # With a slice these are views, written in place; with row numbers copies, written back.
            weight, mean, square = parameter[rows], means[rows], squares[rows]
            mean.lerp_(values[block], 1 - beta1)
            square.mul_(beta2).addcmul_(values[block], values[block], value=1 - beta2)
            steps[rows] += 1
            count = steps[rows].double()[:, None]
            size = (lr / (1 - beta1**count)).to(weight.dtype)
            spread = (1 - beta2**count).sqrt().to(weight.dtype)
            direction = square.sqrt().div_(spread).add_(group["eps"]).reciprocal_().mul_(mean)
            weight.mul_(1 - lr * group["weight_decay"]).addcmul_(direction, -size)
            if grad.is_sparse:
                parameter[rows], means[rows], squares[rows] = weight, mean, square
            del weight, mean, square, count, size, spread, direction  # before the next block's


def coalesce_gradient(weight: torch.Tensor) -> None:
    """Have a sparse gradient hold every row once."""
    if weight.grad is not None and weight.grad.is_sparse:
        weight.grad = weight.grad.coalesce()
