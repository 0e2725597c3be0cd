"""The image and the text encoder, from pixels or tokens to one vector an item, and their folders.

A folder opens with plain timm or transformers; ours beside their files are neck.safetensors,
dist_train.json and preprocessing.json.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dist_train.config.training import (
    ImageEncoderOptions,
    ImageTraining,
    Modality,
    TextEncoderOptions,
    TrainingOptions,
    result_options,
)
from dist_train.distributed.precision import autocast
from dist_train.encoders.batches import ImageInputs, TextInputs
from dist_train.encoders.neck import new_neck
from dist_train.encoders.probe import (
    check_photo_is_seen,
    freeze_shifts,
    freeze_unused,
    in_mode,
    is_random,
    layers_from_below,
    stirred,
)
from dist_train.encoders.source import (
    OURS,
    Source,
    compare_with_run,
    files_of,
    find_model,
    first_line,
)
from dist_train.encoders.tokens import (
    check_class_token,
    check_lengths,
    fit_tokenizer,
    plain_tokens,
    pool,
)
from dist_train.encoders.weights import (
    Load,
    check_finite,
    check_loaded,
    open_timm,
    open_transformer,
)
from shards.storage.errors import BadInput
from shards.storage.files import atomic_path, read_json, write_atomic, write_json

FORMAT = 2
log = logging.getLogger(__name__)
# What every rank would write into every log: a bar for loading weights, and a table of tensors that
# do not fit, which weights.py reports in one line.
disable_progress_bar()
set_verbosity_error()


class ImageEncoder(nn.Module):
    """A timm backbone, pooling and neck: pixels (b, 3, S, S) to vectors (b, D), not normalised."""

    def __init__(self, options: ImageEncoderOptions, load: bool = False) -> None:
        """Build from a timm name or a local folder; `load` one that has been trained.

        Raises BadInput for a model that is not available, whose weights do not fit or that cannot
        take photos of this size.
        """
        super().__init__()
        source = find_model(options.model, "image", options.pretrained)
        if options.pooling == "auto":
            options = replace(options, pooling=source.trained_options().get("pooling", "auto"))
        self.options = options
        self.precision = "fp32"
        with source.opened():
            backbone, loads = open_timm(source, options)
        self.backbone: Any = backbone
        # On CPUs torch 2.14 writes outside its memory, and dies, in the backward pass of a strided
        # 1 x 1 convolution of photos whose channels come last (the stem of fastvit has one).
        breaks = any(
            isinstance(m, nn.Conv2d) and (m.in_channels, m.kernel_size) == (3, (1, 1))
            for m in self.backbone.modules()
        )
        self.memory_format = torch.contiguous_format if breaks else torch.channels_last
        if options.pooling == "cls" and not getattr(self.backbone, "num_prefix_tokens", 0):
            raise BadInput(f"encoder.pooling cls: {options.model} has no class token")
        check_finite(source, self.backbone)
        if load:
            self.width: int = source.width
            check_loaded(source, self.backbone, loads)
        else:
            self.width = self._examine(source, loads)
        self.neck = new_neck(source, options, self.width)

    def _examine(self, source: Source, loads: list[Load]) -> int:
        """Run the backbone before its training; freeze and refuse by what it does; its width."""
        with stirred(self.backbone):
            pooled, pixels = self._probe(source)
            gradients, (seen,) = freeze_unused(self.backbone, pooled, pixels)
            if self.options.neck:
                freeze_shifts(self.backbone, pooled, gradients)
        check_photo_is_seen(seen, str(source))
        named = dict(self.backbone.named_parameters())
        check_loaded(source, self.backbone, loads, named.keys() - gradients.keys())
        drops = any(isinstance(m, nn.Dropout | DropPath) for m in self.backbone.modules())
        if drops and is_random(self.backbone, lambda: self._pooled(pixels)):
            log.warning(
                "%s draws random numbers in training (as by dropout or drop_path in its "
                "config.json): the trained weights will depend on the number of processes",
                source,
            )
        return pooled.shape[1]

    def _probe(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors (2, D) of two different pictures and their pixels, with gradients."""
        side, draw = self.options.image_size, torch.Generator().manual_seed(0)
        pixels = torch.randn(2, 3, side, side, generator=draw)
        pixels[1] = pixels[1] * torch.linspace(0, 2, side) + 0.5
        pixels.requires_grad_()
        try:
            with in_mode(self.backbone, False), torch.enable_grad():
                pooled = self._pooled(pixels)
            if pooled.ndim != 2:
                raise ValueError(f"it makes {tuple(pooled.shape)} of two")
        except Exception as error:
            raise BadInput(
                f"{source}, pooling {self.options.pooling}: cannot make vectors of colour photos "
                f"of {side} pixels ({first_line(error)}); try "
                "another encoder.image_size or encoder.pooling, or another model"
            ) from None
        return pooled, pixels

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (b, 3, S, S) float32, normalised, to float32 (b, D)."""
        pixels = pixels.contiguous(memory_format=self.memory_format)
        with autocast(self.precision, pixels.device):
            pooled = self._pooled(pixels)
        return self.neck(pooled.float())

    def _pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.options.pooling == "auto":
            return self.backbone(pixels)
        features = self.backbone.forward_features(pixels)
        if features.ndim == 4:
            channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if channels_last else features.flatten(2).mT
        if self.options.pooling == "cls":
            return features[:, 0]
        places = features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        if self.options.pooling == "mean":
            return places.mean(1)
        # The generalised mean over places, Radenovic et al. (2018).
        return places.clamp(min=1e-6).pow(3.0).mean(1).pow(1 / 3.0)

    def recompute_activations(self) -> None:
        """Keep only some activations for the backward pass; BadInput when the model cannot."""
        try:
            self.backbone.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise BadInput(
                f"gradient_checkpointing: timm has none for {self.options.model}; leave it off, or "
                "use accumulation for less memory"
            ) from None

    def compile_backbone(self) -> None:
        """Compile backbone and pooling with torch.compile; the names of weights stay."""
        self._pooled = torch.compile(self._pooled)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Training mode, but a pretrained backbone keeps its batch statistics.

        The statistics of a small batch on one rank are noise, and would make the weights depend on
        W.
        """
        super().train(mode)
        if self.options.pretrained:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def inputs(self, training: TrainingOptions | None = None) -> ImageInputs:
        """Turns items into this encoder's inputs; with `training`, augmented by its options."""
        assert training is None or isinstance(training, ImageTraining)
        return ImageInputs(**self.preprocessing(), augmentation=training)

    def preprocessing(self) -> dict[str, Any]:
        """How a stored photo is prepared for the model, as JSON values."""
        cfg = self.backbone.pretrained_cfg
        return {
            "image_size": self.options.image_size,
            "decode": self.options.decode,
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
        }


class TextEncoder(nn.Module):
    """A transformers backbone, pooling and neck: tokens (b, T) to vectors (b, D)."""

    def __init__(self, options: TextEncoderOptions, load: bool = False) -> None:
        """Build from a hub name or a local folder; `load` one that has been trained.

        Raises BadInput for a model that is not available, whose weights or tokenizer do not fit or
        that does not make one state a token.
        """
        super().__init__()
        source = find_model(options.model, "text", options.pretrained)
        self.precision = "fp32"
        with source.opened():
            pooling, prefix = options.pooling, options.prefix
            self.options = options = replace(
                options,
                pooling=source.text_pooling() if pooling == "auto" else pooling,
                prefix=source.text_prefix() if prefix is None else prefix,
            )
            backbone, self.tokenizer, loads = open_transformer(source, options)
        self.backbone: Any = backbone.train()
        fit_tokenizer(self.tokenizer, backbone, source)
        check_finite(source, backbone)
        if load:
            self.width: int = source.width
            check_loaded(source, backbone, loads)
        else:
            self.width = self._examine(source, loads)
        self.neck = new_neck(source, options, self.width)

    def _examine(self, source: Source, loads: list[Load]) -> int:
        """Run the backbone before its training; freeze and refuse by what it does; its width."""
        backbone, ids = self.backbone, plain_tokens(self.tokenizer)
        with stirred(backbone):
            pooled = self._probe(source, ids)
            gradients, _ = freeze_unused(backbone, pooled)
            if self.options.neck:
                freeze_shifts(backbone, pooled, gradients)
        named = dict(backbone.named_parameters())
        check_loaded(source, backbone, loads, named.keys() - gradients.keys())
        tokens = ids[None, :2]
        forward = partial(self._states, tokens, torch.ones_like(tokens))
        # In the form of timm's models: the place of a weight by its name.
        layers = layers_from_below(backbone, forward)
        backbone.group_matcher = lambda coarse=False: layers.__getitem__
        if self.options.dropout == 0 and is_random(backbone, forward):
            log.warning(
                "%s draws random numbers in training with dropout 0: the trained weights will "
                "depend on the number of processes",
                source,
            )
        return pooled.shape[1]

    def _probe(self, source: Source, ids: torch.Tensor) -> torch.Tensor:
        """Vectors (2, D) of two titles of the plain tokens `ids`, with gradients."""
        longest = min(self.options.max_length, 16)
        mask = torch.ones(2, longest, dtype=torch.int64)
        mask[0, (longest + 1) // 2 :] = 0
        tokens = torch.stack([ids.repeat(longest)[:longest], ids.flip(0).repeat(longest)[:longest]])
        tokens[1, 0] = tokens[0, 0]
        tokens = tokens.where(mask > 0, self.tokenizer.pad_token_id)
        with in_mode(self.backbone, False), torch.enable_grad():
            try:
                states = self._states(tokens, mask)
                if states.shape[:2] != tokens.shape:
                    raise ValueError(f"it makes states {tuple(states.shape)}")
            except Exception as error:
                raise BadInput(
                    f"{source}: cannot encode titles alone, as an encoder or a decoder does "
                    f"({first_line(error)}); name another model"
                ) from None
            pooled = pool(states, mask, self.options.pooling)
            if self.options.pooling == "cls" and longest > 1:
                check_class_token(self.tokenizer, states, source)
            check_lengths(self._states, tokens, self.options.max_length, source)
        return pooled

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tokens and mask (b, T) int64, mask 1 on real tokens, to float32 (b, D)."""
        with autocast(self.precision, tokens.device):
            states = self._states(tokens, mask)
        return self.neck(pool(states, mask, self.options.pooling).float())

    def _states(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state

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

    def inputs(self, training: TrainingOptions | None = None) -> TextInputs:
        """Turns items into this encoder's inputs; titles are not augmented in training."""
        return TextInputs(self.tokenizer, self.options.max_length, self.options.prefix or "")

    def preprocessing(self) -> dict[str, Any]:
        """How a title is prepared for the model, as JSON values."""
        options = self.options
        return {
            "max_length": options.max_length,
            "escapes": "decoded",
            "prefix": options.prefix,
            "pooling": options.pooling,
        }


Encoder = ImageEncoder | TextEncoder


def new_encoder(options: ImageEncoderOptions | TextEncoderOptions, seed: int) -> Encoder:
    """The encoder before training; its random parts are a function of the seed alone."""
    torch.manual_seed(seed)
    if isinstance(options, ImageEncoderOptions):
        return ImageEncoder(options)
    return TextEncoder(options)


def save_encoder(encoder: Encoder, folder: Path, card: str) -> list[Path]:
    """Write the encoder's folder with `card` as its README; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = encoder.backbone
    if isinstance(encoder, ImageEncoder):
        modality = "image"
        # timm's layout, so that timm itself opens the folder.
        cfg = {k: v for k, v in backbone.pretrained_cfg.items() if k not in ("file", "source")}
        cfg["input_size"] = [3, encoder.options.image_size, encoder.options.image_size]
        config = {"architecture": cfg["architecture"], "pretrained_cfg": cfg}
        arguments = getattr(backbone, "_model_args", {})
        write_json(folder / "config.json", config | {"model_args": arguments})
    else:
        modality = "text"
        backbone.config.save_pretrained(folder)
        if encoder.options.trust_remote_code:
            for part in (backbone, backbone.config):
                custom_object_save(part, folder)
        encoder.tokenizer.save_pretrained(folder)
    for name, module in (("model", backbone), ("neck", encoder.neck)):
        save_tensors(folder / f"{name}.safetensors", module.state_dict(), {"format": "pt"})
    ours = {"format": FORMAT, "modality": modality, "width": encoder.width}
    write_json(folder / OURS, ours | {"options": result_options(encoder.options)})
    write_json(folder / "preprocessing.json", encoder.preprocessing())
    write_atomic(folder / "README.md", card.encode())
    return files_of(folder)


def load_encoder(folder: Path, modality: Modality, trust_remote_code: bool = False) -> Encoder:
    """Load an encoder folder in eval mode; BadInput when it is not of the modality `modality`.

    That of a run is compared first. `trust_remote_code` is never read from the folder itself, which
    someone may have sent.
    """
    compare_with_run(folder)
    ours = read_json(folder / OURS)
    if ours["format"] != FORMAT:
        raise BadInput(f"{folder}: encoder format {ours['format']}, this version reads {FORMAT}")
    if ours["modality"] != modality:
        raise BadInput(f"{folder}: an encoder of {ours['modality']}, wanted {modality}")
    local = ours["options"] | {"model": str(folder), "pretrained": True}
    if modality == "image":
        encoder = ImageEncoder(ImageEncoderOptions(**local), load=True)
    else:
        trust = {"trust_remote_code": trust_remote_code}
        encoder = TextEncoder(TextEncoderOptions(**local | trust), load=True)
    return encoder.eval()


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to the safetensors file `path`, atomically, each with separate memory."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=metadata)
