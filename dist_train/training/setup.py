"""What a training consists of, put together: encoder, head, optimizers, schedule."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.optim import Optimizer

from dist_train.config import TrainingOptions, View
from dist_train.encoders.folder import Encoder, new_encoder
from dist_train.heads.class_parallel import MarginHead
from dist_train.runtime import TIMEOUT, Runtime
from dist_train.training.data import TrainingItems
from dist_train.training.optimisation import (
    Schedule,
    encoder_optimizer,
    head_optimizer,
    make_schedule,
)


@dataclass(frozen=True)
class Training:
    """The parts that a step works on; `prepared` wraps `encoder` for DDP or DeepSpeed."""

    accelerator: Accelerator
    encoder: Encoder
    prepared: nn.Module
    optimizer: Optimizer
    head: MarginHead
    head_optimizer: Optimizer
    schedule: Schedule
    batch_size: int


def set_up(view: View, config: TrainingOptions, items: TrainingItems, runtime: Runtime) -> Training:
    """Build everything before the first step, the same for every number of ranks."""
    accelerator = _accelerator(config, runtime)
    encoder = new_encoder(view, config.encoder, config.seed).to(runtime.device)
    # Set inside the encoder: DeepSpeed's engine switches an autocast around it off.
    encoder.precision = config.precision
    if view == "image" and accelerator.state.deepspeed_plugin is None:
        # DeepSpeed broadcasts weights as rows of bytes and cannot take this layout.
        encoder.to(memory_format=torch.channels_last)
    bare_optimizer = encoder_optimizer(encoder, config)
    # The head stays outside: DDP would overwrite its shards, ZeRO has no place for them.
    prepared, optimizer = accelerator.prepare(encoder, bare_optimizer)
    head = MarginHead(
        classes=items.classes, width=encoder.width, loss=config.head.loss,
        scale=config.head.scale, chunk=config.head.chunk, seed=config.seed,
        rank=runtime.rank, world=runtime.world,
    ).to(runtime.device)  # fmt: skip
    of_head = head_optimizer(head, config)
    inner = _inner(optimizer)
    schedule = make_schedule([inner, of_head], config, items.steps)
    prepared.train()
    return Training(
        accelerator, encoder, prepared, optimizer, head, of_head, schedule, config.batch_size
    )


def _accelerator(config: TrainingOptions, runtime: Runtime) -> Accelerator:
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulation,
        mixed_precision="no",  # ours is the autocast inside the encoder, the same everywhere
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=TIMEOUT),
            # The neck's statistics are equal on all ranks already; a frozen pooler has none.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        share = config.batch_size // (config.accumulation * runtime.world)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share
        plugin.deepspeed_config["gradient_accumulation_steps"] = config.accumulation
        plugin.deepspeed_config["gradient_clipping"] = config.clip
    return accelerator


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose learning rates count, inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
