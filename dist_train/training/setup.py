"""What a training consists of, built once: encoder, head, optimizers, schedule, progress."""

import copy
import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dist_train.config.training import TrainingOptions
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import load, plan_batches, unit_vectors
from dist_train.encoders.encoder import Encoder, ImageEncoder, TextEncoder, new_encoder
from dist_train.encoders.neck import Neck
from dist_train.encoders.tokens import check_titles
from dist_train.heads.centres import RowAdamW
from dist_train.heads.class_parallel import ClassMeans, MarginHead, margin_shares
from dist_train.heads.estimate import HeadEstimate
from dist_train.training.accelerator import new_accelerator
from dist_train.training.data import TrainingItems
from dist_train.training.optimisation import Schedule, encoder_optimizer, head_optimizer
from shards.storage.errors import BadInput, Stopped, Unreadable

STATISTICS = (Neck, nn.modules.batchnorm._BatchNorm)
"""Modules whose buffers move in a forward pass in training mode."""
FEW_ITEMS = 8
"""Items below which batch statistics are noise."""
TITLES = 256
"""Titles that are tokenised before the first step, to see whether the tokenizer knows them."""
log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a training has come beside its weights; equal on all ranks but for `best_weights`."""

    updates: int = 0
    """Steps of the encoder's optimizer: all steps but the skipped ones."""
    skipped: int = 0
    """Steps left out because a loss or gradient was NaN or Inf."""
    skipped_in_a_row: int = 0
    validated: int = -1
    """Step of the last validation."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores of the last validation."""
    start: dict[str, float] = field(default_factory=dict)
    """Scores of the encoder before its first step."""
    best_step: int = 0
    """Step of the best validation of a trained encoder; 0: there was none."""
    best: dict[str, float] = field(default_factory=dict)
    """Scores at `best_step`."""
    without_better: int = 0
    """Validations in a row since `best_step`."""
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """The encoder at `best_step`, on the CPU of rank 0, where it is to be kept."""


@dataclass(frozen=True)
class Training:
    """The objects that a step works on; `prepared` is `encoder` wrapped for DDP or DeepSpeed."""

    items: TrainingItems
    runtime: Runtime
    accelerator: Accelerator
    encoder: Encoder
    prepared: nn.Module
    optimizer: Optimizer
    head: MarginHead
    head_optimizer: RowAdamW
    schedule: Schedule
    uses_deepspeed: bool
    """Whether DeepSpeed holds the encoder's optimizer."""
    gathered: Encoder | None
    """Under ZeRO-3, where `encoder` holds shards: a second encoder that can hold all weights."""
    average: ModelEmaV3 | None
    """Moving average of the encoder's weights and statistics, if `ema` is above 0."""
    progress: Progress = field(default_factory=Progress)

    def with_complete_weights(self, writer: int | None = None) -> AbstractContextManager[object]:
        """All ranks together: in it each has all weights; ZeRO-3 then shards those of `writer`."""
        if self.gathered is None:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(self.encoder.parameters()), modifier_rank=writer)

    def complete_state(self) -> dict[str, torch.Tensor]:
        """The state of `encoder` with complete tensors; all ranks call it together."""
        with self.with_complete_weights():
            state = self.encoder.state_dict()
            return state if self.gathered is None else {k: v.clone() for k, v in state.items()}

    def complete_encoder(self) -> Encoder:
        """The encoder with all its present weights on this rank; all ranks call it together."""
        if self.gathered is None:
            return self.encoder
        self.gathered.load_state_dict(self.complete_state())
        return self.gathered

    def encoder_to_validate(self) -> Encoder:
        """What is validated and exported: the average if there is one; all ranks call it."""
        return self.complete_encoder() if self.average is None else self.average.module


def set_up(items: TrainingItems, runtime: Runtime) -> Training:
    """Build everything before the first step, the same for every number of ranks.

    Raises BadInput for a launcher or option that would give wrong weights.
    """
    config = items.config
    accelerator = new_accelerator(config, runtime)
    plugin = accelerator.state.deepspeed_plugin
    encoder = new_encoder(config.encoder, config.seed).to(runtime.device)
    if isinstance(encoder, TextEncoder):
        check_titles(encoder.tokenizer, first_titles(items), config.encoder.model)
    # Set inside the encoder: DeepSpeed's engine switches an autocast around it off.
    encoder.precision = config.precision
    if isinstance(encoder, ImageEncoder) and plugin is None:
        # DeepSpeed broadcasts weights as rows of bytes and cannot handle channels that come last.
        encoder.to(memory_format=encoder.memory_format)
    bare_optimizer = encoder_optimizer(encoder, config)
    gathered = copy.deepcopy(encoder) if plugin is not None and plugin.zero_stage == 3 else None
    # The warm-up follows closely at first: after t updates at most 1 - (1 + t)^(-2/3) is kept.
    average = ModelEmaV3(encoder, decay=config.ema, use_warmup=True) if config.ema else None
    if config.gradient_checkpointing:
        encoder.recompute_activations()
    if config.compile:
        encoder.compile_backbone()
    # The head stays outside: DDP would overwrite its shards, ZeRO has no place for them.
    prepared, optimizer = accelerator.prepare(encoder, bare_optimizer)
    if isinstance(prepared, DistributedDataParallel):
        # The neck's statistics are equal on all ranks already; a frozen pooler has none. Set here:
        # torch warns of the older of two names, accelerate passes no other.
        newer = hasattr(prepared, "forward_sync_buffers")
        setattr(prepared, "forward_sync_buffers" if newer else "broadcast_buffers", False)
    head = new_head(items, encoder.width, runtime)
    optimizer_of_head = head_optimizer(head, config)
    # The learning rates that count are those of the optimizer inside accelerate's wrapper.
    inner = getattr(optimizer, "optimizer", optimizer)
    prepared.train()
    if items.steps:
        check_statistics(encoder, config, runtime)
    return Training(
        items=items,
        runtime=runtime,
        accelerator=accelerator,
        encoder=encoder,
        prepared=prepared,
        optimizer=optimizer,
        head=head,
        head_optimizer=optimizer_of_head,
        schedule=Schedule(inner, optimizer_of_head, config, items.steps),
        uses_deepspeed=plugin is not None,
        gathered=gathered,
        average=average,
    )


def first_titles(items: TrainingItems) -> list[str]:
    """Titles of the first training items that can be read, which lie together on disk."""
    titles = []
    for number in items.numbers[:TITLES].tolist():
        with suppress(Unreadable):
            titles.append(items.reader.read(number, photo=False).title)
    return titles


def check_statistics(encoder: Encoder, config: TrainingOptions, runtime: Runtime) -> None:
    """Raise BadInput where batch statistics would be of one item; warn of fewer than FEW_ITEMS.

    The neck takes them over the pass of all ranks, a backbone that starts from random weights over
    that of one rank.
    """
    moving = [m for m in encoder.modules() if isinstance(m, STATISTICS) and m.training]
    rows = config.batch_size // config.accumulation
    items = {"the neck": rows} if any(isinstance(m, Neck) for m in moving) else {}
    if not all(isinstance(m, Neck) for m in moving):
        items["the backbone"] = rows // runtime.world
    for part, count in items.items():
        if count == 1:
            raise BadInput(
                f"{part} normalises by the statistics of a pass, which would be of one item; use "
                "a larger batch_size or fewer passes (accumulation), 8 items a pass or more"
            )
        if count < FEW_ITEMS and runtime.is_main:
            log.warning(
                f"{part} normalises by the statistics of a pass, which are of {count} items: they "
                "are noise below 8; use a larger batch_size or fewer passes (accumulation)"
            )


def head_estimate(config: TrainingOptions, classes: int, width: int, world: int) -> HeadEstimate:
    """Memory that the head of a training over `classes` will need on one of `world` ranks."""
    options = config.head
    return HeadEstimate(
        classes=classes, width=width, batch=config.batch_size // config.accumulation,
        world=world, centres=options.centres, sample=options.sample, chunk=options.chunk,
        passes=config.head_passes,
    )  # fmt: skip


def new_head(items: TrainingItems, width: int, runtime: Runtime) -> MarginHead:
    """This rank's shard of the head over the classes of `items`; logs its memory first."""
    config, options, shares = items.config, items.config.head, None
    if not items.steps:  # its centres are not used, and there may be no class
        items = replace(items, classes=1)
    else:
        log.info("%s", head_estimate(config, items.classes, width, runtime.world))
    if items.steps and options.margin_of_largest is not None and options.margin > 0:
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


def start_centres(training: Training) -> None:
    """Before the first step: set centres to class means, if configured; Stopped after a signal."""
    items, head, runtime = training.items, training.head, training.runtime
    config = items.config
    if config.head.start == "means":
        # Every rank computes each W-th batch; the batches, and so the means, are equal for every W.
        encoder, class_ids = training.complete_encoder(), items.reader.records["class_id"]
        size, width = config.batch_size, head.weight.shape[1]
        plans = plan_batches(items.reader, items.numbers, size)
        means = ClassMeans(head)
        encoder.eval()
        batches = load(
            items.reader,
            encoder.inputs(),
            runtime.share(plans),
            config.workers,
            refuse_damaged=not config.max_unreadable,
        )
        # All ranks take equally many rounds; one without a batch in the last adds padding only.
        for _ in range(-(-len(plans) // runtime.world)):
            vectors, labels = torch.zeros(size, width), torch.full((size,), -1)
            for numbers, unit in unit_vectors(encoder, batches, 1, runtime.device):
                vectors[: len(numbers)] = torch.from_numpy(unit)
                labels[: len(numbers)] = torch.from_numpy(class_ids[numbers].astype(np.int64))
            means.add(vectors.to(runtime.device), labels.to(runtime.device))
            if runtime.any_stop_requested():
                raise Stopped("stopped by a signal before the first step; the same command begins")
        encoder.train()
        known = runtime.all_reduce_sum(means.write())
        log.info("centres of %d of %d classes start at their mean embedding", known, head.classes)


def run_to_grow_from(run: Path) -> Path:
    """The newest checkpoint of an earlier run; BadInput without one."""
    folder = max((run / "checkpoints").glob("step-*"), default=None)
    if folder is None:
        raise BadInput(f"{run}: has no checkpoint to grow from; name a finished run")
    return folder
