"""The family of margin losses: what becomes of the cosine of an item and its own class.

A margin maps the target cosine (B,) to the cosine the softmax sees, by differentiable torch
operations that are finite on all of [-1, 1]. Adding one is writing one function.
"""

import math
from collections.abc import Callable

import torch

Margin = Callable[[torch.Tensor, float], torch.Tensor]
SIN_FLOOR = 1e-6
"""Of sin^2: keeps d sin / d cos finite at the poles."""


def arcface(cosine: torch.Tensor, margin: float) -> torch.Tensor:
    """cos(theta + margin), continued below theta = pi - margin by a line that keeps it monotone.

    Deng et al., ArcFace (CVPR 2019); `margin` in radians, 0 to pi / 2.
    """
    sine = (1 - cosine * cosine).clamp(min=SIN_FLOOR).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    beyond = cosine - margin * math.sin(margin)
    return torch.where(cosine > math.cos(math.pi - margin), turned, beyond)


def cosface(cosine: torch.Tensor, margin: float) -> torch.Tensor:
    """cos(theta) - margin. Wang et al., CosFace (CVPR 2018)."""
    return cosine - margin


MARGINS: dict[str, Margin] = {"arcface": arcface, "cosface": cosface}
