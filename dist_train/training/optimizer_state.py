"""AdamW's moments by parameter name, from DDP and from DeepSpeed's ZeRO-1 and 2 alike."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

NAMES = ("exp_avg", "exp_avg_sq")


def moments(prepared: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """`exp_avg/NAME` and `exp_avg_sq/NAME` of every trained parameter; all ranks call it."""
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
    """Put back what `moments` gave, as of `step`; all ranks call it, weights loaded before."""
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
    from deepspeed.utils import safe_set_full_optimizer_state

    for flat in zero.single_partition_of_fp32_groups:
        state = {kind: torch.zeros_like(flat) for kind in NAMES}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step)), **state}
    _link(zero)
    for name, parameter in trained:
        for kind in NAMES:
            value = saved[f"{kind}/{name}"].to(parameter.device)
            safe_set_full_optimizer_state(parameter, value, kind)
    # ZeRO steps on its own float32 copy of the weights that have just been loaded.
    zero.refresh_fp32_params()


def _link(zero: Any) -> None:
    # DeepSpeed links a parameter to its moments when the first group has stepped, and so finds
    # none for the others; linked again, all are there.
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
