"""The stage train: from a shard set to a fine-tuned encoder, step by step."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from dist_train.config.training import Modality, TrainingOptions, result_options
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import FEW, INTACT, Batch, load
from dist_train.monitor.metrics import Meter, Metrics
from dist_train.training.checkpoint import Checkpoints, grow_centres
from dist_train.training.data import mix_of_step, training_items
from dist_train.training.optimisation import clip_head
from dist_train.training.setup import STATISTICS, Training, set_up, start_centres
from dist_train.training.standstill import StandstillGuard, checksum
from dist_train.training.validation import ValidationItems, Validator, export
from shards.read.location import Location
from shards.read.shard_set import ShardSet
from shards.storage.errors import Failed, Stopped
from shards.storage.stops import stops_interrupt

log = logging.getLogger(__name__)


def train(modality: Modality, shards: Location, out: Path, config: TrainingOptions) -> None:
    """Train the encoder of the modality `modality` on `shards` into the run directory `out`.

    A run that was stopped continues from its newest checkpoint. Raises BadInput for data or
    options that cannot work, Failed when weights or files can no longer be trusted, and Stopped
    after a signal: the same command then continues.
    """
    runtime = Runtime(config.device)
    shard_set = ShardSet(shards)
    options = {"modality": modality} | result_options(config)
    with runtime.stage(out, stage.RUN, options, stage.parents_for(out, shards=shards)) as done:
        if done:
            log.info("%s: already trained", out)
            return
        items = training_items(shard_set, modality, config, runtime.world)
        training = set_up(items, runtime)
        fit(training, ValidationItems(shard_set, modality), out)
        export(training, modality, out)


@stops_interrupt(False)  # a step ends, and a checkpoint is written
def fit(training: Training, validation: ValidationItems, out: Path) -> None:
    """Take the steps that are left, from the newest checkpoint to the last step.

    Raises Stopped after a signal, with a checkpoint written.
    """
    items, runtime = training.items, training.runtime
    config, last = items.config, items.steps
    checkpoints = Checkpoints(out, config.keep, runtime, config.grace)
    start = checkpoints.load_newest(training)
    with closing(Metrics(out, start, enabled=runtime.is_main)) as metrics:
        validator = Validator(training, validation, checkpoints, metrics)
        if start == 0 < last:
            start_centres(training)
            grow_centres(training)
        # Step 0 is validated for comparison; a later one where a signal or a kill came before it.
        if validator.is_due(start):
            validator.validate(start)
        if start == last or validator.should_stop_early():
            return  # nothing is to be learned, or an earlier attempt ended before the export

        plans = items.plans(start, last, runtime.rank, runtime.world)
        batches = load(
            items.reader,
            training.encoder.inputs(config),
            plans,
            config.workers,
            stand_ins=items.numbers,
            refuse_damaged=not config.max_unreadable,
        )
        meter = Meter(runtime.device)
        stepper = Stepper(training, meter.timed_batches(batches))
        guard = StandstillGuard(training)
        left = range(start, last)
        quiet = None if runtime.is_main else True  # None: shown on a terminal only
        for step in tqdm(left, "train", last, initial=start, unit="step", disable=quiet):
            with meter.step():
                values, stopping = stepper.run_step(step)
            guard.note(values)
            taken = step + 1  # steps that the weights have now seen

            if taken % config.log_every == 0 or taken == last:
                guard.check(taken)
                unreadable = stepper.check_unreadable((taken - start) * config.batch_size)
                values |= meter.read(config.batch_size)
                speed, wait = values["samples_per_second"], 100 * values["data_wait"]
                log.info(
                    "step %d of %d: loss %.3f, %.1f samples/s, %.0f %% of it waiting for data",
                    *(taken, last, values["loss"], speed, wait),
                )
                runtime.check_newest(out)
                metrics.write(taken, "train", values | {"unreadable": unreadable})

            # Also before a checkpoint, so that none holds a corrupted weight; ZeRO-3 has no copies.
            saving = stopping or taken == last or taken % config.checkpoint_every == 0
            comparing = config.compare_every and training.gathered is None
            if comparing and (saving or taken % config.compare_every == 0):
                compare_replicas(training.encoder, runtime, taken)
            if saving:
                checkpoints.save(training, taken, metrics)
            if stopping:
                raise Stopped(f"{out}: stopped by a signal after step {taken}, checkpoint written")

            if validator.is_due(taken):
                validator.validate(taken)
            if validator.should_stop_early():
                log.info("no better for %d validations: training ends", config.patience)
                checkpoints.save(training, taken, metrics)
                break


class Stepper:
    """Takes the steps of one attempt at a run, each from the next batches of this rank."""

    def __init__(self, training: Training, batches: Iterator[Batch]) -> None:
        self.training, self.batches = training, batches
        self._unreadable, self._buckets_fixed = 0, False

    def run_step(self, step: int) -> tuple[dict[str, float], bool]:
        """Take step number `step`; all ranks leave it out if its loss or a gradient is NaN or Inf.

        Returns, equal on all ranks, its values (loss over the global batch, gradient norms before
        clipping, margin, learning rates) and whether a stop signal has reached some rank. Raises
        Failed when `max_skipped` steps in a row were left out.
        """
        training, config, runtime = self.training, self.training.items.config, self.training.runtime
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
        stop = torch.full((), float(runtime.stop_requested()), device=device)
        head_norm_and_stops = clip_head(training.head, config.clip, stop)
        encoder_norm = torch.as_tensor(norm, dtype=torch.float64, device=device)
        on_host = torch.stack([loss, encoder_norm, *head_norm_and_stops]).tolist()
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
        return values, stopping

    def _leave_out(self, step: int, values: dict[str, float], posting_ids: list[str]) -> None:
        """Count and log a step that was left out; Failed after too many in a row."""
        training, progress = self.training, self.training.progress
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if training.uses_deepspeed and not cast(Any, training.optimizer).step_was_skipped:
            raise Failed(
                f"step {step}: {figures}, but DeepSpeed stepped; continue from the checkpoint "
                "without DeepSpeed"
            )
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        gathered = training.runtime.all_gather(posting_ids)
        ids = " ".join(one for of_rank in gathered for one in of_rank)
        if training.runtime.is_main:
            log.warning("step %d: left out on all ranks (%s); its postings: %s", step, figures, ids)
        if progress.skipped_in_a_row >= training.items.config.max_skipped:
            raise Failed(
                f"step {step}: {progress.skipped_in_a_row} steps in a row had a loss or gradient "
                f"that is NaN or Inf ({figures}; the log names their postings); lower lr or "
                "head.lr, or set precision fp32; the last checkpoint is complete"
            )

    def check_unreadable(self, served: int) -> float:
        """Unreadable items of the `served` over all ranks; Failed on all if they are too many."""
        unreadable = self.training.runtime.all_reduce_sum(self._unreadable)
        if unreadable > max(FEW, (self.training.items.config.max_unreadable or INTACT) * served):
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
    for buffer, before in kept:
        buffer.copy_(before)
    optimizer.zero_grad()


def compare_replicas(encoder: nn.Module, runtime: Runtime, step: int) -> None:
    """Raise Failed, naming the ranks, when some have other weights than most (or than rank 0).

    Batch statistics inside the backbone, which differ between ranks by design, are not compared.
    """
    if runtime.world == 1:
        return
    sums = runtime.all_gather(checksum(encoder))
    right = max(sums, key=lambda one: (sums.count(one), one == sums[0]))
    others = [str(rank) for rank, one in enumerate(sums) if one != right]
    if others:
        raise Failed(
            f"after step {step} the encoder of rank {', '.join(others)} differs from that of the "
            "others: suspect the memory or the GPU of its machine (ranks count machine by "
            "machine); leave it out, and the same command goes on from the last checkpoint"
        )
