"""An encoder's weights and AdamW's moments as complete tensors, under DDP and ZeRO-1, 2 and 3.

ZeRO-3 keeps a shard of every weight on each rank; elsewhere every rank has all weights, and whether
these are still equal is checked here too. All ranks call these functions together.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from dist_train.distributed.runtime import Runtime
from shards.storage.errors import Failed

MOMENTS = ("exp_avg", "exp_avg_sq")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes: a weight's bits are summed as integers of the same size."""


def is_zero3(encoder: nn.Module) -> bool:
    """Whether ZeRO-3 has sharded the weights."""
    return any(hasattr(parameter, "ds_id") for parameter in encoder.parameters())


def uses_deepspeed() -> bool:
    """Whether DeepSpeed holds the encoder's optimizer."""
    return PartialState().distributed_type == DistributedType.DEEPSPEED


def complete_state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """`encoder.state_dict()` with complete tensors."""
    with _gathered(encoder, None):
        state = encoder.state_dict()
        return {k: v.clone() for k, v in state.items()} if is_zero3(encoder) else state


def load_complete_state(encoder: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """`encoder.load_state_dict(state)`; ZeRO-3 then shards the weights of rank 0 again."""
    with _gathered(encoder, 0):
        encoder.load_state_dict(state)


def _gathered(encoder: nn.Module, writer: int | None) -> AbstractContextManager[object]:
    if not is_zero3(encoder):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(encoder.parameters()), modifier_rank=writer)


def moments(prepared: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """`exp_avg/NAME` and `exp_avg_sq/NAME` of every trained parameter; empty before any update."""
    if not uses_deepspeed():
        return {
            f"{kind}/{name}": optimizer.state[parameter][kind]
            for name, parameter in _trained(prepared)
            for kind in MOMENTS
            if kind in optimizer.state.get(parameter, {})
        }
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = cast(Any, optimizer).optimizer
    # Before the first update there are none, and DeepSpeed raises if they are requested.
    if not any(zero.optimizer.state.values()):
        return {}
    _link_moments(zero)
    found = {}
    for name, parameter in _trained(prepared):
        for kind in MOMENTS:
            value = safe_get_full_optimizer_state(parameter, kind)
            assert value is not None  # every trained parameter was linked
            found[f"{kind}/{name}"] = value
    return found


def load_moments(
    prepared: nn.Module, optimizer: Optimizer, saved: dict[str, torch.Tensor], step: int
) -> None:
    """Restore what `moments` returned after `step` updates; the weights are loaded before."""
    if not uses_deepspeed():
        for name, parameter in _trained(prepared):
            if f"{MOMENTS[0]}/{name}" in saved:
                values = {kind: saved[f"{kind}/{name}"].to(parameter.device) for kind in MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **values}
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    zero = cast(Any, optimizer).optimizer
    if saved:
        # This rank's float32 copies of the weights, which the optimizer steps on.
        copies = getattr(zero, "fp32_partitioned_groups_flat", None)
        for flat in zero.single_partition_of_fp32_groups if copies is None else copies:
            state = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(step)), **state}
        _link_moments(zero)
        for name, parameter in _trained(prepared):
            for kind in MOMENTS:
                value = saved[f"{kind}/{name}"].to(parameter.device)
                shard = getattr(parameter, "ds_tensor", None)
                if shard is None:
                    safe_set_full_optimizer_state(parameter, value, kind)
                    continue
                # ZeRO-3 pads the last rank's shard; DeepSpeed's own function refuses a value that
                # needs padding.
                size, rank, world = shard.numel(), dist.get_rank(), dist.get_world_size()
                flat = nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
                own = flat[rank * size : (rank + 1) * size]
                safe_set_local_optimizer_state(parameter, own, kind)
    # ZeRO steps on its own float32 copy of the weights that have just been loaded.
    zero.refresh_fp32_params()


def _trained(prepared: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    bare: Any = prepared.module if hasattr(prepared, "module") else prepared
    return ((name, p) for name, p in bare.named_parameters() if p.requires_grad)


def _link_moments(zero: Any) -> None:
    # DeepSpeed links a parameter to its moments when the first group has stepped, and so finds
    # none for the others; linked again, all are there. ZeRO-3 looks them up instead.
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def compare_replicas(encoder: nn.Module, runtime: Runtime, step: int) -> None:
    """Raise Failed, naming the ranks, when some have other weights than most (or than rank 0).

    ZeRO-3 has no replicas and is not compared; nor are batch statistics inside the backbone, which
    differ between ranks by design.
    """
    if runtime.world == 1 or is_zero3(encoder):
        return
    sums = runtime.all_gather(checksum(encoder))
    right = max(sums, key=lambda one: (sums.count(one), one == sums[0]))
    others = [str(rank) for rank, one in enumerate(sums) if one != right]
    if others:
        raise Failed(
            f"after step {step} the encoder of rank {', '.join(others)} differs from that of the "
            "others: suspect the memory or the GPU of its machine (ranks count machine by "
            "machine); leave it out, and the same command goes on from the last checkpoint"
        )


@torch.no_grad()
def checksum(encoder: nn.Module) -> int:
    """A 64-bit sum that a change of any one bit of any weight changes."""
    total = torch.zeros((), dtype=torch.int64)
    for parameter in encoder.parameters():
        bits = parameter.detach().view(INTEGERS[parameter.element_size()])
        # An odd factor loses no bit of what was summed before; everything wraps at 64 bits.
        total = total.to(bits.device) * 1_000_003 + bits.sum(dtype=torch.int64)
    return int(total)
