"""Whether the weights of a file are those of the model: tensors used against tensors wanted."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dist_train.encoders.source import Source
from shards.storage.errors import BadInput

Load = tuple[set[str], set[str]]
"""Names that a file lacked, and names that it had beside those of the model."""
log = logging.getLogger(__name__)


@contextmanager
def recorded_loads() -> Iterator[list[Load]]:
    """What each load_state_dict inside leaves out, which timm itself only logs."""
    found: list[Load] = []
    plain = nn.Module.load_state_dict

    def load(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        result = plain(self, state_dict, strict=False, assign=assign)
        found.append((set(result.missing_keys), set(result.unexpected_keys)))
        return result

    nn.Module.load_state_dict = load
    try:
        yield found
    finally:
        nn.Module.load_state_dict = plain


def check_loaded(source: Source, backbone: nn.Module, loads: list[Load]) -> None:
    """BadInput when weights that take part in the vector were not in the file or hold NaN or Inf.

    Those that take no part, such as a classifier or a pooler, are frozen already. Tensors of the
    file that lie in further layers than the model has are told.
    """
    state = {name: one for name, one in backbone.state_dict().items() if one.is_floating_point()}
    idle = {name for name, weight in backbone.named_parameters() if not weight.requires_grad}
    for missing, unexpected in loads:
        lacking = sorted((missing & state.keys()) - idle)
        if lacking:
            raise BadInput(_what_is_lacking(source, len(state), lacking, unexpected))
        numbered = {re.sub(r"\d+", "#", name) for name in state}
        more = sorted(name for name in unexpected if re.sub(r"\d+", "#", name) in numbered)
        if more:
            log.warning(
                "%s: %d tensors of its file have no place in the model and are left out, such as "
                "%s",
                *(source, len(more), more[0]),
            )
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BadInput(
            f"{source}: {len(broken)} of {len(state)} tensors hold NaN or Inf, the first "
            f"{broken[0]}; take the weights from before they broke"
        )


def _what_is_lacking(source: Source, wanted: int, lacking: list[str], unexpected: set[str]) -> str:
    message = (
        f"{source}: its weights hold {wanted - len(lacking)} of the {wanted} tensors that the "
        f"model uses; missing are {lacking[0]}"
    )
    message += f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    for name in sorted(unexpected):
        for one in lacking:
            if name.endswith(f".{one}"):
                return (
                    f"{message}; the names in the file begin with {name[: -len(one)]}: save the "
                    "state of the model inside, without it"
                )
    return f"{message}; save the weights again, or correct config.json"
