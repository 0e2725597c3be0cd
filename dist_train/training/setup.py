"""What a training consists of, built once: encoder, head, optimizers, schedule, progress."""

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config

from dist_train.config.training import TrainingOptions
from dist_train.config.values import Modality
from dist_train.distributed.barrier import timeout
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.folder import Encoder, new_encoder
from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.row_optimizer import RowAdamW
from dist_train.training.data import TrainingItems
from dist_train.training.head_setup import class_names_digest, new_head
from dist_train.training.optimisation import (
    Schedule,
    encoder_optimizer,
    head_optimizer,
    make_schedule,
)
from dist_train.training.sharded_state import complete_state, load_complete_state
from shards.order.global_order import OrderState
from shards.storage.errors import BadInput


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

    accelerator: Accelerator
    encoder: Encoder
    prepared: nn.Module
    optimizer: Optimizer
    head: MarginHead
    head_optimizer: RowAdamW
    schedule: Schedule
    order: OrderState
    """Position in the item order before the first step."""
    class_names: str
    """Digest of the label groups by class."""
    gathered: Encoder | None
    """Under ZeRO-3, where `encoder` holds shards: a second encoder that can hold all weights."""
    average: ModelEmaV3 | None
    """Moving average of the encoder's weights and statistics, if `ema` is above 0."""
    progress: Progress

    def complete_encoder(self) -> Encoder:
        """The encoder with all its present weights on this rank; all ranks call it together."""
        if self.gathered is None:
            return self.encoder
        load_complete_state(self.gathered, complete_state(self.encoder))
        return self.gathered

    def encoder_to_validate(self) -> Encoder:
        """What is validated and exported: the average if there is one; all ranks call it."""
        return self.complete_encoder() if self.average is None else self.average.module


def set_up(
    modality: Modality, config: TrainingOptions, items: TrainingItems, runtime: Runtime
) -> Training:
    """Build everything before the first step, the same for every number of ranks.

    Raises BadInput for a launcher or option that would give wrong weights.
    """
    accelerator = _new_accelerator(config, runtime)
    plugin = accelerator.state.deepspeed_plugin
    zero3 = plugin is not None and plugin.zero_stage == 3
    encoder = new_encoder(modality, config.encoder, config.seed).to(runtime.device)
    # Set inside the encoder: DeepSpeed's engine switches an autocast around it off.
    encoder.precision = config.precision
    if modality == "image" and plugin is None:
        # DeepSpeed broadcasts weights as rows of bytes and cannot handle this layout.
        encoder.to(memory_format=torch.channels_last)
    bare_optimizer = encoder_optimizer(encoder, config)
    gathered = copy.deepcopy(encoder) if zero3 else None
    # The warm-up follows closely at first: after t updates at most 1 - (1 + t)^(-2/3) is kept.
    average = ModelEmaV3(encoder, decay=config.ema, use_warmup=True) if config.ema else None
    if config.gradient_checkpointing:
        encoder.recompute_activations()
    if config.compile:
        if zero3:
            raise BadInput(
                "compile: ZeRO-3 moves weights while the encoder runs; use ZeRO-2 or DDP"
            )
        encoder.compile_backbone()
    # The head stays outside: DDP would overwrite its shards, ZeRO has no place for them.
    prepared, optimizer = accelerator.prepare(encoder, bare_optimizer)
    head = new_head(config, items, encoder.width, runtime)
    optimizer_of_head = head_optimizer(head, config)
    # The learning rates that count are those of the optimizer inside accelerate's wrapper.
    inner = getattr(optimizer, "optimizer", optimizer)
    prepared.train()
    return Training(
        accelerator=accelerator,
        encoder=encoder,
        prepared=prepared,
        optimizer=optimizer,
        head=head,
        head_optimizer=optimizer_of_head,
        schedule=make_schedule(inner, optimizer_of_head, config, items.steps),
        order=items.state,
        class_names=class_names_digest(items.class_names),
        gathered=gathered,
        average=average,
        progress=Progress(),
    )


def _new_accelerator(config: TrainingOptions, runtime: Runtime) -> Accelerator:
    """The accelerator that the launcher asks for, with our batch size, precision and clipping.

    Raises BadInput for a launcher that asks for float16 or for weights in bfloat16.
    """
    float16 = BadInput(
        "the launcher asks for fp16: one rank's overflow would skip its step alone, and "
        "DeepSpeed's loss scale would reach the head; launch with --mixed_precision bf16 or no "
        "(--precision sets what is used)"
    )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise float16
    accelerator = Accelerator(
        # Given as a plugin, or a variable of the launcher would win and silently drop updates.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation),
        mixed_precision="no",  # ours is the autocast inside the encoder, the same everywhere
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout()),
            # The neck's statistics are equal on all ranks already; a frozen pooler has none.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    plugin = accelerator.state.deepspeed_plugin
    deepspeed: dict[str, Any] = {} if plugin is None else plugin.deepspeed_config
    types = ("fp16", "bf16", "bfloat16")
    enabled = [name for name in types if deepspeed.get(name, {}).get("enabled") is True]
    if "fp16" in enabled:
        raise float16
    if enabled:
        raise BadInput(
            "DeepSpeed's JSON enables bf16: the weights themselves would be bfloat16, and a "
            "checkpoint would lose the float32 ones that are stepped on; take bf16 out of it and "
            "give --precision bf16, which multiplies in bfloat16 and keeps the weights"
        )
    if plugin is not None:
        share = config.batch_size // (config.accumulation * runtime.world)
        deepspeed["train_micro_batch_size_per_gpu"] = share
        deepspeed["gradient_accumulation_steps"] = config.accumulation
        deepspeed["gradient_clipping"] = config.clip
        # Otherwise transformers shards a new model's weights, whatever zero3_init_flag says.
        unset_hf_deepspeed_config()
    return accelerator
