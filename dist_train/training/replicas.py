"""Whether all ranks still have the same encoder, bit for bit."""

import torch
from torch import nn

from dist_train.runtime import Runtime
from dist_train.training.whole import is_parted
from shards.errors import Failed


def compare_replicas(encoder: nn.Module, runtime: Runtime, step: int) -> None:
    """Raise Failed, naming them, when ranks have other weights than most (or than rank 0).

    ZeRO-3 has no replicas and is not looked at; nor are batch statistics inside the backbone,
    which are each rank's own.
    """
    if runtime.world == 1 or is_parted(encoder):
        return
    sums = runtime.from_all(checksum(encoder))
    right = max(sums, key=lambda one: (sums.count(one), one == sums[0]))
    others = [str(rank) for rank, one in enumerate(sums) if one != right]
    if others:
        raise Failed(
            f"after step {step} the encoder of rank {', '.join(others)} differs from that of the "
            "others: suspect the memory or the GPU of its machine (ranks count machine by "
            "machine); leave it out, and the same command goes on from the last checkpoint"
        )


WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of so many bytes: weights are seen as such of their own size."""


@torch.no_grad()
def checksum(encoder: nn.Module) -> int:
    """A number that a change of any one bit of any weight changes."""
    total = torch.zeros((), dtype=torch.int64)
    for parameter in encoder.parameters():
        bits = parameter.detach().view(WHOLE[parameter.element_size()])
        # An odd factor loses no bit of what was summed before; all wraps at 64 bits.
        total = total.to(bits.device) * 1_000_003 + bits.sum(dtype=torch.int64)
    return int(total)
