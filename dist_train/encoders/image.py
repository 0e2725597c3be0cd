"""The image encoder: photos to vectors, by a timm model."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import nn

from dist_train.config import ImageEncoderOptions, local_path
from dist_train.encoders.pooling import Neck, freeze_shift, generalised_mean, weights_behind
from dist_train.encoders.sources import no_model, no_weights
from dist_train.runtime import autocast
from shards.decode import Recipe, decode_photo
from shards.errors import BadInput
from shards.files import read_json, write_json
from shards.reader import Item


class ImageEncoder(nn.Module):
    """A timm backbone, pooling and neck: pixels (b, 3, S, S) to vectors (b, D), not normalised."""

    def __init__(self, options: ImageEncoderOptions) -> None:
        """Build from a timm name or a local folder; BadInput when its weights cannot be had."""
        super().__init__()
        self.options = options
        self.precision = "fp32"
        self.backbone: Any = _backbone(options)
        self.width: int = _width(self.backbone, options.pooling)
        if options.pooling == "cls" and not getattr(self.backbone, "num_prefix_tokens", 0):
            raise BadInput(f"encoder.pooling cls: {options.model} has no class token")
        self.neck = Neck(self.width) if options.neck else nn.Identity()
        if options.neck and options.pooling != "gem":
            freeze_shift(self.backbone, self.width)
        if options.pooling != "auto":
            self._freeze_unused()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (b, 3, S, S) float32, normalised, to float32 (b, D)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with autocast(self.precision, pixels.device):
            pooled = self._pooled(pixels)
        return self.neck(pooled.float())

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
        """Have torch.compile make backbone and pooling faster; names of weights stay."""
        self._pooled = torch.compile(self._pooled)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Training mode, but a pretrained backbone keeps its batch statistics.

        Those of a small batch on one rank are noise, and would make the weights depend on W.
        """
        super().train(mode)
        if self.options.pretrained:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def inputs(self, min_crop: float | None = None, **augmentation: Any) -> "ImageInputs":
        """What makes this encoder's inputs of items; with `min_crop`, augmented for training."""
        return ImageInputs(**self.preprocessing(), min_crop=min_crop, **augmentation)

    def training_inputs(self, config: Any) -> "ImageInputs":
        """The same, augmented as `config` (ImageTraining) says."""
        return self.inputs(
            config.min_crop, jitter=config.jitter, erase=config.erase,
            rand_augment=config.rand_augment,
        )  # fmt: skip

    def preprocessing(self) -> dict[str, Any]:
        """What is done to a stored photo before the model sees it."""
        cfg = self.backbone.pretrained_cfg
        return {
            "image_size": self.options.image_size,
            "decode": self.options.decode,
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
        }

    def save_library_files(self, folder: Path) -> None:
        """config.json after timm's layout, so that timm itself opens the folder."""
        cfg = {k: v for k, v in self.backbone.pretrained_cfg.items() if k not in ("file", "source")}
        cfg["input_size"] = [3, self.options.image_size, self.options.image_size]
        arguments = getattr(self.backbone, "_model_args", {})
        config = {"architecture": cfg["architecture"], "pretrained_cfg": cfg}
        write_json(folder / "config.json", config | {"model_args": arguments})

    @torch.enable_grad()
    def _freeze_unused(self) -> None:
        """Freeze what only the model's own head uses: DDP waits for its gradient, and none comes.

        One blank picture tells, seen in eval mode, which moves no statistics and draws nothing.
        """
        training, side = self.backbone.training, self.options.image_size
        blank = torch.zeros(1, 3, side, side, device=next(self.backbone.parameters()).device)
        self.backbone.eval()
        used = weights_behind(self._pooled(blank))
        self.backbone.train(training)
        for weight in self.backbone.parameters():
            if weight not in used:
                weight.requires_grad_(False)

    def _pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.options.pooling == "auto":
            return self.backbone(pixels)
        features = self.backbone.forward_features(pixels)
        prefix = getattr(self.backbone, "num_prefix_tokens", 0)
        if features.ndim == 4:
            channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if channels_last else features.flatten(2).mT
        if self.options.pooling == "cls":
            return features[:, 0]
        places = features[:, prefix:]
        return places.mean(1) if self.options.pooling == "mean" else generalised_mean(places)


@dataclass(frozen=True)
class ImageInputs:
    """From items that have a photo to pixels; a plain value, so that workers can hold it."""

    needs_photo: ClassVar[bool] = True
    image_size: int
    mean: list[float]
    std: list[float]
    min_crop: float | None
    decode: Recipe = "balanced"
    jitter: float = 0.2
    erase: float = 0.0
    rand_augment: str = ""

    def __call__(self, items: list[Item], seeds: list[int]) -> tuple[torch.Tensor, ...]:
        """Pixels (b, 3, S, S) float32; `seeds` (b,) make the augmentation a function of them."""
        if self.min_crop is None:
            return (self._middles(items),)
        view = self._augmentation(self.min_crop)
        rows = []
        for item, seed in zip(items, seeds, strict=True):
            # timm's transforms draw from the global generators, RandAugment from all three.
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            rows.append(view(self._decoded(item, round(self.image_size * 1.15))))
        return (torch.stack(rows),)

    def _middles(self, items: list[Item]) -> torch.Tensor:
        """Middle squares (b, 3, S, S), to the bit those of timm's transform in a third the time."""
        side = self.image_size
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        rows = torch.empty(len(items), 3, side, side)
        for row, item in zip(rows, items, strict=True):
            photo = np.array(self._decoded(item, side))
            top, left = (round((length - side) / 2) for length in photo.shape[:2])
            square = torch.from_numpy(photo[top : top + side, left : left + side])
            row.copy_(square.permute(2, 0, 1)).div_(255).sub_(mean).div_(std)
        return rows

    def _decoded(self, item: Item, short_side: int) -> Image.Image:
        return decode_photo(item.photo or b"", short_side, self.decode)

    def _augmentation(self, min_crop: float) -> Any:
        view = create_transform(
            self.image_size, mean=self.mean, std=self.std, is_training=True,
            scale=(min_crop, 1.0), color_jitter=self.jitter, interpolation="bilinear",
            re_prob=self.erase, auto_augment=self.rand_augment or None,
        )  # fmt: skip
        for one in view.transforms:
            for op in one.ops if isinstance(one, RandAugment) else []:
                if op.name.startswith("Posterize"):
                    op.aug_fn = _posterized
        return view


def _posterized(photo: Image.Image, bits: int, **_: Any) -> Image.Image:
    # At the top of its scale timm keeps no bit at all, which Pillow refuses.
    return ImageOps.posterize(photo, min(max(bits, 1), 8))


def _backbone(options: ImageEncoderOptions) -> nn.Module:
    folder = local_path(options.model)
    name = f"local-dir:{folder}" if folder else options.model
    try:
        fixed = {"img_size": options.image_size} if _has_fixed_size(folder, name) else {}
        return timm.create_model(name, pretrained=options.pretrained, num_classes=0, **fixed)
    except RuntimeError as error:
        raise no_model(options.model, str(error).splitlines()[0]) from None
    except Exception as error:
        # The hub's client raises many kinds; the remedy is one.
        raise no_weights(options.model, error) from None


def _width(backbone: Any, pooling: str) -> int:
    if pooling != "auto":
        return backbone.num_features  # before what timm's own head adds
    return getattr(backbone, "head_hidden_size", backbone.num_features)


def _has_fixed_size(folder: Path | None, name: str) -> bool:
    if folder is not None:
        config = read_json(folder / "config.json")
        cfg = config.get("pretrained_cfg", config)
        known = timm.get_pretrained_cfg(config["architecture"], allow_unregistered=True)
        return bool(cfg.get("fixed_input_size", known and known.fixed_input_size))
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)
