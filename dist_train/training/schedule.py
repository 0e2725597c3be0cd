"""Learning rates, AdamW's beta1 and the margin in closed form: resuming needs the step alone."""

import math
from dataclasses import dataclass

from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from dist_train.config import HeadOptions, TrainingConfig
from dist_train.heads.margins import ramped


@dataclass(frozen=True)
class Schedule:
    """Of the encoder, whose own begins at the step `frozen`, and of the head."""

    encoder: Scheduler
    head: Scheduler
    options: HeadOptions
    steps: int
    frozen: int

    def apply(self, step: int) -> float:
        """Set the learning rates of `step`; the margin of that step.

        A frozen encoder has learning rate 0: its weights stand still to the bit, without decay,
        under DDP and ZeRO alike; AdamW's moments are gathered meanwhile.
        """
        self.head.step_update(step)
        if step < self.frozen:
            self.encoder.update_groups(0.0)
        else:
            self.encoder.step_update(step - self.frozen)
        return ramped(self.options.margin, step, self.steps, self.options.ramp)


def make_schedule(
    encoder: Optimizer, head: Optimizer, config: TrainingConfig, steps: int
) -> Schedule:
    """Warm-up and descent for each optimizer, the margin's ramp beside them."""
    frozen = round(config.freeze * steps)
    of_head = config.warmup if config.head.warmup is None else config.head.warmup
    return Schedule(
        _descent(encoder, config.schedule, config.warmup, steps - frozen),
        _descent(head, config.schedule, of_head, steps), config.head, steps, frozen,
    )  # fmt: skip


def _descent(optimizer: Optimizer, kind: str, warmup: float, steps: int) -> Scheduler:
    if kind == "one-cycle":
        return OneCycle(optimizer, steps, warmup)
    rising = round(warmup * steps)
    # At least two steps of cosine: timm warns of one that has no effect.
    return CosineLRScheduler(
        optimizer, t_initial=max(steps - rising, 2), warmup_t=rising, warmup_prefix=True,
        warmup_lr_init=optimizer.param_groups[0]["lr"] / (rising + 1), t_in_epochs=False,
    )  # fmt: skip


class OneCycle(Scheduler):
    """From a 25th of the peak up to it and down to nothing, beta1 from 0.95 to 0.85 and back.

    Smith and Topin, Super-Convergence (2018), as torch's OneCycleLR has it, which counts its steps
    where this is a function of the step.
    """

    START, END = 1 / 25, 1 / 250_000
    BETA_AT_ENDS, BETA_AT_PEAK = 0.95, 0.85

    def __init__(self, optimizer: Optimizer, steps: int, rising: float) -> None:
        """`rising`: the share of the `steps` before the peak."""
        self.peak, self.last = max(rising * steps - 1, 0.0), max(steps - 1, 1)
        super().__init__(optimizer, "lr", t_in_epochs=False)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set learning rates and beta1 of the step `num_updates`."""
        super().step_update(num_updates, metric)
        beta = self._between(num_updates, self.BETA_AT_ENDS, self.BETA_AT_PEAK, self.BETA_AT_ENDS)
        for group in self.optimizer.param_groups:
            group["betas"] = (beta, group["betas"][1])

    def _get_lr(self, t: int) -> list[float]:
        return [peak * self._between(t, self.START, 1.0, self.END) for peak in self.base_values]

    def _between(self, step: int, first: float, peak: float, last: float) -> float:
        """From `first` to `peak` and on to `last`, each in half a cosine."""
        if step <= self.peak and self.peak > 0:
            return _half_cosine(first, peak, step / self.peak)
        return _half_cosine(peak, last, (step - self.peak) / max(self.last - self.peak, 1.0))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * share) + 1)
