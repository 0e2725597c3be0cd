"""The neck: batch normalisation between the pooled vector and the head."""

import logging

import torch
from safetensors.torch import load_file
from torch import nn

from dist_train.config.training import ImageEncoderOptions, TextEncoderOptions
from dist_train.distributed.runtime import sum_over_ranks
from dist_train.encoders.source import NECK, Source
from dist_train.encoders.weights import check_finite

log = logging.getLogger(__name__)


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


def new_neck(
    source: Source, options: ImageEncoderOptions | TextEncoderOptions, width: int
) -> nn.Module:
    """The neck, with the state of an earlier training where `source` is an encoder of ours.

    Raises BadInput when that holds NaN or Inf.
    """
    neck = Neck(width) if options.neck else nn.Identity()
    before = source.trained_options()
    if before.get("neck") and options.pretrained:
        assert source.folder is not None
        if options.neck and before["pooling"] == options.pooling:
            neck.load_state_dict(load_file(source.folder / NECK))
            check_finite(source, neck)
        else:
            log.warning(
                "%s: its neck, trained with pooling %s, is left out, as the options ask for "
                "pooling %s and neck %s",
                *(source, before["pooling"], options.pooling, str(options.neck).lower()),
            )
    return neck
