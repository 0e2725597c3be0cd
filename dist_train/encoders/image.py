"""The image encoder: photos to vectors, with a timm model."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from PIL import ImageOps
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import nn

from dist_train.config.training import ImageEncoderOptions, ImageTraining, TrainingOptions
from dist_train.config.values import local_path
from dist_train.distributed.precision import autocast
from dist_train.encoders.pooling import (
    Neck,
    freeze_shift,
    freeze_unused,
    generalised_mean,
    unavailable,
)
from shards.photos.decode import Recipe, decode_photo
from shards.read.shard_set import Item
from shards.storage.errors import BadInput
from shards.storage.files import read_json, write_json


class ImageEncoder(nn.Module):
    """A timm backbone, pooling and neck: pixels (b, 3, S, S) to vectors (b, D), not normalised."""

    def __init__(self, options: ImageEncoderOptions) -> None:
        """Build from a timm name or a local folder; BadInput when its weights are not available."""
        super().__init__()
        self.options = options
        self.precision = "fp32"
        self.backbone: Any = _backbone(options)
        # With a pooling of our own, the number of features before what timm's own head adds.
        self.width: int = self.backbone.num_features
        if options.pooling == "auto":
            self.width = getattr(self.backbone, "head_hidden_size", self.width)
        if options.pooling == "cls" and not getattr(self.backbone, "num_prefix_tokens", 0):
            raise BadInput(f"encoder.pooling cls: {options.model} has no class token")
        self.neck = Neck(self.width) if options.neck else nn.Identity()
        if options.neck and options.pooling != "gem":
            freeze_shift(self.backbone, self.width)
        if options.pooling != "auto":
            # Freeze what only the model's own head uses, found with one blank picture. Eval mode
            # moves no statistics and draws no random numbers.
            training, side = self.backbone.training, options.image_size
            device = next(self.backbone.parameters()).device
            self.backbone.eval()
            with torch.enable_grad():
                pooled = self._pooled(torch.zeros(1, 3, side, side, device=device))
            freeze_unused(self.backbone, pooled)
            self.backbone.train(training)

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

    def inputs(self, min_crop: float | None = None, **augmentation: Any) -> "ImageInputs":
        """Turns items into this encoder's inputs; with `min_crop`, augmented for training."""
        return ImageInputs(**self.preprocessing(), min_crop=min_crop, **augmentation)

    def training_inputs(self, config: TrainingOptions) -> "ImageInputs":
        """The same, augmented by the options of `config`."""
        assert isinstance(config, ImageTraining)
        names = ("jitter", "erase", "rand_augment")
        return self.inputs(config.min_crop, **{name: getattr(config, name) for name in names})

    def preprocessing(self) -> dict[str, Any]:
        """How a stored photo is prepared for the model, as JSON values."""
        cfg = self.backbone.pretrained_cfg
        return {
            "image_size": self.options.image_size,
            "decode": self.options.decode,
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
        }

    def save_library_files(self, folder: Path) -> None:
        """config.json in timm's layout, so that timm itself opens the folder."""
        cfg = {k: v for k, v in self.backbone.pretrained_cfg.items() if k not in ("file", "source")}
        cfg["input_size"] = [3, self.options.image_size, self.options.image_size]
        arguments = getattr(self.backbone, "_model_args", {})
        config = {"architecture": cfg["architecture"], "pretrained_cfg": cfg}
        write_json(folder / "config.json", config | {"model_args": arguments})

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
    """From items that have a photo to pixels; a plain value, so that workers can receive it."""

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
        side = self.image_size
        if self.min_crop is None:
            # The middle square, equal to the bit to timm's transform, in a third of the time.
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
            pixels = torch.empty(len(items), 3, side, side)
            for row, item in zip(pixels, items, strict=True):
                photo = np.array(decode_photo(item.photo or b"", side, self.decode))
                top, left = (round((length - side) / 2) for length in photo.shape[:2])
                square = torch.from_numpy(photo[top : top + side, left : left + side])
                row.copy_(square.permute(2, 0, 1)).div_(255).sub_(mean).div_(std)
            return (pixels,)
        transform, rows = self._augmentation(self.min_crop), []
        for item, seed in zip(items, seeds, strict=True):
            # timm's transforms draw from the global generators, RandAugment from all three.
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            photo = decode_photo(item.photo or b"", round(side * 1.15), self.decode)
            rows.append(transform(photo))
        return (torch.stack(rows),)

    def _augmentation(self, min_crop: float) -> Any:
        transform = create_transform(
            self.image_size, mean=self.mean, std=self.std, is_training=True,
            scale=(min_crop, 1.0), color_jitter=self.jitter, interpolation="bilinear",
            re_prob=self.erase, auto_augment=self.rand_augment or None,
        )  # fmt: skip
        for one in transform.transforms:
            for op in one.ops if isinstance(one, RandAugment) else []:
                if op.name.startswith("Posterize"):
                    # At the top of its scale timm keeps no bit at all, which Pillow refuses.
                    op.aug_fn = lambda photo, bits, **_: ImageOps.posterize(
                        photo, min(max(bits, 1), 8)
                    )
        return transform


def _backbone(options: ImageEncoderOptions) -> Any:
    """The timm model without its classifier; BadInput when it or its weights are not available."""
    folder = local_path(options.model)
    name = f"local-dir:{folder}" if folder else options.model
    try:
        if folder is not None:
            config = read_json(folder / "config.json")
            cfg = config.get("pretrained_cfg", config)
            known = timm.get_pretrained_cfg(config["architecture"], allow_unregistered=True)
            fixed = cfg.get("fixed_input_size", known and known.fixed_input_size)
        else:
            known = timm.get_pretrained_cfg(name)
            fixed = known and known.fixed_input_size
        size = {"img_size": options.image_size} if fixed else {}
        return timm.create_model(name, pretrained=options.pretrained, num_classes=0, **size)
    except RuntimeError as error:
        raise unavailable(options.model, str(error).splitlines()[0]) from None
    except Exception as error:
        # The hub's client raises many kinds of error; the remedy is the same.
        raise unavailable(options.model, error) from None
