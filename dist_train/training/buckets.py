"""DDP's buckets in the order that they keep, from the first step of a life on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def settle_buckets(prepared: nn.Module, optimizer: Optimizer, inputs: Sequence[Any]) -> None:
    """Have DDP arrange its buckets now; weights, statistics and random numbers stay as they are.

    DDP arranges them anew after the first backward pass, by the order in which gradients come. More
    than two ranks add a number up in an order that follows from where it lies in its bucket, so
    without this the first step after a resume would differ, in the last bit, from the same step of
    a run that was not stopped.
    """
    if not isinstance(prepared, DistributedDataParallel):
        return
    device = next(prepared.parameters()).device
    kept = [(buffer, buffer.clone()) for buffer in prepared.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        (prepared(*inputs) * 0).sum().backward()
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    optimizer.zero_grad()
