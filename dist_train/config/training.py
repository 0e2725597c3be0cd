"""Options of training, and what the options of all stages share: types, checks, form as JSON."""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from shards.photos.decode import Recipe
from shards.photos.options import NO_EFFECT_ON_RESULT
from shards.storage.errors import BadInput

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]
Modality = Literal["image", "text"]
RAND_AUGMENT = r"rand(-(m(max)?\d+|n[1-9]\d*|(p[01]|mstd\d+)(\.\d+)?|inc[01]|t(3aw?|weights)))*"


def result_options(options: Any) -> dict[str, Any]:
    """The options (a dataclass) that a result depends on, as JSON values.

    Fields with NO_EFFECT_ON_RESULT stay out, also those of nested options.
    """
    named = {f.name: getattr(options, f.name) for f in fields(options) if not f.metadata.get("how")}
    return {k: result_options(v) if is_dataclass(v) else as_json(v) for k, v in named.items()}


def as_json(value: Any, without_none: bool = False) -> Any:
    """`value` with tuples as lists and paths as text; `without_none` drops keys without a value."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if not (without_none and inner is None)}
        return {key: as_json(inner, without_none) for key, inner in kept.items()}
    if isinstance(value, tuple | list):
        return [as_json(inner, without_none) for inner in value]
    return str(value) if isinstance(value, Path) else value


def check_range(options: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        # Written so that NaN is refused as well.
        if not low <= getattr(options, name) <= high:
            raise BadInput(f"{name}: {getattr(options, name)}, must lie in {low} to {high}")


def check_positive(options: Any, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise BadInput(f"{name}: {getattr(options, name)}, must be above 0")


@dataclass(frozen=True, kw_only=True)
class ImageEncoderOptions:
    """The image encoder: a timm model, pooled to one vector and normalised."""

    model: str = "vit_base_patch16_224"
    """Name of a timm model, or a local folder with config.json and model.safetensors."""
    pretrained: bool = True
    """Start from the published weights of the model; false starts from random weights."""
    pooling: Literal["auto", "cls", "mean", "gem"] = "auto"
    """How the model's outputs become one vector: the class token (cls), their mean, or generalised
    mean (gem). auto is the model's default: cls for a ViT, mean for a CNN."""
    image_size: int = 224
    """Side in pixels of the square photo that the model gets. More shows more detail and costs the
    square of it in time."""
    decode: Recipe = "balanced"
    """How photos are decoded, in training and wherever the encoder is used later: exact, balanced
    (twice as fast, nearly the same pixels) or fast (coarser)."""
    neck: bool = True
    """Batch normalisation over all processes before the vector is normalised (BNNeck)."""

    def __post_init__(self) -> None:
        check_positive(self, "image_size")


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions:
    """The text encoder: a transformers model, pooled to one vector and normalised."""

    model: str = "cahya/bert-base-indonesian-522M"
    """Model on the Hugging Face hub, or a local folder with the model and its tokenizer."""
    pretrained: bool = True
    """Start from the published weights of the model; false starts from random weights."""
    pooling: Literal["mean", "cls"] = "mean"
    """How the model's outputs become one vector: their mean over the tokens, or the first (cls)."""
    max_length: int = 64
    """Tokens of a title that are read; the rest of a longer title is ignored."""
    dropout: float = 0.0
    """Dropout probability in training. Above 0 the trained weights depend on the number of
    processes."""
    neck: bool = True
    """Batch normalisation over all processes before the vector is normalised (BNNeck)."""

    def __post_init__(self) -> None:
        check_positive(self, "max_length")
        check_range(self, 0, 1, "dropout")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The margin softmax over the training classes, sharded across processes."""

    loss: Literal["arcface", "cosface"] = "arcface"
    """Where the margin is applied: to the angle (arcface) or to the cosine (cosface)."""
    margin: float = 0.5
    """Size of the margin, in radians for arcface and in units of cosine for cosface. Lower it when
    the training loss does not fall."""
    margin_of_largest: float | None = None
    """Margin of the class with the most items; smaller classes get more, up to margin (adaptive
    margins). Not given: every class gets margin."""
    gradient: Literal["true", "detached"] = "true"
    """true differentiates through the margin; detached treats it as a constant, as Partial FC does.
    """
    centres: int = 1
    """Sub-centres of each class; an item is compared with the nearest. Use 2 or 3 when many labels
    are wrong."""
    sample: float = 1.0
    """Fraction of the other classes that each step compares with (Partial FC). Below 1 a step is
    faster with millions of classes, and only the sampled centres are updated."""
    scale: float = 32.0
    """Factor that turns a cosine into a logit, at most 64."""
    ramp: float = 0.3
    """Fraction of the training over which the margin grows from 0 to its full size."""
    lr: float = 5e-3
    """Peak learning rate of the class centres, usually at least ten times that of the encoder."""
    warmup: float | None = None
    """Fraction of the training over which this learning rate rises. Not given: the encoder's."""
    start: Literal["random", "means"] = "random"
    """How class centres are initialised: random, or with the mean embedding of each class."""
    grow_from: Path | None = None
    """A finished run over the first of these classes, whose centres are taken over unchanged. Use
    it when products were added to the catalogue."""
    chunk: int = field(default=8_192, metadata=NO_EFFECT_ON_RESULT)
    """Classes whose logits are computed at a time; fewer need less memory."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "lr", "chunk", "centres", "sample")
        check_range(self, 0, 1, "ramp", "sample")
        check_range(self, 0, 1.5, "margin")
        if self.warmup is not None:
            check_range(self, 0, 1, "warmup")
        if self.margin_of_largest is not None:
            check_range(self, 0, self.margin, "margin_of_largest")
        if self.scale > 64:
            raise BadInput(f"head.scale: {self.scale}, at most 64 (the softmax runs without a max)")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Options that image and text training share."""

    epochs: float = 10.0
    """Passes over the training items. 0 exports the encoder untrained."""
    batch_size: int = 64
    """Items of one optimizer step, over all processes together."""
    accumulation: int = 1
    """Forward and backward passes that one step is divided into; more need less memory."""
    order: Literal["global", "window", "none"] = "global"
    """Shuffle over all items (global), within windows of neighbouring shards (window, for storage
    where reading from anywhere is slow), or not at all (none)."""
    photos_per_product: int = 1
    """Items of each product in a batch (P x K sampling); a product with fewer repeats some. 1:
    items are drawn regardless of product."""
    lr: float = 4e-5
    """Peak learning rate of the encoder."""
    layer_decay: float = 1.0
    """Learning rate of each layer as a fraction of that of the layer above it. 1: the same for all;
    0.7 to 0.9 keeps more of the pretrained weights."""
    freeze: float = 0.0
    """Fraction of the training, from its start, in which only the head is trained."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, for the encoder's matrices and the class centres."""
    clip: float = 5.0
    """Largest norm of a gradient, clipped separately for encoder and head."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """Learning rate after the warm-up: a cosine down to 0. one-cycle also rises along a cosine and
    moves AdamW's beta1 the opposite way."""
    warmup: float = 0.1
    """Fraction of the training over which the learning rates rise. For one-cycle 0.3 is usual."""
    head: HeadOptions = field(default_factory=HeadOptions)
    ema: float = 0.0
    """Decay of an exponential moving average of the encoder's weights, which is then validated and
    exported, such as 0.999. 0: no average."""
    keep_best: bool = True
    """Export the encoder with the best validation F1; false exports the last one."""
    patience: int = 0
    """Validations in a row without a better F1 after which training stops early. 0: never."""
    precision: Precision = "auto"
    """Arithmetic of the encoder. auto: bf16 where the device supports it natively, else fp32."""
    gradient_checkpointing: bool = field(default=False, metadata=NO_EFFECT_ON_RESULT)
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = field(default=False, metadata=NO_EFFECT_ON_RESULT)
    """Compile the encoder with torch.compile: minutes at the start, then faster steps on a GPU."""
    checkpoint_every: int = field(default=500, metadata=NO_EFFECT_ON_RESULT)
    """Steps between two checkpoints."""
    keep: int = field(default=2, metadata=NO_EFFECT_ON_RESULT)
    """Number of checkpoints that are kept on disk."""
    grace: float = field(default=90.0, metadata=NO_EFFECT_ON_RESULT)
    """Seconds that the scheduler leaves between its stop signal and the kill. A warning is logged
    when a checkpoint takes longer to write."""
    validate_every: float = field(default=1.0, metadata=NO_EFFECT_ON_RESULT)
    """Epochs between two validations. 0: only at the end."""
    log_every: int = field(default=10, metadata=NO_EFFECT_ON_RESULT)
    """Steps between two rows of metrics.jsonl."""
    workers: int = field(default=4, metadata=NO_EFFECT_ON_RESULT)
    """Processes that read and decode items, for each training process."""
    max_unreadable: float = field(default=0.0, metadata=NO_EFFECT_ON_RESULT)
    """Fraction of the items read that may be broken (another item is taken instead); above it
    training fails. 0: the first whose bytes have changed since they were packed ends the training;
    of intact photos that no decoder reads, 1 % are replaced."""
    max_skipped: int = field(default=5, metadata=NO_EFFECT_ON_RESULT)
    """Steps in a row that may be skipped because loss or gradient is NaN or Inf; after more
    training fails."""
    compare_every: int = field(default=100, metadata=NO_EFFECT_ON_RESULT)
    """Steps between two checks that all processes hold the same weights. 0: never."""
    seed: int = 0
    """Seed of the initial weights, the order of the items, augmentation and dropout."""
    device: Device = field(default="auto", metadata=NO_EFFECT_ON_RESULT)
    """Device to train on. auto: a GPU where there is one, else the CPU."""

    def __post_init__(self) -> None:
        check_positive(
            self, "batch_size", "accumulation", "lr", "checkpoint_every", "keep", "log_every"
        )
        check_positive(self, "clip", "photos_per_product", "layer_decay", "grace", "max_skipped")
        check_range(self, 0, 1, "warmup", "max_unreadable", "layer_decay", "freeze", "ema")
        check_range(self, 0, math.inf, "epochs", "workers", "validate_every", "weight_decay")
        check_range(self, 0, math.inf, "patience", "compare_every")
        check_range(self, 0, 2**32 - 1, "seed")
        if self.ema == 1:
            raise BadInput("ema: 1 would keep the encoder as it begins; 0.99 to 0.9999 are usual")
        if self.batch_size % self.accumulation:
            raise BadInput(
                f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}"
            )
        if self.order != "global" and self.photos_per_product > 1:
            raise BadInput(
                f"order {self.order} reads neighbours together, photos_per_product a product's "
                "items wherever they lie; choose one of them"
            )

    @property
    def head_passes(self) -> int:
        """Calls of the head in one step."""
        return self.accumulation


@dataclass(frozen=True, kw_only=True)
class ImageTraining(TrainingConfig):
    """Training of the image encoder."""

    encoder: ImageEncoderOptions = field(default_factory=ImageEncoderOptions)
    min_crop: float = 0.5
    """Smallest fraction of a photo's area that a random training crop shows."""
    jitter: float = 0.2
    """Largest relative change of brightness, contrast and saturation of a training photo."""
    erase: float = 0.0
    """Probability that a random rectangle of a training photo is erased."""
    rand_augment: str = ""
    """RandAugment in timm's notation, such as rand-m7-mstd0.5-inc1; it replaces jitter. Empty:
    none."""
    mixup: float = 0.0
    """Mix photos in pairs by mixup, with shares from Beta(mixup, mixup). 0: off."""
    cutmix: float = 0.0
    """Mix photos in pairs by CutMix, with shares from Beta(cutmix, cutmix). With mixup each batch
    takes one of the two at random. 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "min_crop")
        check_range(self, 0, 1, "min_crop", "jitter", "erase")
        check_range(self, 0, math.inf, "mixup", "cutmix")
        if self.rand_augment and not re.fullmatch(RAND_AUGMENT, self.rand_augment):
            raise BadInput(
                f"rand_augment: {self.rand_augment}, must be rand and any of -m7 -n2 -p0.5 "
                "-mstd0.5 -mmax10 -inc1 -t3a, as in rand-m7-mstd0.5-inc1"
            )

    @property
    def mixes(self) -> bool:
        """Whether photos are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def head_passes(self) -> int:
        """Calls of the head in one step: one for each of the two classes of a mixed photo."""
        return self.accumulation * (2 if self.mixes else 1)


@dataclass(frozen=True, kw_only=True)
class TextTraining(TrainingConfig):
    """Training of the text encoder."""

    encoder: TextEncoderOptions = field(default_factory=TextEncoderOptions)
    lr: float = 2e-5
    """Peak learning rate of the encoder."""


TrainingOptions = ImageTraining | TextTraining
