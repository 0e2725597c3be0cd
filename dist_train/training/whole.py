"""The whole encoder, where DeepSpeed's ZeRO-3 keeps a part of every weight on each rank.

Elsewhere every rank has all of it and nothing is done. All ranks call these together.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def is_parted(encoder: nn.Module) -> bool:
    """ZeRO-3 has taken the weights apart."""
    return any(hasattr(parameter, "ds_id") for parameter in encoder.parameters())


def whole_state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """`encoder.state_dict()` with whole tensors."""
    with _gathered(encoder, None):
        state = encoder.state_dict()
        return {k: v.clone() for k, v in state.items()} if is_parted(encoder) else state


def load_whole(encoder: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """`encoder.load_state_dict(state)`; ZeRO-3 then takes the weights of rank 0 apart again."""
    with _gathered(encoder, 0):
        encoder.load_state_dict(state)


def _gathered(encoder: nn.Module, writer: int | None) -> AbstractContextManager[object]:
    if not is_parted(encoder):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(encoder.parameters()), modifier_rank=writer)
