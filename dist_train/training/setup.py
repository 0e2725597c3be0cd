"""What a training consists of, put together: encoder, head, optimizers, schedule."""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from transformers.integrations import unset_hf_deepspeed_config

from dist_train.config import TrainingOptions, View
from dist_train.encoders.folder import Encoder, new_encoder
from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.row_optimizer import RowAdamW
from dist_train.meeting import timeout
from dist_train.runtime import Runtime
from dist_train.training.data import TrainingItems
from dist_train.training.head_start import class_names_digest, new_head
from dist_train.training.optimisation import encoder_optimizer, head_optimizer
from dist_train.training.progress import Progress
from dist_train.training.schedule import Schedule, make_schedule
from dist_train.training.whole import load_whole, whole_state
from shards.errors import BadInput
from shards.order_state import OrderState


@dataclass(frozen=True)
class Training:
    """The parts that a step works on; `prepared` wraps `encoder` for DDP or DeepSpeed."""

    accelerator: Accelerator
    encoder: Encoder
    prepared: nn.Module
    optimizer: Optimizer
    head: MarginHead
    head_optimizer: RowAdamW
    schedule: Schedule
    order: OrderState
    class_names: str
    """Digest of the label groups by class."""
    twin: Encoder | None
    """Where ZeRO-3 takes `encoder` apart: another, for all the weights."""
    average: ModelEmaV3 | None
    """Moving average of the encoder's weights and statistics, where one is asked for."""
    progress: Progress

    @property
    def deepspeed(self) -> bool:
        """DeepSpeed has the encoder's optimizer."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def whole_encoder(self) -> Encoder:
        """The encoder with all its present weights on this rank; all ranks call it together."""
        if self.twin is None:
            return self.encoder
        load_whole(self.twin, whole_state(self.encoder))
        return self.twin

    def judged_encoder(self) -> Encoder:
        """What is validated and exported: the average where there is one; all ranks call it."""
        return self.whole_encoder() if self.average is None else self.average.module


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
    parted = _takes_apart(accelerator)
    twin = copy.deepcopy(encoder) if parted else None
    average = _average(encoder, config.ema) if config.ema else None
    if config.gradient_checkpointing:
        encoder.recompute_activations()
    if config.compile:
        _refuse_compiling(parted)
        encoder.compile_backbone()
    # The head stays outside: DDP would overwrite its shards, ZeRO has no place for them.
    prepared, optimizer = accelerator.prepare(encoder, bare_optimizer)
    head = new_head(config, items, encoder.width, runtime)
    of_head = head_optimizer(head, config)
    schedule = make_schedule(_inner(optimizer), of_head, config, items.steps)
    prepared.train()
    return Training(
        accelerator, encoder, prepared, optimizer, head, of_head, schedule, items.state,
        class_names_digest(items.class_names), twin, average, Progress(),
    )  # fmt: skip


def _accelerator(config: TrainingOptions, runtime: Runtime) -> Accelerator:
    _refuse_float16(os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16")
    accelerator = Accelerator(
        # As a plugin, or a variable of the launcher's would win and drop updates without a word.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation),
        mixed_precision="no",  # ours is the autocast inside the encoder, the same everywhere
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout()),
            # The neck's statistics are equal on all ranks already; a frozen pooler has none.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        _refuse_float16(_enabled(plugin.deepspeed_config, "fp16"))
        _refuse_bfloat16_weights(_enabled(plugin.deepspeed_config, "bf16", "bfloat16"))
        share = config.batch_size // (config.accumulation * runtime.world)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share
        plugin.deepspeed_config["gradient_accumulation_steps"] = config.accumulation
        plugin.deepspeed_config["gradient_clipping"] = config.clip
        # Else transformers takes a new model's weights apart, whatever zero3_init_flag says.
        unset_hf_deepspeed_config()
    return accelerator


def _refuse_float16(asked: bool) -> None:
    if asked:
        raise BadInput(
            "the launcher asks for fp16: one rank's overflow would skip its step alone, and "
            "DeepSpeed's loss scale would reach the head; launch with --mixed_precision bf16 or no "
            "(--precision says what is used)"
        )


def _refuse_bfloat16_weights(asked: bool) -> None:
    if asked:
        raise BadInput(
            "DeepSpeed's JSON enables bf16: the weights themselves would be bfloat16, and a "
            "checkpoint would lose the float32 ones that are stepped on; take bf16 out of it and "
            "give --precision bf16, which multiplies in bfloat16 and keeps the weights"
        )


def _enabled(deepspeed_config: dict[str, Any], *names: str) -> bool:
    return any(deepspeed_config.get(name, {}).get("enabled") is True for name in names)


def _refuse_compiling(parted: bool) -> None:
    if parted:
        raise BadInput("compile: ZeRO-3 moves weights while the encoder runs; use ZeRO-2 or DDP")


def _average(encoder: Encoder, decay: float) -> ModelEmaV3:
    """Follows closely at first: after t updates it keeps at most 1 - (1 + t)^(-2/3) of itself."""
    return ModelEmaV3(encoder, decay=decay, use_warmup=True)


def _takes_apart(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose learning rates count, inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
