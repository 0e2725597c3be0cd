"""The text encoder: titles to vectors, with a transformers model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from dist_train.config.training import TextEncoderOptions, TrainingOptions
from dist_train.config.values import local_path
from dist_train.distributed.precision import autocast
from dist_train.encoders.pooling import Neck, freeze_shift, mean_of_tokens, unavailable
from dist_train.evaluation.titles import decode_escapes
from shards.read.shard_set import Item
from shards.storage.errors import BadInput

disable_progress_bar()  # that for loading weights would be written by every rank, into every log


class TextEncoder(nn.Module):
    """A transformers backbone, pooling and neck: tokens (b, T) to vectors (b, D)."""

    def __init__(self, options: TextEncoderOptions) -> None:
        """Build from a hub name or a local folder; BadInput when its weights are not available."""
        super().__init__()
        self.options = options
        self.precision = "fp32"
        backbone, self.tokenizer = _backbone(options)
        self.backbone: Any = backbone
        self.width: int = backbone.config.hidden_size
        self.neck = Neck(self.width) if options.neck else nn.Identity()
        if options.neck:
            freeze_shift(self.backbone, self.width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tokens and mask (b, T) int64, mask 1 on real tokens, to float32 (b, D)."""
        with autocast(self.precision, tokens.device):
            states = self._states(tokens, mask)
        pooled = states[:, 0] if self.options.pooling == "cls" else mean_of_tokens(states, mask)
        return self.neck(pooled.float())

    def recompute_activations(self) -> None:
        """Keep only some activations for the backward pass; BadInput when the model cannot."""
        # Its name since transformers 5.20 or so, which warns of the older one.
        enable = getattr(self.backbone, "activation_checkpointing_enable", None)
        try:
            (enable or self.backbone.gradient_checkpointing_enable)()
        except ValueError as error:
            raise BadInput(f"gradient_checkpointing: {error}; leave it off") from None

    def compile_backbone(self) -> None:
        """Compile the backbone with torch.compile; the names of weights stay."""
        self._states = torch.compile(self._states, dynamic=True)

    def _states(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state

    def inputs(self, min_crop: float | None = None) -> "TextInputs":
        """Turns items into this encoder's inputs; titles are not augmented."""
        return TextInputs(self.tokenizer, self.options.max_length)

    def training_inputs(self, config: TrainingOptions) -> "TextInputs":
        """The same: there is no augmentation of titles."""
        return self.inputs()

    def preprocessing(self) -> dict[str, Any]:
        """How a title is prepared for the model, as JSON values."""
        return {"max_length": self.options.max_length, "escapes": "decoded"}

    def save_library_files(self, folder: Path) -> None:
        """config.json and the tokenizer in transformers' layout."""
        self.backbone.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class TextInputs:
    """From items that have a title to tokens; a plain value, so that workers can receive it."""

    needs_photo: ClassVar[bool] = False
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, items: list[Item], seeds: list[int]) -> tuple[torch.Tensor, ...]:
        """Tokens and mask (b, T), T the longest title of the batch, at most max_length."""
        titles = [decode_escapes(item.title) for item in items]
        batch = self.tokenizer(
            titles, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"]


def _backbone(options: TextEncoderOptions) -> tuple[Any, PreTrainedTokenizerBase]:
    source = str(local_path(options.model) or options.model)
    try:
        config = AutoConfig.from_pretrained(source)
        for name in vars(config):
            if name.endswith(("dropout", "dropout_prob")) and "classifier" not in name:
                setattr(config, name, options.dropout)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if options.pretrained:
            backbone = AutoModel.from_pretrained(source, config=config, dtype=torch.float32)
        else:
            backbone = AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise unavailable(options.model, error) from None
    # The pooler after the last layer takes no part in the vector; DDP would wait for its gradient.
    if (pooler := getattr(backbone, "pooler", None)) is not None:
        pooler.requires_grad_(False)
    # Which weights form which layer, from below, in the form of timm's models, where (99999,) means
    # "with the layer before".
    blocks = [(r"^(?:\w+\.)?layers?\.(\d+)\.", None), (r"", (99999,))]
    backbone.group_matcher = lambda coarse=False: {"stem": r"^embeddings", "blocks": blocks}
    return backbone.train(), tokenizer
