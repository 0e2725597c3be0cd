"""AdamW for class centres, each row with its own count of steps.

With a gradient of all rows it is AdamW. With a sparse one it reads and writes only the rows in it,
so neither a step nor its memory grows with the classes that were not seen. A row's moments and
weight decay stand still meanwhile, and its bias correction counts the steps that it took, so a row
that is new, or seen for the first time late, starts as every row does at the beginning.
"""

from typing import Any

import torch
from torch.optim import Optimizer

BLOCK = 8_192
"""Rows that are updated at one time."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class RowAdamW(Optimizer):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization (ICLR 2019), row by row.

    For one parameter (n, D), its gradient dense or sparse over rows; state `exp_avg` and
    `exp_avg_sq` (n, D) and `step` (n,) int32.
    """

    def __init__(
        self,
        parameter: torch.nn.Parameter,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__([parameter], options)
        state = {name: torch.zeros_like(parameter) for name in MOMENTS}
        steps = torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device)
        self.state[parameter] = state | {"step": steps}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update the rows that have a gradient."""
        (group,) = self.param_groups
        (parameter,) = group["params"]
        if parameter.grad is None:
            return
        grad = coalesced(parameter.grad)
        values = grad.values() if grad.is_sparse else grad
        for start in range(0, len(values), BLOCK):
            block = slice(start, start + BLOCK)
            rows = grad.indices()[0, block] if grad.is_sparse else block
            _step_rows(parameter, values[block], rows, self.state[parameter], group)


def _step_rows(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    rows: slice | torch.Tensor,
    state: dict[str, torch.Tensor],
    group: dict[str, Any],
) -> None:
    """Update one block of rows; its temporaries are freed before the next block."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    # With a slice these are views, written in place; with row numbers copies, written back below.
    weight, mean, square = parameter[rows], state[MOMENTS[0]][rows], state[MOMENTS[1]][rows]
    step = state["step"][rows] + 1
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    count = step.double()[:, None]
    size = (lr / (1 - beta1**count)).to(weight.dtype)
    spread = (1 - beta2**count).sqrt().to(weight.dtype)
    direction = square.sqrt().div_(spread).add_(group["eps"]).reciprocal_().mul_(mean)
    weight.mul_(1 - lr * group["weight_decay"]).addcmul_(direction, -size)
    state["step"][rows] = step
    if not isinstance(rows, slice):
        parameter[rows], state[MOMENTS[0]][rows], state[MOMENTS[1]][rows] = weight, mean, square


def coalesced(grad: torch.Tensor) -> torch.Tensor:
    """A dense gradient unchanged; a sparse one with every row once."""
    return grad.coalesce() if grad.is_sparse else grad
