"""One optimizer step over the global batch, taken by all ranks or by none."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from dist_train.config import TrainingOptions
from dist_train.encoders.batches import FEW, Batch
from dist_train.encoders.pooling import Neck
from dist_train.runtime import Runtime
from dist_train.training.buckets import settle_buckets
from dist_train.training.mixing import mix_of_step
from dist_train.training.optimisation import clip_head
from dist_train.training.setup import Training
from shards.errors import Failed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a step tells, equal on all ranks."""

    values: dict[str, float]
    """Loss over the global batch, gradient norms before clipping, margin, learning rates."""
    stopping: bool
    """A signal has reached some rank."""


class Stepper:
    """Takes the steps of one life of a run, each from the next batches of this rank."""

    def __init__(
        self, training: Training, config: TrainingOptions, batches: Iterator[Batch],
        runtime: Runtime,
    ) -> None:  # fmt: skip
        self.training, self.config = training, config
        self.batches, self.runtime = batches, runtime
        self._broken, self._settled = 0, False

    def take(self, step: int) -> Outcome:
        """Step number `step`; left out on all ranks when its loss or a gradient is no number.

        Raises Failed when that has happened `max_skipped` times in a row.
        """
        training, config = self.training, self.config
        # Dropout is a function of (seed, step, rank), and so the same after a resume. Mixed into 32
        # bits, because torch's generator on CPUs drops the higher bits of a seed.
        mixed = np.random.SeedSequence((config.seed, step, self.runtime.rank))
        torch.manual_seed(int(mixed.generate_state(1)[0]))
        margin = training.schedule.apply(step)
        statistics = [(buffer, buffer.clone()) for buffer in _moving(training.encoder)]
        loss, posting_ids = self._passes(margin, step)
        norms, stopping = self._norms(loss)
        if all(math.isfinite(value) for value in norms.values()):
            self._update()
        else:
            for buffer, before in statistics:
                buffer.copy_(before)
            self._leave_out(step, norms, posting_ids)
        for optimizer in (training.optimizer, training.head_optimizer):
            optimizer.zero_grad()
        rates = {"lr": _rate(training.optimizer), "lr_head": _rate(training.head_optimizer)}
        told = {"margin": margin, "skipped": training.progress.skipped}
        return Outcome(norms | told | rates, stopping)

    def broken(self, served: int) -> float:
        """Broken items among the `served`, over all ranks; above the budget all ranks stop."""
        broken = self.runtime.total(self._broken)
        if broken > max(FEW, self.config.max_unreadable * served):
            raise Failed(
                f"{broken:.0f} of {served} items served were broken (the log names them); look "
                "with dist-train verify, restore or pack again, or allow more with --max-unreadable"
            )
        return broken

    def _passes(self, margin: float, step: int) -> tuple[torch.Tensor, list[str]]:
        """Forward and backward of every pass; the loss () and the posting ids of this rank.

        DeepSpeed steps within the last backward, unless the norm of its gradient is no number. The
        head makes sure that it is none when any rank's centres have a gradient that is none.
        """
        training, passes = self.training, self.config.accumulation
        loss = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        posting_ids: list[str] = []
        for _ in range(passes):
            batch = next(self.batches)
            self._broken += len(batch.unreadable)
            posting_ids += batch.posting_ids
            inputs = batch.inputs_on(self.runtime.device)
            mix = mix_of_step(self.config, inputs[0].shape[-1], step)
            if mix is not None:
                inputs = (mix.photos(inputs[0]),)
            if not self._settled:
                settle_buckets(training.prepared, training.optimizer, inputs)
                self._settled = True
            with training.accelerator.accumulate(training.prepared):
                vectors = training.prepared(*inputs)
                labels = batch.class_ids.to(self.runtime.device)
                one = training.head(vectors, labels, margin, step)
                if mix is not None:
                    other = training.head(vectors, mix.partners(labels), margin, step)
                    one = mix.share * one + (1 - mix.share) * other
                training.accelerator.backward(one)
            loss += one.detach().double() / passes
        return loss, posting_ids

    def _norms(self, loss: torch.Tensor) -> tuple[dict[str, float], bool]:
        """Loss and gradient norms, and whether a stop was asked for: the host waits here, once."""
        training, clip = self.training, self.config.clip
        norm = training.accelerator.clip_grad_norm_(training.prepared.parameters(), clip)
        asked = torch.full((1,), float(self.runtime.stop_asked()), device=loss.device)
        of_head = clip_head(training.head, clip, told=asked)
        of_encoder = torch.as_tensor(norm, dtype=torch.float64, device=loss.device)
        told = torch.stack([loss, of_encoder, of_head, asked[0].double()]).tolist()
        names = ("loss", "grad_norm", "grad_norm_head")
        return dict(zip(names, told[:3], strict=True)), told[3] > 0

    def _update(self) -> None:
        training = self.training
        training.optimizer.step()
        training.head_optimizer.step()
        training.progress.updates += 1
        training.progress.skipped_in_a_row = 0
        if training.average is not None:
            training.average.update(training.whole_encoder(), training.progress.updates)

    def _leave_out(self, step: int, norms: dict[str, float], posting_ids: list[str]) -> None:
        progress = self.training.progress
        told = ", ".join(f"{name} {value:.4g}" for name, value in norms.items())
        optimizer: Any = self.training.optimizer
        if self.training.deepspeed and not optimizer.step_was_skipped:
            raise Failed(f"step {step}: {told}, but DeepSpeed stepped; go on from the checkpoint "
                         "without DeepSpeed")  # fmt: skip
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        ids = [one for of_rank in self.runtime.from_all(posting_ids) for one in of_rank]
        if self.runtime.is_main:
            log.warning("step %d: left out on all ranks (%s); its postings: %s",
                        step, told, " ".join(ids))  # fmt: skip
        if progress.skipped_in_a_row >= self.config.max_skipped:
            raise Failed(
                f"step {step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient "
                f"that is no number ({told}; the log names their postings); lower lr or head.lr, "
                "or set precision fp32; the last checkpoint is whole"
            )


def _moving(encoder: nn.Module) -> list[torch.Tensor]:
    """The buffers that a forward pass in training moves."""
    kinds = (Neck, nn.modules.batchnorm._BatchNorm)
    modules = [m for m in encoder.modules() if isinstance(m, kinds) and m.training]
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def _rate(optimizer: Optimizer) -> float:
    return max(group["lr"] for group in optimizer.param_groups)
