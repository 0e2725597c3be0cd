"""The tree of options: meanings, units, defaults and checks, for YAML and the command line."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from dist_train.config.columns import Columns
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

SUBMIT_ONLY = Parameter(group=Group("Slurm (used by submit; run and plan ignore it)", sort_key=1))


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
    """Number format of the stored vectors. float16 needs half the disk; float32 keeps every
    digit."""
    precision: Precision = "auto"
    """Arithmetic of the encoders. auto: bf16 where the device supports it natively, else fp32."""
    batch_size: int = 64
    """Items of one forward pass of each process. More use a GPU better; fewer need less memory."""
    max_unreadable: float = field(default=0.0, metadata=NO_EFFECT_ON_RESULT)
    """Largest fraction of items with a broken photo or title. Such an item gets no vector of that
    modality; with more of them embed fails. 0: it fails at the first whose bytes have changed since
    they were packed; of intact photos that no decoder reads, 1 % are left out."""
    workers: int = field(default=4, metadata=NO_EFFECT_ON_RESULT)
    """Processes that read and decode items, for each embedding process."""
    trust_remote_code: bool = field(default=False, metadata=NO_EFFECT_ON_RESULT)
    """Run the Python code that lies in the text encoder's folder, as it was trained with
    --encoder.trust-remote-code. Only for folders whose code you have read."""
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
    """Vectors that the score is made of. auto: image and text if the embedding set has both, else
    the one that it has. With both, two items that share one modality are scored by it alone."""
    image_weight: float = 0.5
    """Weight of the image cosine in the score, between 0 and 1; the text cosine gets the rest.
    Raise it when photos separate products better than titles do."""
    kind: str = "auto"
    """Kind of FAISS index: Flat (exact), SQfp16 (exact for float16 vectors, half the memory), IVF
    (approximate, faster, may miss pairs), or a FAISS factory string such as IVF4096,PQ64. auto
    chooses by the number of items and memory."""
    memory: str = "8GB"
    """Memory that the complete index may need when it is loaded, such as 8GB (1 GB is 1e9 bytes).
    The kind auto fits it; of another kind only the files are made small enough to be built in
    it."""
    recall_rows: int = 200
    """Items that are searched exactly too, to report the recall of an approximate index. More make
    the figure more precise; 0: no figure, and all lists of an inverted index are searched."""

    def __post_init__(self) -> None:
        bytes_of(self.memory)
        check_range(self, 0, math.inf, "recall_rows")
        if not 0 < self.image_weight < 1:
            raise BadInput(f"image_weight: {self.image_weight}, must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Which pairs of items are kept with their scores, and how they are found."""

    engine: Literal["auto", "faiss", "gemm"] = "auto"
    """gemm compares all stored vectors, on GPU or CPU, and is exact; faiss searches the saved
    index, and misses pairs if that is approximate. auto: gemm unless an exact index is measured
    faster."""
    pairs_per_item: float = 100.0
    """Number of pairs to keep, as a multiple of the items. It decides the score floor, the lowest
    score that is kept. Raise it when match reports that the best threshold lies at the floor; lower
    it to save disk."""
    max_score_floor: float | None = None
    """Keep every pair that scores this much or more, even beyond --pairs-per-item. Set it to the
    lowest threshold that match is to use. Not given: --pairs-per-item alone decides."""
    neighbours: int = 5
    """Nearest items that are kept for each item, whatever their score: nearest.parquet, for your
    own use. 0: none, which is faster; the matches are the same."""
    memory: str = field(default="4GB", metadata=NO_EFFECT_ON_RESULT)
    """Main memory that one process may use, such as 4GB (1 GB is 1e9 bytes); join refuses to start
    if it is too little. More allows larger blocks, which are faster."""
    audit_rows: int = field(default=200, metadata=NO_EFFECT_ON_RESULT)
    """Items whose scores with all others are computed again in float64; join fails if a pair is
    wrong, or missing where the engine is exact. More take longer; 0: no check."""
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
    """Options of matching: how scored pairs become matches and groups."""

    plain: bool = False
    """Decide by one threshold on the score of the vectors alone. By default a pair model decides,
    which also compares titles, quantities and neighbours, wherever the validation products show
    that it is better."""
    precision: float | None = None
    """Mean precision per item that the matches are to have, such as 0.98: the lowest threshold that
    reaches it on the validation products is used. Set it where a wrong match costs more than a
    missed one. Not given: the threshold with the best mean F1."""
    threshold: float | None = None
    """Lowest score of a match, -1 to 1, in place of the pair model. Raise it for fewer wrong
    matches, lower it to miss fewer."""
    threshold_from: Path | None = None
    """An earlier match (its folder, that of its run, or its threshold.json), whose threshold is
    used, and its pair model if it has one, for example for a catalogue without labels. It must
    have scored by the same modalities and weights. Not together with --threshold."""
    candidates: int = 20
    """Best postings by each source (score, image, text, words and characters of the title, same
    photo) that the pair model compares with every posting. More find more and take longer."""
    features: tuple[str, ...] = ()
    """Columns of the catalogue that the pair model compares too, such as brand,price."""
    max_group: int | None = None
    """Most postings of a group. Not given: twice the largest labelled product."""
    must_link: Path | None = None
    """File (CSV, TSV, Parquet or JSON Lines) with the columns posting_id_1 and posting_id_2: pairs
    of postings that are in one group whatever the scores, for example answers of a reviewer."""
    cannot_link: Path | None = None
    """The same for pairs of postings that are never in one group."""

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_range(self, -1, 1, "threshold")
        if self.precision is not None:
            check_range(self, 0, 1, "precision")
        check_range(self, 1, math.inf, "candidates")
        # Names that one option holds, as --features brand,price; each counts once.
        names = [name.strip() for given in self.features for name in given.split(",")]
        object.__setattr__(self, "features", tuple(dict.fromkeys(filter(None, names))))
        if self.max_group is not None:
            check_range(self, 1, math.inf, "max_group")
        named = ("threshold", "threshold_from", "precision")
        given = [name for name in named if getattr(self, name) is not None]
        if len(given) > 1:
            raise BadInput(f"{' and '.join(given)}: give one of them")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The complete pipeline on one catalogue."""

    catalogue: Path
    """Catalogue file (CSV, TSV, Parquet or JSON Lines): a posting a row, with the columns
    posting_id, image, title and label_group (the known product of the posting; may be empty or
    missing)."""
    out: Path
    """Folder for the results: each stage makes a folder in it (shards, image, text, embedding,
    index, pairs, matches); the report is matches/report.html."""
    images: Path | None = None
    """Folder that the paths in the column image are relative to. Needed if the catalogue names
    photos."""
    columns: Columns = field(default_factory=dict)
    """Your names of columns that are not called posting_id, image, title and label_group, as
    OURS=YOURS: posting_id=sku,title=name."""
    encoders: tuple[Modality, ...] = ("image", "text")
    """Encoders that are trained and that the score is made of: image, text or both."""
    compare: tuple[Literal["untrained", "random"], ...] = ()
    """Evaluate the same encoders also with the weights they begin with (untrained) or with random
    weights (random), to show what training gains. Each takes another embed."""
    pack: PackOptions = field(default_factory=PackOptions)
    image: ImageTraining = field(default_factory=ImageTraining)
    text: TextTraining = field(default_factory=TextTraining)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    slurm: Annotated[SlurmConfig, SUBMIT_ONLY] = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if not self.encoders:
            raise BadInput("encoders: name image, text or both")
        wanted = {"auto": set(), "both": {"image", "text"}}
        missing = wanted.get(self.index.modality, {self.index.modality}) - set(self.encoders)
        if missing:
            raise BadInput(
                f"index.modality {self.index.modality}: encoders has no {missing.pop()}; add it "
                "there, or leave index.modality at auto"
            )

    @property
    def score_weights(self) -> dict[str, float]:
        """Weight of each modality in the score of two items that have all of them."""
        names = self.encoders if self.index.modality in ("auto", "both") else [self.index.modality]
        weights = {"image": self.index.image_weight, "text": 1 - self.index.image_weight}
        return {name: weights[name] if len(set(names)) > 1 else 1.0 for name in names}

    def training(self, modality: Modality) -> TrainingOptions:
        """The options of training one encoder."""
        return self.image if modality == "image" else self.text
