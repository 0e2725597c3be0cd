"""Optimizers of encoder and head, their learning rates and the margin, as functions of the step."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer

from dist_train.config import HeadOptions, TrainingOptions
from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.margins import ramped
from dist_train.heads.row_optimizer import RowAdamW, coalesced

EPS = 1e-6
"""AdamW's, as BERT was trained with. At 1e-8 rounding in gradients that are zero (a bias before
batch normalisation, the bias of attention keys) becomes steps of full size, which differ with W."""


def encoder_optimizer(encoder: nn.Module, config: TrainingOptions) -> AdamW:
    """AdamW over the encoder's trainable weights; biases and norms do not decay."""
    groups = param_groups_weight_decay(encoder, config.weight_decay)
    return AdamW([group for group in groups if group["params"]], lr=config.lr, eps=EPS)


def head_optimizer(head: MarginHead, config: TrainingOptions) -> RowAdamW:
    """AdamW over this rank's class centres; of those that a step sees, when it samples."""
    return RowAdamW(head.weight, lr=config.head.lr, weight_decay=config.weight_decay, eps=EPS)


@dataclass(frozen=True)
class Schedule:
    """Learning rates and margin in closed form: resuming needs the step alone."""

    schedulers: tuple[CosineLRScheduler, ...]
    head: HeadOptions
    steps: int

    def apply(self, step: int) -> float:
        """Set the learning rates of `step`; the margin of that step."""
        for scheduler in self.schedulers:
            scheduler.step_update(step)
        return ramped(self.head.margin, step, self.steps, self.head.ramp)


def make_schedule(optimizers: list[Optimizer], config: TrainingOptions, steps: int) -> Schedule:
    """Warm-up and cosine to 0 for each optimizer, the margin's ramp beside them."""
    warmup = round(config.warmup * steps)
    # At least two steps of cosine: timm warns of one that has no effect.
    made = [
        CosineLRScheduler(
            optimizer, t_initial=max(steps - warmup, 2), warmup_t=warmup, warmup_prefix=True,
            warmup_lr_init=optimizer.param_groups[0]["lr"] / (warmup + 1),
            t_in_epochs=False,
        )
        for optimizer in optimizers
    ]  # fmt: skip
    return Schedule(tuple(made), config.head, steps)


def clip_head(head: MarginHead, limit: float) -> float:
    """Scale the head's gradient to norm `limit` over all ranks; its norm before."""
    assert head.weight.grad is not None
    grad = head.weight.grad = coalesced(head.weight.grad)
    values = grad.values() if grad.is_sparse else grad
    square = torch.linalg.vector_norm(values).double().square()
    if dist.is_initialized():
        dist.all_reduce(square)
    norm = square.sqrt().item()
    if norm > limit:
        values.mul_(limit / norm)
    return norm
