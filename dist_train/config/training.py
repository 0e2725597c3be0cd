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
    """Name of a timm model, or a local folder: a timm model's, a run's, or an encoder's. Set
    --encoder.image-size to the size that the model was trained with."""
    pretrained: bool = True
    """Start from the weights of the model, downloaded at first use or read from its folder.
    Otherwise from random weights."""
    pooling: Literal["auto", "cls", "mean", "gem"] = "auto"
    """How the outputs of the model become one vector: the class token (cls), the mean, or the
    generalised mean (gem). auto is the model's default: cls for a ViT, mean for a CNN."""
    image_size: int = 224
    """Side in pixels of the square photo that the model gets, a multiple of its patch size. More
    shows more detail; twice as much takes four times as long."""
    decode: Recipe = "balanced"
    """How JPEG photos are decoded, in training and wherever the encoder is used later: exact (all
    pixels), balanced (twice as fast, nearly the same) or fast (coarser). Use fast when a GPU waits
    for photos."""
    neck: bool = True
    """Add a batch normalisation layer, over all processes, behind the encoder (BNNeck). Switch it
    off for batches of a few items."""

    def __post_init__(self) -> None:
        check_positive(self, "image_size")


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions:
    """The text encoder: a transformers model, pooled to one vector and normalised."""

    model: str = "cahya/bert-base-indonesian-522M"
    """Model on the Hugging Face hub, or a local folder: a model's of transformers or of
    sentence-transformers with its tokenizer, a run's, or an encoder's. The default is for
    Indonesian titles: choose one for the language of yours."""
    pretrained: bool = True
    """Start from the weights of the model, downloaded at first use or read from its folder.
    Otherwise from random weights."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """How the outputs of the model become one vector: the mean over all tokens, the output of the
    first token (cls), or of the last one (last, for causal models). auto is what the model's files
    name, else mean."""
    prefix: str | None = None
    """Text that is put before every title, such as 'query: ', which some models want. Not given:
    what the model's files name, else nothing."""
    trust_remote_code: bool = field(default=False, metadata=NO_EFFECT_ON_RESULT)
    """Run the Python code that some models bring with them. Read it first: it can do anything that
    you can."""
    max_length: int = 64
    """Tokens of a title that are read; the rest of a longer title is ignored."""
    dropout: float = 0.0
    """Dropout probability in training, such as 0.1 against overfitting. At 0 any number of
    processes trains the same weights up to rounding; above 0 they differ."""
    neck: bool = True
    """Add a batch normalisation layer, over all processes, behind the encoder (BNNeck). Switch it
    off for batches of a few items."""

    def __post_init__(self) -> None:
        check_positive(self, "max_length")
        check_range(self, 0, 1, "dropout")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The margin softmax over the training classes, sharded across processes."""

    loss: Literal["arcface", "cosface"] = "arcface"
    """arcface adds the margin to the angle to the class centre, cosface subtracts it from the
    cosine; a usual margin of cosface is 0.35."""
    margin: float = 0.5
    """Margin, in radians for arcface and in units of cosine for cosface. Lower it when the training
    loss does not fall; raise it when different products get alike vectors."""
    margin_of_largest: float | None = None
    """Margin of the class with the most items; smaller classes get more, the smallest
    --head.margin. Use it when products differ much in size. Not given: all classes get
    --head.margin."""
    gradient: Literal["exact", "detached"] = "exact"
    """Gradient of the margin: exact, or detached, which treats the margin as a constant as Partial
    FC does. Keep exact, except to reproduce results of insightface."""
    centres: int = 1
    """Sub-centres of each class; an item is compared with the nearest. Use 2 or 3 when many labels
    are wrong."""
    sample: float = 1.0
    """Fraction of the classes absent from the batch that a step compares with (Partial FC). With
    millions of classes 0.1 to 0.3 is faster; only the sampled centres are updated then."""
    scale: float = 32.0
    """Factor by which cosines are multiplied to become logits, at most 64. Lower it when training
    is unstable; more classes need more."""
    ramp: float = 0.3
    """Fraction of the training over which the margin grows from 0 to its full size. 0: full from
    the start. Raise it when the loss does not fall at the start."""
    lr: float = 5e-3
    """Peak learning rate of the class centres, usually at least ten times that of the encoder."""
    warmup: float | None = None
    """Fraction of the training over which --head.lr is reached. Not given: that of --warmup."""
    start: Literal["random", "means"] = "random"
    """How the class centres begin: random, or means, the mean vector of each class, which takes a
    pass over the items and helps short trainings."""
    grow_from: Path | None = None
    """Folder of an earlier training on fewer products of the same catalogue. Its class centres are
    where those begin; new ones begin as --head.start says. Use it when products were added."""
    chunk: int = field(default=8_192, metadata=NO_EFFECT_ON_RESULT)
    """Classes whose logits are computed at a time. Fewer need less memory and more time."""

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
    """Passes over the training items, also fractions. 0: export the encoder as it begins."""
    batch_size: int = 64
    """Items of one optimizer step, of all processes together: a multiple of --accumulation. If
    memory runs out raise --accumulation."""
    accumulation: int = 1
    """Forward and backward passes that one step is divided into. More need less memory; the batch
    stays the same."""
    order: Literal["global", "window", "none"] = "global"
    """How each epoch is shuffled: over all items (global), in windows of items from neighbouring
    tar files (window, for object stores and slow disks), or not at all (none, for debugging)."""
    photos_per_product: int = 1
    """Items of each product in a batch, photos or titles (K of P x K sampling); a product with
    fewer repeats some. 1: items are drawn regardless of product. Try 2 to 4 when products are
    small."""
    lr: float = 4e-5
    """Peak learning rate of the encoder; it does not follow the batch size. Lower it when the loss
    does not fall or validation F1 falls."""
    layer_decay: float = 1.0
    """Learning rate of each layer as a fraction of that of the next layer towards the output. 1:
    the same for all; 0.7 to 0.9 keeps more of the pretrained weights."""
    freeze: float = 0.0
    """Fraction of the training, from its start, in which only the class centres are trained, such
    as 0.1. Use it when the first steps spoil the encoder."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, for the encoder's matrices and the class centres."""
    clip: float = 5.0
    """Largest total norm of the gradients, of the encoder and of the class centres separately."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """cosine: the learning rates rise linearly, then fall to 0 along a cosine. one-cycle: they rise
    along a cosine too, and AdamW's beta1 moves the opposite way; use --warmup 0.3 with it."""
    warmup: float = 0.1
    """Fraction of the training over which the learning rates rise to their peaks."""
    head: HeadOptions = field(default_factory=HeadOptions)
    ema: float = 0.0
    """Decay in each step of a moving average of the encoder's weights, such as 0.999; the average
    is validated and exported. 0: none. Short trainings need a smaller one."""
    keep_best: bool = True
    """Export the encoder with the best mean F1 per item among the validation products. Otherwise
    the last one."""
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
    """Number of the newest checkpoints that are kept on disk."""
    grace: float = field(default=90.0, metadata=NO_EFFECT_ON_RESULT)
    """Seconds between your scheduler's stop signal and its kill. It changes nothing but a warning,
    logged when a checkpoint takes longer to write."""
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
    """Steps between two checks that all processes hold the same weights; training fails if not. 0:
    never."""
    seed: int = 0
    """Random seed of initial weights, order of the items, augmentation and dropout."""
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
    """Smallest fraction of a photo's area that a random training crop keeps. 1: no crop. Raise it
    when details at the edges separate products."""
    jitter: float = 0.2
    """Largest relative change of brightness, contrast and saturation of a training photo."""
    erase: float = 0.0
    """Probability that a random rectangle of a training photo is erased."""
    rand_augment: str = ""
    """RandAugment in timm's notation, such as rand-m7-mstd0.5-inc1 (m is the strength, 0 to 10),
    instead of --jitter. Use it against overfitting."""
    mixup: float = 0.0
    """Blend photos in pairs (mixup), in shares drawn from Beta(a, a) with this a, such as 0.2. 0:
    off."""
    cutmix: float = 0.0
    """Paste a box of one photo into another (CutMix), in shares drawn from Beta(a, a) with this a,
    such as 1. With --mixup too, each batch takes one of the two at random. 0: off."""

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
    """Peak learning rate of the encoder; it does not follow the batch size. Lower it when the loss
    does not fall or validation F1 falls."""


TrainingOptions = ImageTraining | TextTraining


def check_batch(config: TrainingOptions, world: int) -> None:
    """Raise BadInput if a batch does not divide among `world` processes and their passes.

    Also if a pass has a single item, whose batch statistics in the neck make every gradient 0.
    """
    size, photos, passes = config.batch_size, config.photos_per_product, config.accumulation
    unit = photos * passes * world
    if size % unit:
        by_product = f" x {photos} photos of a product" if photos > 1 else ""
        raise BadInput(
            f"batch_size {size} does not divide among {world} processes x accumulation {passes}"
            f"{by_product}; choose a multiple of {unit}, the nearest is "
            f"{max(1, round(size / unit)) * unit}"
        )
    rows = size // (passes * world)
    if config.head_passes > passes and rows % (2 * photos):
        raise BadInput(
            f"mixup and cutmix pair neighbours: {rows} items a pass and process are no multiple of "
            f"{2 * photos}; choose a batch_size that is one of {2 * unit}"
        )
    if size == passes and config.encoder.neck:
        raise BadInput(
            f"batch_size {size} in {passes} passes (accumulation) leaves one item a pass, and the "
            "neck's statistics of one item make every gradient 0; use fewer passes or a larger "
            "batch, 8 items a pass or more, or encoder.neck false"
        )
