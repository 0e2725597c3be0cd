"""Backbones from their files, and whether the weights there are those of the model."""

import logging
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from dist_train.config.training import ImageEncoderOptions, TextEncoderOptions
from dist_train.encoders.source import Source
from dist_train.encoders.tokens import check_tokenizer_files
from shards.storage.errors import BadInput
from shards.storage.files import read_json

Load = tuple[set[str], set[str]]
"""Names that a file lacked, and names that it had beside those of the model."""
DROPOUT = re.compile(r"^(?!.*classifier).*(dropout|pdrop)")
"""Probabilities of dropout in a config of transformers, whatever the model calls them."""
log = logging.getLogger(__name__)


def open_transformer(
    source: Source, options: TextEncoderOptions
) -> tuple[Any, PreTrainedTokenizerBase, list[Load]]:
    """The model with its dropout set, its tokenizer, and what its file lacked."""
    trust = {"trust_remote_code": options.trust_remote_code}
    config = AutoConfig.from_pretrained(source.path, **trust)
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            probability = isinstance(value, float | int) and not isinstance(value, bool)
            if probability and DROPOUT.search(name):
                setattr(part, name, options.dropout)
    check_tokenizer_files(source)
    tokenizer = AutoTokenizer.from_pretrained(source.path, **trust)
    loads: list[Load] = []
    if options.pretrained:
        backbone, load = AutoModel.from_pretrained(
            source.path, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, **trust,
        )  # fmt: skip
        loads.append((set(load["missing_keys"]), set(load["unexpected_keys"])))
        for name, in_file, wanted in sorted(load["mismatched_keys"]):
            raise BadInput(
                f"{source}: {name} is {tuple(in_file)} in its file and {tuple(wanted)} by "
                "config.json; save the model again, or correct config.json"
            )
    else:
        backbone = AutoModel.from_config(config, dtype=torch.float32, **trust)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = options.dropout
    return backbone, tokenizer, loads


def open_timm(source: Source, options: ImageEncoderOptions) -> tuple[Any, list[Load]]:
    """The model without classifier, and what its file lacked."""
    folder = source.folder
    config = read_json(folder / "config.json") if folder else {"architecture": source.published}
    known = timm.get_pretrained_cfg(config["architecture"])
    given = config.get("pretrained_cfg", config)
    fixed = given.get("fixed_input_size", known and known.fixed_input_size)
    with recorded_loads() as loads:
        backbone = timm.create_model(
            f"local-dir:{folder}" if folder else source.published,
            pretrained=options.pretrained,
            num_classes=0,
            **({"img_size": options.image_size} if fixed else {}),
        )
    return backbone, loads


@contextmanager
def recorded_loads() -> Iterator[list[Load]]:
    """What each load_state_dict inside leaves out, which timm only logs."""
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


def check_finite(source: Source, part: nn.Module) -> None:
    """BadInput when weights or statistics of `part` of an encoder hold NaN or Inf."""
    state = [(name, one) for name, one in part.state_dict().items() if one.is_floating_point()]
    weights = {name for name, _ in part.named_parameters()}
    broken = [
        name
        for name, tensor in state
        # Other buffers may be infinite, as masks and bounds are.
        if tensor.isnan().any()
        or (tensor.isinf().any() and (name in weights or "running_" in name))
    ]
    if broken:
        raise BadInput(
            f"{source}: {len(broken)} of its {len(state)} tensors hold NaN or Inf, the first "
            f"{broken[0]}; take the weights from before they broke"
        )


def check_loaded(
    source: Source, backbone: nn.Module, loads: list[Load], unused: Set[str] = frozenset()
) -> None:
    """BadInput when the file lacked weights that take part in the vector.

    `unused`: names of those that take no part, such as a classifier or a pooler. Tensors of the
    file that lie in further layers than the model has are reported.
    """
    state = {name for name, one in backbone.state_dict().items() if one.is_floating_point()}
    wanted = state - unused
    for missing, unexpected in loads:
        if lacking := sorted(missing & wanted):
            raise BadInput(_what_is_lacking(source, len(wanted), lacking, unexpected))
        numbered = {re.sub(r"\d+", "#", name) for name in state}
        more = sorted(name for name in unexpected if re.sub(r"\d+", "#", name) in numbered)
        if more:
            log.warning(
                "%s: %d tensors of its file have no place in the model and are left out, such as "
                "%s",
                *(source, len(more), more[0]),
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
