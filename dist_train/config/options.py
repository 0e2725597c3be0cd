"""The tree of options: meanings, units, defaults and checks, for YAML and the command line."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dist_train.config.slurm import SlurmConfig
from dist_train.config.training import (
    Device,
    ImageTraining,
    Modality,
    Precision,
    TextTraining,
    TrainingOptions,
    check_positive,
    check_range,
)
from shards.photos.options import NO_EFFECT_ON_RESULT, PackOptions
from shards.storage.errors import BadInput


def bytes_of(text: str) -> int:
    """Bytes of a size such as 8GB, 500MB or 2.5 GB (1 GB is 1e9 bytes); BadInput for others."""
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kMGT]?)B?\s*", text)
    if found is None or not float(found[1]) > 0:
        raise BadInput(f"memory {text}: write a size as 8GB or 500MB")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Options of embedding: how items become vectors."""

    dtype: Literal["float16", "float32"] = "float16"
    """Number format in which the vectors are stored."""
    precision: Precision = "auto"
    """Arithmetic of the encoders. auto: bf16 where the device supports it natively, else fp32."""
    batch_size: int = 64
    """Items of one forward pass of each process."""
    max_unreadable: float = field(default=0.0, metadata=NO_EFFECT_ON_RESULT)
    """Fraction of the items whose photo or title may turn out to be broken (they get no vector of
    that modality); above it the stage fails. 0: the first whose bytes have changed since they were
    packed ends the stage; of intact photos that no decoder reads, 1 % are left out."""
    workers: int = field(default=4, metadata=NO_EFFECT_ON_RESULT)
    """Processes that read and decode items, for each embedding process."""
    device: Device = field(default="auto", metadata=NO_EFFECT_ON_RESULT)
    """Device that runs the encoders. auto: a GPU where there is one, else the CPU."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size")
        check_range(self, 0, math.inf, "workers")
        check_range(self, 0, 1, "max_unreadable")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Options of the index: which vectors it holds, and in what form."""

    modality: Literal["auto", "image", "text", "both"] = "auto"
    """Vectors to search with. auto: both modalities where the embedding set has both."""
    image_weight: float = 0.5
    """Weight of the image cosine in the score of two items that have both modalities; the text
    cosine has the rest."""
    kind: str = "auto"
    """Kind of FAISS index: Flat or SQfp16 (exact), IVF (approximate), or a FAISS factory string.
    auto chooses by number of items and memory."""
    memory: str = "8GB"
    """Memory of a process that loads all shards of the index, such as 8GB; auto keeps to it."""
    recall_rows: int = 200
    """Items for which an approximate index is compared with exact search, to report its recall."""

    def __post_init__(self) -> None:
        bytes_of(self.memory)
        check_range(self, 0, math.inf, "recall_rows")
        if not 0 < self.image_weight < 1:
            raise BadInput(f"image_weight: {self.image_weight}, must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Which pairs of items are kept with their scores, and how they are found."""

    engine: Literal["auto", "faiss", "gemm"] = "auto"
    """gemm multiplies blocks of the stored vectors, on GPU or CPU, and is exact; faiss searches the
    saved index. auto: the faster of the two on this machine, by a measurement on a sample."""
    pairs_per_item: float = 100.0
    """Average number of pairs to keep for each item. It sets the score floor, the lowest kept
    score, which is estimated from a sample. Raise it when match reports that the best threshold
    lies at the floor."""
    max_score_floor: float | None = None
    """Largest score floor: every pair from this score on is kept, even beyond pairs_per_item. Give
    it when match is to use a threshold below the score floor. Not given: pairs_per_item alone sets
    the floor."""
    neighbours: int = 5
    """Nearest items that are kept for every item whatever their score. 0: none, which is faster."""
    memory: str = field(default="4GB", metadata=NO_EFFECT_ON_RESULT)
    """Memory of one process in all, such as 4GB; checked before the start."""
    audit_rows: int = field(default=200, metadata=NO_EFFECT_ON_RESULT)
    """Items that are compared with all others again in float64 to check the result."""
    device: Device = field(default="auto", metadata=NO_EFFECT_ON_RESULT)
    """Device that computes the scores. auto: a GPU where there is one, else the CPU."""

    def __post_init__(self) -> None:
        bytes_of(self.memory)
        check_positive(self, "pairs_per_item")
        check_range(self, 0, math.inf, "neighbours", "audit_rows")
        if self.max_score_floor is not None:
            check_range(self, -1, 1, "max_score_floor")


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Options of matching: how scored pairs become matches."""

    threshold: float | None = None
    """Score from which two items match. Not given: the threshold with the best mean per-item F1 on
    the validation products."""
    threshold_from: Path | None = None
    """The threshold.json of another match directory, whose threshold is used."""

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_range(self, -1, 1, "threshold")
        if self.threshold is not None and self.threshold_from is not None:
            raise BadInput("threshold and threshold_from: give one of them")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The complete pipeline on one catalogue."""

    catalogue: Path
    """Catalogue file: CSV, TSV, Parquet or JSON Lines."""
    out: Path
    """Folder in which every stage makes its directory."""
    images: Path | None = None
    """Folder that the photo paths of the catalogue are relative to."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the catalogue's columns where they differ from posting_id, image, title and
    label_group."""
    encoders: tuple[Modality, ...] = ("image", "text")
    """Encoders to train and to match with."""
    compare: tuple[Literal["untrained", "random"], ...] = ()
    """Also score the same encoders with their published weights (untrained) or random weights
    (random), to show what training gains."""
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
        """The options of training one encoder."""
        return self.image if modality == "image" else self.text
