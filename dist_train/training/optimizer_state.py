"""AdamW's moments by parameter name, from DDP and from DeepSpeed's ZeRO-1, 2 and 3 alike."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

NAMES = ("exp_avg", "exp_avg_sq")


def moments(prepared: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """`exp_avg/NAME` and `exp_avg_sq/NAME` of every trained parameter; all ranks call it.

    Empty where no update has been made yet.
    """
    if _zero():
        return _zero_moments(_trained(prepared), _zero_optimizer(optimizer))
    return {
        f"{kind}/{name}": optimizer.state[parameter][kind]
        for name, parameter in _trained(prepared)
        for kind in NAMES
        if kind in optimizer.state.get(parameter, {})
    }


def load_moments(
    prepared: nn.Module, optimizer: Optimizer, saved: dict[str, torch.Tensor], step: int
) -> None:
    """Put back what `moments` gave after `step` updates; all ranks call it, weights loaded before.

    Nothing was given where no update had been made yet.
    """
    if _zero():
        _load_zero_moments(_trained(prepared), _zero_optimizer(optimizer), saved, step)
        return
    for name, parameter in _trained(prepared):
        if f"{NAMES[0]}/{name}" in saved:
            values = {kind: saved[f"{kind}/{name}"].to(parameter.device) for kind in NAMES}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **values}


def _trained(prepared: nn.Module) -> list[tuple[str, nn.Parameter]]:
    bare: Any = prepared.module if hasattr(prepared, "module") else prepared
    return [(name, p) for name, p in bare.named_parameters() if p.requires_grad]


def _zero() -> bool:
    return PartialState().distributed_type == DistributedType.DEEPSPEED


def _zero_optimizer(optimizer: Any) -> Any:
    return optimizer.optimizer


def _zero_moments(trained: list[tuple[str, nn.Parameter]], zero: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    # Before the first update there are none, and DeepSpeed raises where it is asked for them.
    if not any(zero.optimizer.state.values()):
        return {}
    _link(zero)
    found = {}
    for name, parameter in trained:
        for kind in NAMES:
            value = safe_get_full_optimizer_state(parameter, kind)
            assert value is not None  # every trained parameter was linked
            found[f"{kind}/{name}"] = value
    return found


def _load_zero_moments(
    trained: list[tuple[str, nn.Parameter]], zero: Any, saved: dict[str, torch.Tensor], step: int
) -> None:
    if saved:
        _make_room(zero, step)
        _link(zero)
        for name, parameter in trained:
            for kind in NAMES:
                _put_back(parameter, saved[f"{kind}/{name}"].to(parameter.device), kind)
    # ZeRO steps on its own float32 copy of the weights that have just been loaded.
    zero.refresh_fp32_params()


def _make_room(zero: Any, step: int) -> None:
    for flat in _flat_parts(zero):
        state = {kind: torch.zeros_like(flat) for kind in NAMES}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step)), **state}


def _put_back(parameter: Any, value: torch.Tensor, kind: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_tensor"):
        safe_set_full_optimizer_state(parameter, value, kind)
        return
    # ZeRO-3 fills its last part up; DeepSpeed's own function refuses a value that needs it.
    part = parameter.ds_tensor.numel()
    rank, world = dist.get_rank(), dist.get_world_size()
    padded = torch.nn.functional.pad(value.flatten(), (0, part * world - value.numel()))
    safe_set_local_optimizer_state(parameter, padded[rank * part : (rank + 1) * part], kind)


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _flat_parts(zero: Any) -> list[torch.Tensor]:
    """This rank's float32 copies of the weights, which the optimizer steps on."""
    if _is_stage_3(zero):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


def _link(zero: Any) -> None:
    # DeepSpeed links a parameter to its moments when the first group has stepped, and so finds
    # none for the others; linked again, all are there. ZeRO-3 looks them up instead.
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if _is_stage_3(zero):
        return
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
