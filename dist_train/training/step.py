"""One optimizer step over the global batch, taken by all ranks or by none."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dist_train.config.training import TrainingOptions
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import FEW, Batch
from dist_train.encoders.encoder import Neck
from dist_train.training.data import mix_of_step
from dist_train.training.optimisation import clip_head
from dist_train.training.setup import Training
from dist_train.training.sharded_state import uses_deepspeed
from shards.storage.errors import Failed

log = logging.getLogger(__name__)
STATISTICS = (Neck, nn.modules.batchnorm._BatchNorm)
"""Modules whose buffers move in a forward pass in training mode."""


@dataclass(frozen=True)
class Outcome:
    """What a step reports, equal on all ranks."""

    values: dict[str, float]
    """Loss over the global batch, gradient norms before clipping, margin, learning rates."""
    stopping: bool
    """A stop signal has reached some rank."""


class Stepper:
    """Takes the steps of one attempt at a run, each from the next batches of this rank."""

    def __init__(
        self,
        training: Training,
        config: TrainingOptions,
        batches: Iterator[Batch],
        runtime: Runtime,
    ) -> None:
        self.training, self.config = training, config
        self.batches, self.runtime = batches, runtime
        self._unreadable, self._buckets_fixed = 0, False

    def run_step(self, step: int) -> Outcome:
        """Take step number `step`; all ranks leave it out if its loss or a gradient is NaN or Inf.

        Raises Failed when that has happened `max_skipped` times in a row.
        """
        training, config, runtime = self.training, self.config, self.runtime
        prepared, progress, device = training.prepared, training.progress, runtime.device

        # Dropout is a function of (seed, step, rank), and so the same after a resume. Mixed into 32
        # bits, because torch's generator on CPUs drops the higher bits of a seed.
        mixed = np.random.SeedSequence((config.seed, step, runtime.rank))
        torch.manual_seed(int(mixed.generate_state(1)[0]))
        margin = training.schedule.apply(step)

        # A step that is left out must leave the batch statistics as they were, too.
        moving = [m for m in training.encoder.modules() if isinstance(m, STATISTICS) and m.training]
        buffers = [buffer for module in moving for buffer in module.buffers(recurse=False)]
        statistics = [(buffer, buffer.clone()) for buffer in buffers]

        # Forward and backward of every pass. DeepSpeed steps within the last backward, unless the
        # norm of its gradient is NaN or Inf; the head makes sure that it is when any rank's centres
        # have such a gradient.
        loss = torch.zeros((), dtype=torch.float64, device=device)
        posting_ids: list[str] = []
        for _ in range(config.accumulation):
            batch = next(self.batches)
            self._unreadable += len(batch.unreadable)
            posting_ids += batch.posting_ids
            inputs, labels = batch.inputs_on(device), batch.class_ids.to(device)
            mix = mix_of_step(config, inputs[0].shape[-1], step)
            if mix is not None:
                inputs = (mix.photos(inputs[0]),)
            if not self._buckets_fixed:
                fix_bucket_order(prepared, training.optimizer, inputs)
                self._buckets_fixed = True
            with training.accelerator.accumulate(prepared):
                vectors = prepared(*inputs)
                pass_loss = training.head(vectors, labels, margin, step)
                if mix is not None:
                    # A mixed photo also counts, in the other share, for its partner's class.
                    other = training.head(vectors, mix.partners(labels), margin, step)
                    pass_loss = mix.share * pass_loss + (1 - mix.share) * other
                training.accelerator.backward(pass_loss)
            loss += pass_loss.detach().double() / config.accumulation

        # Clip both gradients. The stop request rides along with the head's norm, and the one
        # transfer below is the only time in a step that the host waits for the device.
        norm = training.accelerator.clip_grad_norm_(prepared.parameters(), config.clip)
        stop = torch.full((1,), float(runtime.stop_requested()), device=device)
        head_norm = clip_head(training.head, config.clip, also_sum=stop)
        encoder_norm = torch.as_tensor(norm, dtype=torch.float64, device=device)
        on_host = torch.stack([loss, encoder_norm, head_norm, stop[0].double()]).tolist()
        names = ("loss", "grad_norm", "grad_norm_head")
        values, stopping = dict(zip(names, on_host[:3], strict=True)), on_host[3] > 0

        # Step, or leave the step out. Every rank has the same numbers and so decides alike.
        if all(math.isfinite(value) for value in values.values()):
            training.optimizer.step()
            training.head_optimizer.step()
            progress.updates += 1
            progress.skipped_in_a_row = 0
            if training.average is not None:
                training.average.update(training.complete_encoder(), progress.updates)
        else:
            for buffer, before in statistics:
                buffer.copy_(before)
            self._leave_out(step, values, posting_ids)
        for optimizer in (training.optimizer, training.head_optimizer):
            optimizer.zero_grad()

        values |= {
            "margin": margin,
            "skipped": progress.skipped,
            "lr": max(group["lr"] for group in training.optimizer.param_groups),
            "lr_head": max(group["lr"] for group in training.head_optimizer.param_groups),
        }
        return Outcome(values, stopping)

    def _leave_out(self, step: int, values: dict[str, float], posting_ids: list[str]) -> None:
        """Count and log a step that was left out; Failed after too many in a row."""
        progress = self.training.progress
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if uses_deepspeed() and not cast(Any, self.training.optimizer).step_was_skipped:
            raise Failed(
                f"step {step}: {figures}, but DeepSpeed stepped; continue from the checkpoint "
                "without DeepSpeed"
            )
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        ids = " ".join(one for of_rank in self.runtime.all_gather(posting_ids) for one in of_rank)
        if self.runtime.is_main:
            log.warning("step %d: left out on all ranks (%s); its postings: %s", step, figures, ids)
        if progress.skipped_in_a_row >= self.config.max_skipped:
            raise Failed(
                f"step {step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient "
                f"that is NaN or Inf ({figures}; the log names their postings); lower lr or "
                "head.lr, or set precision fp32; the last checkpoint is complete"
            )

    def check_unreadable(self, served: int) -> float:
        """Unreadable items among the `served`, over all ranks.

        Raises Failed on all ranks when they are more than the share `max_unreadable`.
        """
        unreadable = self.runtime.all_reduce_sum(self._unreadable)
        if unreadable > max(FEW, self.config.max_unreadable * served):
            raise Failed(
                f"{unreadable:.0f} of {served} items served were broken (the log names them); "
                "check with dist-train verify, restore or pack again, or allow more with "
                "--max-unreadable"
            )
        return unreadable


def fix_bucket_order(prepared: nn.Module, optimizer: Optimizer, inputs: Sequence[Any]) -> None:
    """Have DDP arrange its buckets now; weights, statistics and random numbers stay as they are.

    DDP rearranges them after the first backward pass, by the order in which gradients come. More
    than two ranks add a number up in an order that follows from its place in its bucket. Without
    this, the first step after a resume would differ in the last bit from the same step of a run
    that was not stopped.
    """
    if not isinstance(prepared, DistributedDataParallel):
        return
    device = next(prepared.parameters()).device
    kept = [(buffer, buffer.clone()) for buffer in prepared.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        (prepared(*inputs) * 0).sum().backward()
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    optimizer.zero_grad()
