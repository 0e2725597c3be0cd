"""The head of a training: how it is built, and what its class centres start from."""

import logging
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import torch

from dist_train.config.training import TrainingOptions
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import load, plan_batches, unit_vectors
from dist_train.encoders.encoder import Encoder
from dist_train.heads.class_parallel import ClassMeans, MarginHead, load_head
from dist_train.heads.estimate import HeadEstimate
from dist_train.heads.margins import margin_shares
from dist_train.heads.row_optimizer import RowAdamW
from dist_train.training.data import TrainingItems
from shards.storage.errors import BadInput, Stopped
from shards.storage.files import read_json

log = logging.getLogger(__name__)


def head_estimate(config: TrainingOptions, classes: int, width: int, world: int) -> HeadEstimate:
    """Memory that the head of a training over `classes` will need on one of `world` ranks."""
    options = config.head
    return HeadEstimate(
        classes=classes, width=width, batch=config.batch_size // config.accumulation,
        world=world, centres=options.centres, sample=options.sample, chunk=options.chunk,
        passes=config.head_passes,
    )  # fmt: skip


def new_head(
    config: TrainingOptions, items: TrainingItems, width: int, runtime: Runtime
) -> MarginHead:
    """This rank's shard of the head over the classes of `items`; logs its memory first."""
    options = config.head
    log.info("%s", head_estimate(config, items.classes, width, runtime.world))
    shares = None
    if options.margin_of_largest is not None and options.margin > 0:
        class_ids = items.reader.records["class_id"][items.numbers].astype(np.int64)
        sizes = torch.from_numpy(np.bincount(class_ids, minlength=items.classes))
        shares = margin_shares(sizes, options.margin_of_largest / options.margin)
    head = MarginHead(
        classes=items.classes, width=width, loss=options.loss, scale=options.scale,
        chunk=options.chunk, seed=config.seed, rank=runtime.rank, world=runtime.world,
        centres=options.centres, sample=options.sample,
        detached=options.gradient == "detached", shares=shares,
    )  # fmt: skip
    return head.to(runtime.device)


def class_names_digest(names: np.ndarray) -> str:
    """SHA-256 that is equal for equal lists of label groups (C,), by class id."""
    return sha256("\n".join(names.tolist()).encode()).hexdigest()


def start_centres(
    head: MarginHead,
    optimizer: RowAdamW,
    encoder: Callable[[], Encoder],
    items: TrainingItems,
    runtime: Runtime,
) -> None:
    """Before the first step: set centres to class means or to an earlier run's, if configured.

    `encoder` returns the complete encoder on every rank. Raises BadInput for a run over other
    classes, and Stopped after a signal.
    """
    options = items.config.head
    if options.start == "means":
        _start_from_means(head, encoder(), items, runtime)
    if options.grow_from is None:
        return
    # Centres, moments and steps of the classes that the earlier run had are taken over.
    folder = max((options.grow_from / "checkpoints").glob("step-*"), default=None)
    if folder is None:
        raise BadInput(f"{options.grow_from}: has no checkpoint to grow from; name a finished run")
    state = read_json(folder / "state.json")
    known = int(state["classes"])
    if class_names_digest(items.class_names[:known]) != state["class_names"]:
        raise BadInput(
            f"{folder}: its {known} classes are not the first of these {head.classes}; grow from "
            "a run over the same catalogue, whose class ids were only added to"
        )
    load_head(folder, head, optimizer, known)
    log.info("centres of %d of %d classes taken from %s", known, head.classes, folder)


def _start_from_means(
    head: MarginHead, encoder: Encoder, items: TrainingItems, runtime: Runtime
) -> None:
    """Every rank computes each W-th batch; the batches, and so the means, are equal for every W."""
    size, width = items.config.batch_size, head.weight.shape[1]
    plans = plan_batches(items.reader, items.numbers, size)
    means = ClassMeans(head.first, head.last, width, runtime.device)
    class_ids = items.reader.records["class_id"]
    encoder.eval()
    batches = load(items.reader, encoder.inputs(), runtime.share(plans), items.config.workers)
    # All ranks take equally many rounds; one without a batch in the last adds padding only.
    for _ in range(-(-len(plans) // runtime.world)):
        vectors = torch.zeros(size, width)
        labels = torch.full((size,), -1)
        for numbers, unit in unit_vectors(encoder, batches, 1, runtime.device):
            vectors[: len(numbers)] = torch.from_numpy(unit)
            labels[: len(numbers)] = torch.from_numpy(class_ids[numbers].astype(np.int64))
        means.add(vectors.to(runtime.device), labels.to(runtime.device))
        if runtime.any_stop_requested():
            raise Stopped("stopped by a signal before the first step; the same command begins")
    encoder.train()
    known = runtime.all_reduce_sum(means.write_to(head.weight.data, head.centres))
    log.info("centres of %d of %d classes start at their mean embedding", known, head.classes)
