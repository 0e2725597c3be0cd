"""The family of margin losses: what becomes of the cosine of an item and its own class.

A margin maps target cosines (n,) and their margins (n,) to the cosines the softmax sees, by
differentiable torch operations that are finite on all of [-1, 1]. Adding one is writing one
function. How large the margin of a class or of a step is, is said here too.
"""

from collections.abc import Callable

import torch

Margin = Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor]
SIN_FLOOR = 1.0
"""Of sin^2, in units of the dtype's spacing at 1: keeps d sin / d cos finite at the poles, and is
what the nearest cosine to 1 gives, so that short of the poles nothing is changed."""


def arcface(cosine: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    """cos(theta + margin), continued below theta = pi - margin by a line that keeps it monotone.

    Deng et al., ArcFace (CVPR 2019); `margin` in radians, 0 to pi / 2.
    """
    m = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)
    floor = SIN_FLOOR * torch.finfo(cosine.dtype).eps
    sine = (1 - cosine * cosine).clamp(min=floor).sqrt()
    turned = cosine * m.cos() - sine * m.sin()
    return torch.where(cosine > -m.cos(), turned, cosine - m * m.sin())


def cosface(cosine: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    """cos(theta) - margin. Wang et al., CosFace (CVPR 2018)."""
    return cosine - torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)


MARGINS: dict[str, Margin] = {"arcface": arcface, "cosface": cosface}


def value_and_slope(
    margin_of: Margin, cosine: torch.Tensor, margin: torch.Tensor | float, detached: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines with their margin and d(those) / d(cosine), both (n,).

    `detached` leaves the margin out of the gradient, the slope being 1, as Partial FC does (An et
    al., CVPR 2022: its margin is computed without gradient).
    """
    with torch.enable_grad():
        at = cosine.detach().requires_grad_()
        value = margin_of(at, margin)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), torch.ones_like(slope) if detached else slope


def margin_shares(sizes: torch.Tensor, smallest: float) -> torch.Tensor:
    """The share of the margin that each class gets, (C,) float64 from sizes (C,): rare ones more.

    n^(-1/4), moved and stretched so that the largest class gets `smallest` and the rarest 1 (Ha
    et al., Google Landmark Recognition 2020, third place). Equal sizes all get 1.
    """
    rare = sizes.clamp(min=1).double().pow(-0.25)
    span = rare.max() - rare.min()
    if span == 0:
        return torch.ones_like(rare)
    return smallest + (1 - smallest) * (rare - rare.min()) / span


def ramped(margin: float, step: int, steps: int, share: float) -> float:
    """The margin of `step`: up from 0 along a line, whole after `share` of all `steps`."""
    ramp = share * steps
    return margin * min(1.0, (step + 1) / ramp if ramp else 1.0)
