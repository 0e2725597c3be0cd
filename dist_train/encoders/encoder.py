"""The image and the text encoder, from pixels or tokens to one vector an item, and their folders.

A folder opens with plain timm or transformers; ours beside their files are neck.safetensors,
dist_train.json and preprocessing.json.
"""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from dist_train.config.training import (
    ImageEncoderOptions,
    ImageTraining,
    Modality,
    TextEncoderOptions,
    TrainingOptions,
    result_options,
)
from dist_train.distributed.precision import autocast
from dist_train.distributed.runtime import sum_over_ranks
from dist_train.distributed.stage import RUN
from dist_train.encoders.batches import ImageInputs, TextInputs
from shards.read.location import Folder
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import atomic_path, read_json, write_atomic, write_json

FORMAT = 1
ENCODER_FILES = "encoder/*"
"""The files of a run's manifest that are its encoder."""
disable_progress_bar()  # that for loading weights would be written by every rank, into every log


class Neck(nn.Module):
    """Batch normalisation without a bias, its statistics taken over all ranks (Luo et al., 2019).

    Input and output (b, D). In eval mode, and before any training, it uses the running
    statistics: at the start mean 0 and variance 1, the identity.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.momentum, self.eps = momentum, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the batch's statistics in training, else by the running ones."""
        x = x.float()
        if not self.training:
            return (x - self.mean) * (self.variance + self.eps).rsqrt() * self.weight
        sums = sum_over_ranks(torch.stack([x.sum(0), torch.full_like(x[0], len(x))]))
        mean = sums[0] / sums[1]
        # A second sum, about the mean: the difference of two large sums would lose the digits.
        variance = sum_over_ranks((x - mean).square().sum(0)) / sums[1]
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            unbiased = variance * sums[1] / (sums[1] - 1).clamp(min=1)
            self.variance.lerp_(unbiased, self.momentum)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight


class ImageEncoder(nn.Module):
    """A timm backbone, pooling and neck: pixels (b, 3, S, S) to vectors (b, D), not normalised."""

    def __init__(self, options: ImageEncoderOptions) -> None:
        """Build from a timm name or a local folder; BadInput when its weights are not available."""
        super().__init__()
        self.options = options
        self.precision = "fp32"
        folder, side = local_path(options.model), options.image_size
        try:
            config = (
                read_json(folder / "config.json") if folder else {"architecture": options.model}
            )
            known = timm.get_pretrained_cfg(config["architecture"])
            given = config.get("pretrained_cfg", config)
            fixed = given.get("fixed_input_size", known and known.fixed_input_size)
            self.backbone: Any = timm.create_model(
                f"local-dir:{folder}" if folder else options.model,
                pretrained=options.pretrained,
                num_classes=0,
                **({"img_size": side} if fixed else {}),
            )
        except RuntimeError as error:
            raise _unavailable(options.model, str(error).splitlines()[0]) from None
        except Exception as error:
            # The hub's client raises many kinds of error; the remedy is the same.
            raise _unavailable(options.model, error) from None
        # With a pooling of our own, the number of features before what timm's own head adds.
        self.width: int = self.backbone.num_features
        if options.pooling == "auto":
            self.width = getattr(self.backbone, "head_hidden_size", self.width)
        if options.pooling == "cls" and not getattr(self.backbone, "num_prefix_tokens", 0):
            raise BadInput(f"encoder.pooling cls: {options.model} has no class token")
        self.neck = Neck(self.width) if options.neck else nn.Identity()
        if options.neck and options.pooling != "gem":
            _freeze_shift(self.backbone, self.width)
        if options.pooling != "auto":
            # Freeze what only the model's own head uses: DDP would wait for its gradients for ever.
            # Found with one blank picture; eval mode moves no statistics and draws no random
            # numbers.
            weights = [weight for weight in self.backbone.parameters() if weight.requires_grad]
            device, training = weights[0].device, self.backbone.training
            self.backbone.eval()
            with torch.enable_grad():
                pooled = self._pooled(torch.zeros(1, 3, side, side, device=device))
            self.backbone.train(training)
            gradients = torch.autograd.grad(pooled.sum(), weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.requires_grad_(gradient is not None)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (b, 3, S, S) float32, normalised, to float32 (b, D)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
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

    def __init__(self, options: TextEncoderOptions) -> None:
        """Build from a hub name or a local folder; BadInput when its weights are not available."""
        super().__init__()
        self.options = options
        self.precision = "fp32"
        source = str(local_path(options.model) or options.model)
        try:
            config = AutoConfig.from_pretrained(source)
            for name in vars(config):
                if name.endswith(("dropout", "dropout_prob")) and "classifier" not in name:
                    setattr(config, name, options.dropout)
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
            if options.pretrained:
                backbone = AutoModel.from_pretrained(source, config=config, dtype=torch.float32)
            else:
                backbone = AutoModel.from_config(config)
        except (OSError, ValueError) as error:
            raise _unavailable(options.model, error) from None
        # The pooler takes no part in the vector; DDP would wait for its gradient.
        if (pooler := getattr(backbone, "pooler", None)) is not None:
            pooler.requires_grad_(False)
        # Which weights form which layer, from below, in the form of timm's models, where (99999,)
        # means "with the layer before".
        blocks = [(r"^(?:\w+\.)?layers?\.(\d+)\.", None), (r"", (99999,))]
        backbone.group_matcher = lambda coarse=False: {"stem": r"^embeddings", "blocks": blocks}
        self.backbone: Any = backbone.train()
        self.width: int = backbone.config.hidden_size
        self.neck = Neck(self.width) if options.neck else nn.Identity()
        if options.neck:
            _freeze_shift(self.backbone, self.width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tokens and mask (b, T) int64, mask 1 on real tokens, to float32 (b, D)."""
        with autocast(self.precision, tokens.device):
            states = self._states(tokens, mask)
        if self.options.pooling == "cls":
            pooled = states[:, 0]
        else:
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.neck(pooled.float())

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
        return TextInputs(self.tokenizer, self.options.max_length)

    def preprocessing(self) -> dict[str, Any]:
        """How a title is prepared for the model, as JSON values."""
        return {"max_length": self.options.max_length, "escapes": "decoded"}


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
        encoder.tokenizer.save_pretrained(folder)
    for name, module in (("model", backbone), ("neck", encoder.neck)):
        save_tensors(folder / f"{name}.safetensors", module.state_dict(), {"format": "pt"})
    ours = {"format": FORMAT, "modality": modality, "width": encoder.width}
    write_json(folder / "dist_train.json", ours | {"options": result_options(encoder.options)})
    write_json(folder / "preprocessing.json", encoder.preprocessing())
    write_atomic(folder / "README.md", card.encode())
    return sorted(path for path in folder.rglob("*") if path.is_file())


def load_run_encoder(run: Path, modality: Modality | None = None) -> Encoder:
    """Load the encoder of a finished run in eval mode, each of its files compared once a process.

    Raises BadInput when it is not of the modality `modality`, if one is given; Corrupt for a file
    of encoder/ that is missing, not as training wrote it, or no part of the run, which the
    libraries that load a folder would take into account.
    """
    folder = Folder(run, RUN)
    names = folder.names(ENCODER_FILES)
    folder.compare(names)
    for path in (run / "encoder").rglob("*"):
        if path.is_file() and str(path.relative_to(run)) not in names:
            raise Corrupt(f"{path}: no part of this run, training did not write it; move it away")
    recorded = folder.json("encoder/dist_train.json")
    return load_encoder(run / "encoder", modality or recorded["modality"])


def load_encoder(folder: Path, modality: Modality) -> Encoder:
    """Load an encoder folder in eval mode; BadInput when it is not of the modality `modality`."""
    ours = read_json(folder / "dist_train.json")
    if ours["format"] != FORMAT:
        raise BadInput(f"{folder}: encoder format {ours['format']}, this version reads {FORMAT}")
    if ours["modality"] != modality:
        raise BadInput(f"{folder}: an encoder of {ours['modality']}, wanted {modality}")
    local = ours["options"] | {"model": str(folder), "pretrained": True}
    if modality == "image":
        encoder = ImageEncoder(ImageEncoderOptions(**local))
    else:
        encoder = TextEncoder(TextEncoderOptions(**local))
    encoder.neck.load_state_dict(load_file(folder / "neck.safetensors"))
    return encoder.eval()


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to the safetensors file `path`, atomically, each with separate memory."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def _freeze_shift(backbone: nn.Module, width: int) -> None:
    """Freeze the bias of the backbone's last layer norm, which the neck's mean cancels.

    Its gradient is 0 but for rounding, which AdamW turns into steps of full size that differ with
    the number of ranks. Applies to a mean or a token pooled from (b, T, `width`), which pass such a
    shift on.
    """
    norms = [m for m in backbone.modules() if isinstance(m, nn.LayerNorm)]
    if norms and norms[-1].bias is not None and norms[-1].normalized_shape == (width,):
        norms[-1].bias.requires_grad_(False)


def local_path(text: str) -> Path | None:
    """The folder that a model option names, or None for the name of a published model.

    Variables and ~ are expanded. Raises BadInput if a variable is not set or a path has no folder.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise BadInput(f"model {text}: the variable is not set in the environment")
    if Path(expanded).is_dir():
        return Path(expanded)
    if expanded != text or expanded.startswith((".", os.sep)):
        raise BadInput(f"model {text}: no such folder ({expanded})")
    return None


def _unavailable(model: str, reason: str | Exception) -> BadInput:
    """The error for a model that cannot be built or, with an exception, cannot be downloaded."""
    if isinstance(reason, Exception):
        kind = type(reason).__name__
        reason = f"not on this machine, and the hub does not give it ({kind})"
    return BadInput(
        f"encoder.model {model}: {reason}; name a local folder that holds config.json and "
        "model.safetensors: --encoder.model FOLDER"
    )
