"""What both encoders build on: pooling, the neck, weights that must not train, a missing model."""

import torch
from torch import nn

from dist_train.distributed.runtime import sum_over_ranks
from shards.storage.errors import BadInput


def mean_of_tokens(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens: tokens (b, T, D), mask (b, T) 0 or 1, to (b, D)."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def generalised_mean(tokens: torch.Tensor, power: float = 3.0) -> torch.Tensor:
    """GeM over places: tokens (b, T, D) to (b, D). Radenovic et al. (2018)."""
    return tokens.clamp(min=1e-6).pow(power).mean(1).pow(1 / power)


class Neck(nn.Module):
    """Batch normalisation without a bias, its statistics taken over all ranks (Luo et al., 2019).

    Input and output (b, D). In eval mode, and before any training, it uses the running
    statistics: at the start mean 0 and variance 1, the identity.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the batch's statistics in training, else by the running ones."""
        x = x.float()
        if not self.training:
            return (x - self.mean) * (self.variance + self.eps).rsqrt() * self.weight
        sums = sum_over_ranks(torch.stack([x.sum(0), torch.full_like(x[0], len(x))]))
        mean = sums[0] / sums[1]
        # A second sum, about the mean: the difference of two large sums would lose the digits.
        variance = sum_over_ranks((x - mean).square().sum(0)) / sums[1]
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            unbiased = variance * sums[1] / (sums[1] - 1).clamp(min=1)
            self.variance.lerp_(unbiased, self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight


def freeze_shift(backbone: nn.Module, width: int) -> None:
    """Freeze the bias of the backbone's last layer norm, which the neck's mean cancels.

    Its gradient is 0 but for rounding, which AdamW turns into steps of full size that differ with
    the number of ranks. Applies to a mean or a token pooled from (b, T, `width`), which pass such a
    shift on.
    """
    norms = [m for m in backbone.modules() if isinstance(m, nn.LayerNorm)]
    if norms and norms[-1].bias is not None and norms[-1].normalized_shape == (width,):
        norms[-1].bias.requires_grad_(False)


def freeze_unused(backbone: nn.Module, output: torch.Tensor) -> None:
    """Freeze the weights to which a backward pass from `output` would give no gradient.

    DDP would wait for their gradients for ever.
    """
    used: set[torch.Tensor] = set()
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (weight := getattr(node, "variable", None)) is not None:
            used.add(weight)
        left += [one for one, _ in node.next_functions]
    for weight in backbone.parameters():
        if weight not in used:
            weight.requires_grad_(False)


def unavailable(model: str, reason: str | Exception) -> BadInput:
    """The error for a model that cannot be built or, with an exception, cannot be downloaded."""
    if isinstance(reason, Exception):
        kind = type(reason).__name__
        reason = f"not on this machine, and the hub does not give it ({kind})"
    return BadInput(
        f"encoder.model {model}: {reason}; name a local folder that holds config.json and "
        "model.safetensors: --encoder.model FOLDER"
    )
