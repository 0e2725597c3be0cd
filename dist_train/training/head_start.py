"""The head of a training: how it is made, and what its centres begin with."""

import logging
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from dist_train.config import TrainingOptions
from dist_train.embedding.vectors import plan_batches, unit_vectors
from dist_train.encoders.batches import load
from dist_train.encoders.folder import Encoder
from dist_train.heads.centres import ClassMeans
from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.estimate import HeadEstimate
from dist_train.heads.margins import margin_shares
from dist_train.heads.row_optimizer import RowAdamW
from dist_train.heads.store import load_head
from dist_train.runtime import Runtime
from dist_train.training.data import TrainingItems
from shards.errors import BadInput, Stopped
from shards.files import read_json

log = logging.getLogger(__name__)


def head_estimate(config: TrainingOptions, classes: int, width: int, world: int) -> HeadEstimate:
    """What the head of a training over `classes` will take on one of `world` ranks."""
    options = config.head
    return HeadEstimate(
        classes=classes, width=width, batch=config.batch_size // config.accumulation,
        world=world, centres=options.centres, sample=options.sample, chunk=options.chunk,
        passes=config.head_passes,
    )  # fmt: skip


def new_head(
    config: TrainingOptions, items: TrainingItems, width: int, runtime: Runtime
) -> MarginHead:
    """This rank's part of the head over the classes of `items`; says first what it will take."""
    options = config.head
    log.info("%s", head_estimate(config, items.classes, width, runtime.world))
    shares = None
    if options.margin_of_largest is not None and options.margin > 0:
        sizes = torch.from_numpy(np.bincount(_class_ids(items), minlength=items.classes))
        shares = margin_shares(sizes, options.margin_of_largest / options.margin)
    return MarginHead(
        classes=items.classes, width=width, loss=options.loss, scale=options.scale,
        chunk=options.chunk, seed=config.seed, rank=runtime.rank, world=runtime.world,
        centres=options.centres, sample=options.sample,
        detached=options.gradient == "detached", shares=shares,
    ).to(runtime.device)  # fmt: skip


def start_centres(
    head: MarginHead, optimizer: RowAdamW, encoder: Callable[[], Encoder], items: TrainingItems,
    runtime: Runtime,
) -> None:  # fmt: skip
    """Before the first step: centres from class means or from an earlier run, where asked.

    `encoder` gives the whole one on every rank. Raises BadInput for a run over other classes.
    """
    options = items.config.head
    if options.start == "means":
        _start_from_means(head, encoder(), items, runtime)
    if options.grow_from is not None:
        _grow(head, optimizer, options.grow_from, items)


def class_names_digest(names: np.ndarray) -> str:
    """What tells whether two lists of label groups (C,), by class id, are the same."""
    return sha256("\n".join(names.tolist()).encode()).hexdigest()


def _start_from_means(
    head: MarginHead, encoder: Encoder, items: TrainingItems, runtime: Runtime
) -> None:
    """Every rank computes each W-th batch; a batch is the same for every W, so are the means."""
    size = items.config.batch_size
    plans = plan_batches(items.reader, items.numbers, size)
    mine = plans[runtime.rank :: runtime.world]
    means = ClassMeans(head.first, head.last, head.weight.shape[1], runtime.device)
    class_ids = items.reader.records["class_id"]
    encoder.eval()
    batches = load(items.reader, encoder.inputs(), mine, items.config.workers)
    for _ in range(-(-len(plans) // runtime.world)):
        vectors = torch.zeros(size, head.weight.shape[1])
        labels = torch.full((size,), -1)
        for numbers, unit in unit_vectors(encoder, batches, 1, runtime.device):
            vectors[: len(numbers)] = torch.from_numpy(unit)
            labels[: len(numbers)] = torch.from_numpy(class_ids[numbers].astype(np.int64))
        means.add(vectors.to(runtime.device), labels.to(runtime.device))
        if runtime.anyone_asked_to_stop():
            raise Stopped("stopped by a signal before the first step; the same command begins")
    encoder.train()
    known = runtime.total(means.into(head.weight.data, head.centres))
    log.info("centres of %d of %d classes start at their mean embedding", known, head.classes)


def _grow(head: MarginHead, optimizer: RowAdamW, run: Path, items: TrainingItems) -> None:
    """Take over the centres, moments and steps of the classes that the run `run` had."""
    folder = max((run / "checkpoints").glob("step-*"), default=None)
    if folder is None:
        raise BadInput(f"{run}: has no checkpoint to grow from; name a finished run")
    state = read_json(folder / "state.json")
    known = int(state["classes"])
    if class_names_digest(items.class_names[:known]) != state["class_names"]:
        raise BadInput(
            f"{folder}: its {known} classes are not the first of these {head.classes}; grow from "
            "a run over the same catalogue, whose class ids were only added to"
        )
    load_head(folder, head, optimizer, known)
    log.info("centres of %d of %d classes taken from %s", known, head.classes, folder)


def _class_ids(items: TrainingItems) -> np.ndarray:
    return items.reader.records["class_id"][items.numbers].astype(np.int64)
