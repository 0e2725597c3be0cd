"""One tree of options: defaults, units and checks. YAML and the command line fill it alike."""

import math
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from dist_train.config.slurm import SlurmConfig
from shards.photos.decode import Recipe
from shards.photos.options import NO_EFFECT_ON_RESULT, PackOptions
from shards.storage.errors import BadInput

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]
Modality = Literal["image", "text"]
RAND_AUGMENT = r"rand(-(m(max)?\d+|n[1-9]\d*|(p[01]|mstd\d+)(\.\d+)?|inc[01]|t(3aw?|weights)))*"


@dataclass(frozen=True, kw_only=True)
class ImageEncoderOptions:
    """The image encoder: a timm model, pooled to one vector and normalised."""

    model: str = "vit_base_patch16_224"
    """timm name, or a local folder with config.json and model.safetensors."""
    pretrained: bool = True
    """Start from the model's published weights; false starts from random ones."""
    pooling: Literal["auto", "cls", "mean", "gem"] = "auto"
    """auto: the model's own (the class token of a ViT, the mean of a CNN)."""
    image_size: int = 224
    """Pixels of the square that the model sees."""
    decode: Recipe = "balanced"
    """How photos are decoded, then and ever after: exact, balanced (twice as fast) or fast."""
    neck: bool = True
    """Batch normalisation (statistics over all ranks) before the vector is normalised."""

    def __post_init__(self) -> None:
        _positive(self, "image_size")


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions:
    """The text encoder: a transformers model, pooled to one vector and normalised."""

    model: str = "cahya/bert-base-indonesian-522M"
    """Hub name, or a local folder with the model and its tokenizer."""
    pretrained: bool = True
    """Start from the model's published weights; false starts from random ones."""
    pooling: Literal["mean", "cls"] = "mean"
    """Mean over the tokens of the title, or the first token."""
    max_length: int = 64
    """Tokens; the rest of a longer title is not seen."""
    dropout: float = 0.0
    """Probability; above 0 the weights depend on the number of processes."""
    neck: bool = True
    """Batch normalisation (statistics over all ranks) before the vector is normalised."""

    def __post_init__(self) -> None:
        _positive(self, "max_length")
        _within(self, 0, 1, "dropout")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The margin softmax over the training products, its classes sharded across ranks."""

    loss: Literal["arcface", "cosface"] = "arcface"
    """Where the margin sits: on the angle (arcface) or on the cosine (cosface)."""
    margin: float = 0.5
    """Radians for arcface, cosine for cosface."""
    margin_of_largest: float | None = None
    """Margin of the largest class, rarer ones more, up to margin; not given: margin for all."""
    gradient: Literal["true", "detached"] = "true"
    """Through the margin, or as if it were a constant (detached, what Partial FC does)."""
    centres: int = 1
    """Sub-centres a class, an item counting with the nearest; 2 or 3 where labels are noisy."""
    sample: float = 1.0
    """Share of the other classes that a step sees (Partial FC); below 1 only their rows move."""
    scale: float = 32.0
    """Logits are scale * cosine; at most 64."""
    ramp: float = 0.3
    """Share of the training over which the margin grows from 0."""
    lr: float = 5e-3
    """Learning rate of the class centres; ten or more times the encoder's."""
    warmup: float | None = None
    """Share of the training over which lr rises; not given: the encoder's."""
    start: Literal["random", "means"] = "random"
    """Centres before training: random by class, or each class's mean embedding."""
    grow_from: Path | None = None
    """A finished run over the first of these classes, whose centres are kept to the bit."""
    chunk: int = field(default=8_192, metadata=NO_EFFECT_ON_RESULT)
    """Centres whose logits exist at one time."""

    def __post_init__(self) -> None:
        _positive(self, "scale", "lr", "chunk", "centres", "sample")
        _within(self, 0, 1, "ramp", "sample")
        _within(self, 0, 1.5, "margin")
        if self.warmup is not None:
            _within(self, 0, 1, "warmup")
        if self.margin_of_largest is not None:
            _within(self, 0, self.margin, "margin_of_largest")
        if self.scale > 64:
            raise BadInput(f"head.scale: {self.scale}, at most 64 (the softmax runs without a max)")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What both trainings share."""

    epochs: float = 10.0
    """Times every training item is seen; 0 exports the encoder untrained."""
    batch_size: int = 64
    """Items a step over all processes."""
    accumulation: int = 1
    """Forward passes a step; batch_size is the sum over them."""
    order: Literal["global", "window", "none"] = "global"
    """Shuffled over all items, within windows of small regions (where far seeks hurt), or not."""
    photos_per_product: int = 1
    """Above 1: batches of whole products with so many items each; smaller products repeat some."""
    lr: float = 4e-5
    """Peak learning rate of the encoder."""
    layer_decay: float = 1.0
    """Each layer's learning rate as a share of that of the layer above it; 1: all alike."""
    freeze: float = 0.0
    """Share of the training at whose beginning the encoder stands still and the head learns."""
    weight_decay: float = 0.01
    """AdamW's, for encoder matrices and class centres."""
    clip: float = 5.0
    """Largest gradient norm of the encoder, and of the head."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """After the warm-up a cosine to 0; one-cycle also rises in one, beta1 going the other way."""
    warmup: float = 0.1
    """Share of the training over which the learning rates rise; one-cycle is at home with 0.3."""
    head: HeadOptions = field(default_factory=HeadOptions)
    ema: float = 0.0
    """Decay of a moving average of the encoder, which then is validated and exported; 0: none."""
    keep_best: bool = True
    """Export the encoder of the best validation since the first step, else that of the last."""
    patience: int = 0
    """Validations in a row without a better F1 after which training ends; 0: never."""
    precision: Precision = "auto"
    """auto: bf16 where the device multiplies it natively, else fp32."""
    gradient_checkpointing: bool = field(default=False, metadata=NO_EFFECT_ON_RESULT)
    """Compute activations again in the backward pass: less memory, more time."""
    compile: bool = field(default=False, metadata=NO_EFFECT_ON_RESULT)
    """torch.compile of the encoder: minutes at the start, faster steps on a GPU."""
    checkpoint_every: int = field(default=500, metadata=NO_EFFECT_ON_RESULT)
    """Steps between checkpoints."""
    keep: int = field(default=2, metadata=NO_EFFECT_ON_RESULT)
    """Checkpoints that stay."""
    grace: float = field(default=90.0, metadata=NO_EFFECT_ON_RESULT)
    """Seconds between a stop signal and the kill; a checkpoint that takes longer is warned of."""
    validate_every: float = field(default=1.0, metadata=NO_EFFECT_ON_RESULT)
    """Epochs between validations; 0: only at the end."""
    log_every: int = field(default=10, metadata=NO_EFFECT_ON_RESULT)
    """Steps between rows of metrics.jsonl."""
    workers: int = field(default=4, metadata=NO_EFFECT_ON_RESULT)
    """Processes that read and decode, for each rank."""
    max_unreadable: float = field(default=0.01, metadata=NO_EFFECT_ON_RESULT)
    """Share of the items served that may be broken (others stand in); above it training stops."""
    max_skipped: int = field(default=5, metadata=NO_EFFECT_ON_RESULT)
    """Steps in a row that may be left out, their loss or gradient being no number."""
    compare_every: int = field(default=100, metadata=NO_EFFECT_ON_RESULT)
    """Steps between comparisons of the encoder's weights over processes; 0: never."""
    seed: int = 0
    """Of weights, order and augmentation."""
    device: Device = field(default="auto", metadata=NO_EFFECT_ON_RESULT)
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "accumulation", "lr", "checkpoint_every", "keep", "log_every")
        _positive(self, "clip", "photos_per_product", "layer_decay", "grace", "max_skipped")
        _within(self, 0, 1, "warmup", "max_unreadable", "layer_decay", "freeze", "ema")
        _within(self, 0, math.inf, "epochs", "workers", "validate_every", "weight_decay")
        _within(self, 0, math.inf, "patience", "compare_every")
        _within(self, 0, 2**32 - 1, "seed")
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
        """Times a step that the head is asked."""
        return self.accumulation


@dataclass(frozen=True, kw_only=True)
class ImageTraining(TrainingConfig):
    """Training of the image encoder."""

    encoder: ImageEncoderOptions = field(default_factory=ImageEncoderOptions)
    min_crop: float = 0.5
    """Least share of a photo's area that a training crop shows."""
    jitter: float = 0.2
    """Of brightness, contrast and saturation: up to that share more or less."""
    erase: float = 0.0
    """Probability that a box of a training photo is blanked (random erasing, cut-out)."""
    rand_augment: str = ""
    """timm's form, such as rand-m7-mstd0.5-inc1 (it takes the place of jitter); not given: none."""
    mixup: float = 0.0
    """Photos laid over one another, in shares of Beta(mixup, mixup); 0: none."""
    cutmix: float = 0.0
    """A box of a photo shows another, in shares of Beta(cutmix, cutmix); with mixup: by chance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "min_crop")
        _within(self, 0, 1, "min_crop", "jitter", "erase")
        _within(self, 0, math.inf, "mixup", "cutmix")
        if self.rand_augment and not re.fullmatch(RAND_AUGMENT, self.rand_augment):
            raise BadInput(
                f"rand_augment: {self.rand_augment}, must be rand and any of -m7 -n2 -p0.5 "
                "-mstd0.5 -mmax10 -inc1 -t3a, as in rand-m7-mstd0.5-inc1"
            )

    @property
    def mixes(self) -> bool:
        """Photos are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def head_passes(self) -> int:
        """See TrainingConfig: once for each of the two classes of a mixed photo."""
        return self.accumulation * (2 if self.mixes else 1)


@dataclass(frozen=True, kw_only=True)
class TextTraining(TrainingConfig):
    """Training of the text encoder."""

    encoder: TextEncoderOptions = field(default_factory=TextEncoderOptions)
    lr: float = 2e-5
    """Peak learning rate of the encoder."""


TrainingOptions = ImageTraining | TextTraining


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How items become vectors."""

    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored vectors."""
    precision: Precision = "auto"
    """auto: bf16 where the device multiplies it natively, else fp32."""
    batch_size: int = 64
    """Items a forward pass."""
    max_unreadable: float = field(default=0.01, metadata=NO_EFFECT_ON_RESULT)
    """Share of the items that may be broken (they get no vector); above it the stage fails."""
    workers: int = field(default=4, metadata=NO_EFFECT_ON_RESULT)
    """Processes that read and decode, for each rank."""
    device: Device = field(default="auto", metadata=NO_EFFECT_ON_RESULT)
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        _positive(self, "batch_size")
        _within(self, 0, math.inf, "workers")
        _within(self, 0, 1, "max_unreadable")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """What the index holds."""

    modality: Literal["auto", "image", "text", "both"] = "auto"
    """auto: both parts where the embedding set has both."""
    image_weight: float = 0.5
    """Weight of the image part in a score over both; the text part has the rest."""
    kind: str = "auto"
    """auto (by size and memory), Flat, SQfp16 (both exact), IVF, or a FAISS factory string."""
    memory: str = "8GB"
    """Of a process that searches all shards at once; decides what auto takes."""
    recall_rows: int = 200
    """Items whose neighbours are compared with the exact ones, where the kind is not exact."""

    def __post_init__(self) -> None:
        bytes_of(self.memory)
        _within(self, 0, math.inf, "recall_rows")
        if not 0 < self.image_weight < 1:
            raise BadInput(f"image_weight: {self.image_weight}, must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Which pairs of items are kept with their scores, and how they are found."""

    engine: Literal["auto", "faiss", "gemm"] = "auto"
    """faiss searches the saved index; gemm multiplies the stored rows; auto takes the faster."""
    pairs_per_item: float = 100.0
    """Pairs to keep for each item; a sample of the scores turns it into the score floor."""
    max_score_floor: float | None = None
    """Every pair from this score on is kept, even beyond pairs_per_item; match needs it for a
    threshold below the score floor. Not given: pairs_per_item alone sets the floor."""
    neighbours: int = 5
    """Nearest items kept of every item, whatever their score; 0: none, which is faster."""
    memory: str = field(default="4GB", metadata=NO_EFFECT_ON_RESULT)
    """Most memory of one process, all included; checked before the start."""
    audit_rows: int = field(default=200, metadata=NO_EFFECT_ON_RESULT)
    """Items that are scored against all others again, in float64, to check the result."""
    device: Device = field(default="auto", metadata=NO_EFFECT_ON_RESULT)
    """Where the vectors are multiplied; auto: on a GPU where there is one."""

    def __post_init__(self) -> None:
        bytes_of(self.memory)
        _positive(self, "pairs_per_item")
        _within(self, 0, math.inf, "neighbours", "audit_rows")
        if self.max_score_floor is not None:
            _within(self, -1, 1, "max_score_floor")


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Which of the scored pairs are matches."""

    threshold: float | None = None
    """Score from which two items match; not given: the best mean F1 on the val products."""
    threshold_from: Path | None = None
    """Take the threshold from the threshold.json of another match directory."""

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _within(self, -1, 1, "threshold")
        if self.threshold is not None and self.threshold_from is not None:
            raise BadInput("threshold and threshold_from: give one of them")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All stages over one catalogue."""

    catalogue: Path
    """CSV, TSV, Parquet or JSON Lines."""
    out: Path
    """Folder that takes the stage directories."""
    images: Path | None = None
    """Folder that the catalogue's photo paths start from."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to the catalogue's: posting_id, image, title, label_group."""
    encoders: tuple[Modality, ...] = ("image", "text")
    """Which encoders to train and match with."""
    compare: tuple[Literal["untrained", "random"], ...] = ()
    """The same encoders without training, scored beside ours."""
    pack: PackOptions = field(default_factory=PackOptions)
    image: ImageTraining = field(default_factory=ImageTraining)
    text: TextTraining = field(default_factory=TextTraining)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if not self.encoders:
            raise BadInput("encoders: name image, text or both")

    def training(self, modality: Modality) -> TrainingOptions:
        """The options of the training of one encoder."""
        return self.image if modality == "image" else self.text


def result_options(options: Any) -> dict[str, Any]:
    """The options that a result depends on, as JSON values; those that only say how stay out."""
    how = {f.name for f in fields(options) if f.metadata.get("how")}
    kept = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in how}
    return {k: result_options(v) if is_dataclass(v) else _plain(v) for k, v in kept.items()}


def bytes_of(text: str) -> int:
    """Bytes of a size: 8GB, 500MB, 2.5 GB (1 GB is 1e9 bytes)."""
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kMGT]?)B?\s*", text)
    if found is None or not float(found[1]) > 0:
        raise BadInput(f"memory {text}: write a size as 8GB or 500MB")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def local_path(text: str) -> Path | None:
    """The folder that a model option names (variables expanded); None when it is a hub name."""
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise BadInput(f"model {text}: the variable is not set in the environment")
    if Path(expanded).is_dir():
        return Path(expanded)
    if expanded != text or expanded.startswith((".", os.sep)):
        raise BadInput(f"model {text}: no such folder ({expanded})")
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _within(options: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        # Written so that not-a-number is refused as well.
        if not low <= getattr(options, name) <= high:
            raise BadInput(f"{name}: {getattr(options, name)}, must lie in {low} to {high}")


def _positive(options: Any, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise BadInput(f"{name}: {getattr(options, name)}, must be above 0")
