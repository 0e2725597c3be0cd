"""The family of margin losses: how the cosine of an item and its own class is reduced.

A margin maps target cosines (n,) and their margins (n,) to the cosines the softmax sees, by
differentiable torch operations that are finite on all of [-1, 1]. Adding one means writing one
function. How large the margin of a class is, is computed here too.
"""

from collections.abc import Callable

import torch

Margin = Callable[[torch.Tensor, torch.Tensor | float], torch.Tensor]
SMALLEST_SQUARED_SINE = 1.0
"""In units of the dtype's spacing at 1. It keeps d sin / d cos finite at the poles, and is what the
nearest cosine to 1 gives, so that short of the poles nothing changes."""


def arcface(cosine: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    """cos(theta + margin), continued below theta = pi - margin by a line that keeps it monotone.

    Deng et al., ArcFace (CVPR 2019); `margin` in radians, 0 to pi / 2.
    """
    m = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)
    smallest = SMALLEST_SQUARED_SINE * torch.finfo(cosine.dtype).eps
    sine = (1 - cosine * cosine).clamp(min=smallest).sqrt()
    rotated = cosine * m.cos() - sine * m.sin()
    return torch.where(cosine > -m.cos(), rotated, cosine - m * m.sin())


def cosface(cosine: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    """cos(theta) - margin. Wang et al., CosFace (CVPR 2018)."""
    return cosine - torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)


MARGINS: dict[str, Margin] = {"arcface": arcface, "cosface": cosface}


def margin_shares(sizes: torch.Tensor, smallest: float) -> torch.Tensor:
    """Fraction of the margin that each class gets, (C,) float64 from sizes (C,): rare ones more.

    n^(-1/4), moved and stretched so that the largest class gets `smallest` and the rarest 1 (Ha
    et al., Google Landmark Recognition 2020, third place). With equal sizes all get 1.
    """
    rare = sizes.clamp(min=1).double().pow(-0.25)
    span = rare.max() - rare.min()
    if span == 0:
        return torch.ones_like(rare)
    return smallest + (1 - smallest) * (rare - rare.min()) / span
