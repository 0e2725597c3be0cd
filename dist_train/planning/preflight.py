"""What a later stage would fail for, found before the first hour of work."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dist_train.config.options import Config, bytes_of
from dist_train.config.training import Modality, TextTraining, TrainingOptions, check_batch
from dist_train.decisions.grouping import links_of
from dist_train.decisions.probabilities import check_columns
from dist_train.embedding.embed import carried_columns
from dist_train.encoders.encoder import new_encoder
from dist_train.evaluation.labelled import labelled_rows, scoring_obstacle
from dist_train.matching.faiss_library import choose_kind
from dist_train.training.optimisation import encoder_optimizer
from dist_train.training.setup import run_to_grow_from
from shards.catalogue.columns import set_aside
from shards.catalogue.rows import Carried, Catalogue
from shards.pack.items import OWN
from shards.read.shard_set import Item, ShardSet
from shards.storage.errors import BadInput

NOUNS: dict[Modality, str] = {"image": "photo", "text": "title"}
log = logging.getLogger(__name__)


@dataclass
class Labels:
    """What the postings at `where` have that training and threshold need."""

    where: str | Path
    postings: int = 0
    classes: int = 0
    """Label groups of the train split."""
    val: Counter[str] = field(default_factory=Counter)
    """Postings of each label group of the val split."""
    items: Counter[tuple[str, Modality]] = field(default_factory=Counter)
    """Postings by (split or "all", modality)."""

    def count(self, table: pd.DataFrame, split: pd.Series, has: dict[Modality, pd.Series]) -> None:
        """Add the rows of `table`, in the splits of `split`, that have a photo or a title."""
        self.postings += len(table)
        for modality, mask in has.items():
            numbers = split[mask].value_counts()
            self.items.update({(name, modality): int(n) for name, n in numbers.items()})
            self.items["all", modality] += int(mask.sum())


def labels_of_catalogue(config: Config) -> Labels:
    """Counts before the pack, which may still reject some."""
    found, groups = Labels(config.catalogue), set[str]()
    for chunk in Catalogue(config.catalogue, config.columns).postings(Carried()):
        split = chunk.split
        found.count(chunk, split, {"image": chunk.image != "", "text": chunk.title != ""})
        groups |= set(chunk.label_group[split == "train"])
        found.val.update(chunk.label_group[(split == "val") & (chunk.label_group != "")])
    found.classes = len(groups)
    return found


def labels_of_shards(shards: Path) -> Labels:
    """Counts of a finished pack, without val postings that have a near-duplicate elsewhere."""
    shard_set = ShardSet(shards)
    table = shard_set.packed
    found = Labels(shards, classes=int(shard_set.manifest["counts"]["classes"]))
    found.count(table, table.split, {"image": table.has_image, "text": table.has_text})
    found.val.update(table.label_group.iloc[labelled_rows(table, "val")])
    return found


def check_labels(config: Config, labels: Labels) -> None:
    """Raise BadInput if labels or items do not suffice for the trainings; warn for the match."""
    where = labels.where
    for modality in config.encoders:
        noun, epochs = NOUNS[modality], config.training(modality).epochs
        if not labels.items["all", modality]:
            raise BadInput(f"{where}: no posting has a {noun}; leave {modality} out of encoders")
        if not epochs > 0:
            continue
        remedy = f"label more products, or set {modality}.epochs to 0 to use the encoder untrained"
        if labels.classes < 2:
            raise BadInput(
                f"{where}: {labels.classes} label groups to train {modality} on, there must be two "
                f"(column label_group; three fifths of all products are trained on); {remedy}"
            )
        if not labels.items["train", modality]:
            raise BadInput(f"{where}: no posting to train {modality} on has a {noun}; {remedy}")
    given = config.match
    # Two postings of a product say as much here as a thousand.
    groups = [group for group, count in labels.val.items() for _ in range(min(count, 2))]
    obstacle = scoring_obstacle(np.asarray(groups, object))
    if given.threshold is None and given.threshold_from is None and obstacle:
        log.warning(
            f"{where}: no threshold can be chosen on the val split: {obstacle} (a fifth of all "
            "products are val), so only near-certain pairs will match; label more products, or "
            "give match.threshold or match.threshold_from"
        )


def check_match_files(config: Config) -> None:
    """Raise BadInput for links of unknown postings, and for columns to compare that are not there.

    Reads the catalogue where such options are given.
    """
    given = config.match
    if not given.features and given.must_link is None and given.cannot_link is None:
        return
    catalogue, carried = Catalogue(config.catalogue, config.columns), Carried()
    posting_ids = [chunk.posting_id for chunk in catalogue.postings(carried)]
    links_of(pd.concat(posting_ids, ignore_index=True).drop_duplicates(), given)
    columns = pd.DataFrame(columns=catalogue.schema(carried.schema()).names)
    names = carried_columns(set_aside(columns, OWN))
    check_columns(config.catalogue, names, given.features)


def check_after_pack(config: Config, trainings: Mapping[str, TrainingOptions]) -> None:
    """Raise BadInput for what the stages after a finished pack would fail for."""
    labels = labels_of_shards(config.out / "shards")
    check_labels(config, labels)
    check_encoders(config, trainings, labels.postings)


def check_encoders(config: Config, trainings: Mapping[str, TrainingOptions], postings: int) -> None:
    """Build the encoder of every training, by its stage's name, and run it on one made-up item.

    Raises BadInput for one that cannot be built, optimised or run, for a head that grows from no
    run, and for an index of `postings` that FAISS cannot make.
    """
    widths, built = dict[str, int](), dict[object, int]()
    for name, options in trainings.items():
        key = (options.encoder, options.layer_decay)
        widths[name] = built[key] = built.get(key) or check_encoder(options)
        if options.epochs > 0 and options.head.grow_from is not None:
            run_to_grow_from(options.head.grow_from)
    if widths.keys() >= set(config.score_weights):
        width = sum(widths[name] for name in config.score_weights)
        choose_kind(config.index.kind, postings, width, bytes_of(config.index.memory))


def check_encoder(options: TrainingOptions) -> int:
    """Build an encoder and run it on one item as large as its options allow; its width D.

    Raises BadInput if it cannot be built, trained or run, or gives NaN or Inf.
    """
    model, size = options.encoder.model, "image_size"
    title, photo = "a", BytesIO()
    if isinstance(options, TextTraining):
        size, title = "max_length", "a " * options.encoder.max_length
    Image.new("RGB", (64, 64), (90, 120, 150)).save(photo, "JPEG")
    try:
        encoder = new_encoder(options.encoder, options.seed)
        if options.epochs > 0:
            encoder_optimizer(encoder, options)
        if options.gradient_checkpointing:
            encoder.recompute_activations()
        inputs = encoder.inputs(options)([Item("", photo.getvalue(), title, -1)], [0])
        with torch.inference_mode():
            vectors = encoder.eval()(*inputs)
    except BadInput:
        raise
    except Exception as error:  # of whatever kind the model's library raises
        reason = (str(error).splitlines() or [""])[0]
        raise BadInput(
            f"encoder.model {model}: cannot be opened, or cannot encode an item of encoder.{size} "
            f"{getattr(options.encoder, size)} ({type(error).__name__}: {reason}); give a size "
            "that the model takes, or name another model"
        ) from None
    if vectors.shape != (1, encoder.width) or not torch.isfinite(vectors).all():
        raise BadInput(
            f"encoder.model {model}: gives a vector {tuple(vectors.shape)} with NaN or of another "
            f"width than {encoder.width}; its weights are broken, name another model"
        )
    return encoder.width


def check_batches(config: Config, processes: dict[Modality, int]) -> None:
    """Raise BadInput if a batch does not divide among the processes of a training."""
    for modality in config.encoders:
        if config.training(modality).epochs > 0:
            try:
                check_batch(config.training(modality), processes[modality])
            except BadInput as error:
                raise BadInput(f"{modality}: {error}") from None
