"""Optimizers of encoder and head, and their schedule: which weights learn how fast, clipped how.

Learning rates, AdamW's beta1 and the margin are functions of the step alone, so that resuming needs
one number.
"""

import math

import torch
import torch.distributed as dist
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import AdamW, Optimizer

from dist_train.config.training import TrainingConfig, TrainingOptions
from dist_train.encoders.encoder import Encoder
from dist_train.heads.centres import RowAdamW
from dist_train.heads.class_parallel import MarginHead
from shards.storage.errors import BadInput

EPS = 1e-6
"""AdamW's epsilon, as BERT was trained with. At 1e-8 rounding in gradients that are zero (a bias
before batch normalisation, the bias of attention keys) becomes steps of full size, which differ
with the number of ranks."""


def encoder_optimizer(encoder: Encoder, config: TrainingOptions) -> AdamW:
    """AdamW over the encoder's trainable weights; biases and norms do not decay.

    With `layer_decay` d a layer n below the top has the learning rate lr * d^n (Clark et al.,
    ELECTRA, 2020; Bao et al., BEiT, 2021); the neck has lr. Raises BadInput for an encoder whose
    layers cannot be distinguished.
    """
    decay, layer_decay = config.weight_decay, config.layer_decay
    if layer_decay == 1:
        groups = param_groups_weight_decay(encoder, decay)
    else:
        groups = param_groups_layer_decay(encoder.backbone, decay, layer_decay=layer_decay)
        if len({group["lr_scale"] for group in groups if group["params"]}) < 2:
            raise BadInput(
                f"layer_decay: the layers of {config.encoder.model} cannot be distinguished (as "
                "where all share their weights), each would have the same rate; leave it at 1"
            )
        groups += param_groups_weight_decay(encoder.neck, decay)
    return AdamW([group for group in groups if group["params"]], lr=config.lr, eps=EPS)


def head_optimizer(head: MarginHead, config: TrainingOptions) -> RowAdamW:
    """AdamW over this rank's class centres; only over those that a step sees, when it samples."""
    return RowAdamW(head.weight, lr=config.head.lr, weight_decay=config.weight_decay, eps=EPS)


def clip_head(head: MarginHead, limit: float, *others: torch.Tensor) -> torch.Tensor:
    """Scale the head's gradient to norm `limit` over all ranks, without a wait of the host.

    Returns the norm before and the sums of the scalars `others` over ranks, (1 + len(others),)
    float64, in one collective.
    """
    grad = head.weight.grad
    assert grad is not None
    values = grad.values() if grad.is_sparse else grad
    squared = torch.linalg.vector_norm(values).double().square()
    sums = torch.stack([squared, *(other.double() for other in others)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    norm = sums[0].sqrt_()
    values.mul_((limit / norm).clamp(max=1).to(values.dtype))
    return sums


class Schedule:
    """Learning rates of encoder and head, warm-up and decay over `steps`, and the margin's ramp."""

    def __init__(
        self, encoder: Optimizer, head: Optimizer, config: TrainingConfig, steps: int
    ) -> None:
        self.options, self.steps = config.head, steps
        self.frozen = round(config.freeze * steps)
        warmup = config.warmup if config.head.warmup is None else config.head.warmup
        self.schedulers: list[Scheduler] = []
        cases = (encoder, config.warmup, steps - self.frozen), (head, warmup, steps)
        for optimizer, rising, length in cases:
            if config.schedule == "one-cycle":
                self.schedulers.append(OneCycle(optimizer, length, rising))
                continue
            warm = round(rising * length)
            first = optimizer.param_groups[0]["lr"] / (warm + 1)
            # At least two steps of cosine: timm warns of one that has no effect.
            cosine = {"t_initial": max(length - warm, 2), "t_in_epochs": False}
            rise = {"warmup_t": warm, "warmup_prefix": True, "warmup_lr_init": first}
            self.schedulers.append(CosineLRScheduler(optimizer, **cosine, **rise))

    def apply(self, step: int) -> float:
        """Set the learning rates of `step` and return its margin.

        A frozen encoder has learning rate 0: its weights stay equal to the bit, without decay,
        under DDP and ZeRO alike; AdamW's moments are gathered meanwhile. The margin rises linearly
        from 0 over the share `ramp` of all steps.
        """
        encoder, head = self.schedulers
        head.step_update(step)
        if step < self.frozen:
            encoder.update_groups(0.0)
        else:
            encoder.step_update(step - self.frozen)
        ramp = self.options.ramp * self.steps
        return self.options.margin * min(1.0, (step + 1) / ramp if ramp else 1.0)


class OneCycle(Scheduler):
    """From a 25th of the peak up to it and down to nothing, beta1 from 0.95 to 0.85 and back.

    Smith and Topin, Super-Convergence (2018), as in torch's OneCycleLR, which counts its steps
    where this is a function of the step.
    """

    def __init__(self, optimizer: Optimizer, steps: int, rising: float) -> None:
        """`rising`: the share of the `steps` before the peak."""
        self.peak, self.last = max(rising * steps - 1, 0.0), max(steps - 1, 1)
        super().__init__(optimizer, "lr", t_in_epochs=False)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set learning rates and beta1 of the step `num_updates`."""
        super().step_update(num_updates, metric)
        beta = self._between(num_updates, 0.95, 0.85, 0.95)
        for group in self.optimizer.param_groups:
            group["betas"] = (beta, group["betas"][1])

    def _get_lr(self, t: int) -> list[float]:
        return [peak * self._between(t, 1 / 25, 1.0, 1 / 250_000) for peak in self.base_values]

    def _between(self, step: int, first: float, peak: float, last: float) -> float:
        """From `first` to `peak` and on to `last`, each along half a cosine."""
        if step <= self.peak and self.peak > 0:
            start, end, share = first, peak, step / self.peak
        else:
            start, end = peak, last
            share = (step - self.peak) / max(self.last - self.peak, 1.0)
        return end + (start - end) / 2 * (math.cos(math.pi * share) + 1)
