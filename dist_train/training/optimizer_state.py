"""AdamW's moments by parameter name, from DDP and from DeepSpeed's ZeRO alike."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

NAMES = ("exp_avg", "exp_avg_sq")


def moments(prepared: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """`exp_avg/NAME` and `exp_avg_sq/NAME` of every trained parameter; all ranks call it."""
    out = {}
    for name, parameter in _trained(prepared):
        for kind in NAMES:
            value = _get(optimizer, parameter, kind)
            if value is not None:
                out[f"{kind}/{name}"] = value
    return out


def load_moments(
    prepared: nn.Module, optimizer: Optimizer, saved: dict[str, torch.Tensor], step: int
) -> None:
    """Put back what `moments` gave, as of `step`; all ranks call it."""
    for name, parameter in _trained(prepared):
        values = {kind: saved[f"{kind}/{name}"] for kind in NAMES if f"{kind}/{name}" in saved}
        if values:
            _set(optimizer, parameter, values, step)
    if _zero():
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(step))


def _trained(prepared: nn.Module) -> list[tuple[str, nn.Parameter]]:
    bare: Any = prepared.module if hasattr(prepared, "module") else prepared
    return [(name, p) for name, p in bare.named_parameters() if p.requires_grad]


def _zero() -> bool:
    return PartialState().distributed_type == DistributedType.DEEPSPEED


def _get(optimizer: Optimizer, parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
    if _zero():
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, kind)
    return optimizer.state.get(parameter, {}).get(kind)


def _set(
    optimizer: Optimizer, parameter: nn.Parameter, values: dict[str, torch.Tensor], step: int
) -> None:
    if _zero():
        from deepspeed.utils import safe_set_full_optimizer_state

        for kind, value in values.items():
            safe_set_full_optimizer_state(parameter, value, kind)
        return
    state = {kind: value.to(parameter.device) for kind, value in values.items()}
    optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
