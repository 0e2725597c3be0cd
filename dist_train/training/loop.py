"""The stage train: shards to a fine-tuned encoder."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dist_train import stage
from dist_train.config import TrainingOptions, View, result_options
from dist_train.encoders.batches import FEW, Batch, load
from dist_train.monitor.metrics import Metrics, scores_at
from dist_train.runtime import Clock, Runtime
from dist_train.training.card import model_card
from dist_train.training.checkpoint import Checkpoints
from dist_train.training.data import TrainingItems, training_items
from dist_train.training.export import export
from dist_train.training.head_start import start_centres
from dist_train.training.optimisation import clip_head
from dist_train.training.setup import Training, set_up
from dist_train.training.validation import ValidationItems, validation_items
from shards.errors import Failed, Stopped
from shards.location import Location
from shards.reader import ShardSet

log = logging.getLogger(__name__)


def train(view: View, shards: Location, out: Path, config: TrainingOptions) -> None:
    """Train the encoder of `view` on `shards` into the run `out`, or go on where it stopped.

    Raises BadInput for data or options that cannot work, and Stopped after a signal, when a
    checkpoint has been written and the same command goes on.
    """
    runtime = Runtime(config.device)
    shard_set = ShardSet(shards)
    options = {"view": view} | result_options(config)
    with runtime.stage(out, stage.RUN, options, stage.parents_for(out, shards=shards)) as done:
        if done:
            log.info("%s: already trained", out)
            return
        items = training_items(shard_set, view, config, runtime.world)
        training = set_up(view, config, items, runtime)
        scores = _Loop(training, items, validation_items(shard_set, view), out, runtime).run()
        card = model_card(view, config, items, scores)
        export(training.whole_encoder(), out, card, items, scores, runtime)


class _Loop:
    """One life of a run: from the newest checkpoint to the last step."""

    def __init__(
        self, training: Training, items: TrainingItems, validation: ValidationItems,
        out: Path, runtime: Runtime,
    ) -> None:  # fmt: skip
        self.training, self.items, self.validation = training, items, validation
        self.config, self.runtime, self.out = items.config, runtime, out
        self.checkpoints = Checkpoints(out, self.config.keep, runtime)

    def run(self) -> dict[str, float]:
        """Every step that is left; the scores of the last validation."""
        start = self.checkpoints.load_newest(self.training)
        self.metrics = Metrics(self.out, start) if self.runtime.is_main else None
        try:
            if start == 0 < self.items.steps:
                self._begin()
            self._steps(start, self.items.steps)
            return self._validate(self.items.steps)
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _begin(self) -> None:
        training = self.training
        start_centres(
            training.head, training.head_optimizer, training.whole_encoder, self.items, self.runtime
        )
        self._validate(0)

    def _steps(self, start: int, steps: int) -> None:
        rank, world = self.runtime.rank, self.runtime.world
        # Step by step: the start costs the same at any position.
        plans = (p for t in range(start, steps) for p in self.items.plans(t, t + 1, rank, world))
        inputs = self.training.encoder.inputs(getattr(self.config, "min_crop", None))
        batches = load(
            self.items.reader, inputs, plans, self.config.workers, stand_ins=self.items.numbers
        )
        clock, logged = Clock(), start
        self.start, self.unreadable = start, 0
        quiet = None if self.runtime.is_main else True
        bar = tqdm(range(start, steps), "train", steps, initial=start, unit="step", disable=quiet)
        for step in bar:
            values = self._step(step, batches)
            if (step + 1) % self.config.log_every == 0 or step + 1 == steps:
                self._log(step + 1, values, (step + 1 - logged) / clock.seconds())
                clock, logged = Clock(), step + 1
            if self._pause(step + 1):
                clock, logged = Clock(), step + 1

    def _step(self, step: int, batches: Any) -> dict[str, float]:
        """One optimizer step over the global batch; what is logged of it."""
        training, config = self.training, self.config
        # Dropout and the like are a function of the step, so a resumed run draws the same.
        torch.manual_seed((config.seed << 32) + step * self.runtime.world + self.runtime.rank)
        margin = training.schedule.apply(step)
        total, norms = 0.0, {}
        for _ in range(config.accumulation):
            batch: Batch = next(batches)
            self.unreadable += len(batch.unreadable)
            with training.accelerator.accumulate(training.prepared):
                vectors = training.prepared(*batch.inputs_on(self.runtime.device))
                labels = batch.class_ids.to(self.runtime.device)
                loss = training.head(vectors, labels, margin, step)
                if not math.isfinite(value := loss.item()):
                    raise Failed(_not_finite(step, value, batch.posting_ids))
                training.accelerator.backward(loss)
                total += value / config.accumulation
                if training.accelerator.sync_gradients:
                    norms = self._update()
        rates = {"lr": _rate(training.optimizer), "lr_head": _rate(training.head_optimizer)}
        return {"loss": total, "margin": margin} | rates | norms

    def _update(self) -> dict[str, float]:
        training, clip = self.training, self.config.clip
        norm = training.accelerator.clip_grad_norm_(training.prepared.parameters(), clip)
        head_norm = clip_head(training.head, clip)
        for optimizer in (training.optimizer, training.head_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        return {"grad_norm": float(norm or 0.0), "grad_norm_head": head_norm}

    def _log(self, step: int, values: dict[str, float], steps_a_second: float) -> None:
        rate = steps_a_second * self.config.batch_size
        values = values | {"samples_per_second": rate, "unreadable": self._unreadable(step)}
        log.info("step %d of %d: loss %.3f, %.1f samples/s", step, self.items.steps,
                 values["loss"], rate)  # fmt: skip
        if self.metrics is not None:
            self.metrics.write(step, "train", values)

    def _unreadable(self, step: int) -> float:
        """Broken items met since the start, over all ranks; above the budget all ranks stop."""
        broken = self.runtime.total(self.unreadable)
        served = (step - self.start) * self.config.batch_size
        if broken > max(FEW, self.config.max_unreadable * served):
            raise Failed(
                f"{self.out}: {broken:.0f} of {served} items served were broken (the log names "
                "them); look with dist-train verify, restore or pack again, or allow more with "
                "--max-unreadable"
            )
        return broken

    def _pause(self, step: int) -> bool:
        """Checkpoint, stop and validation between two steps; whether anything took time."""
        stopping = self.runtime.anyone_asked_to_stop()
        saving = stopping or step % self.config.checkpoint_every == 0 or step == self.items.steps
        if saving:
            self.checkpoints.save(self.training, step)
        if stopping:
            raise Stopped(f"{self.out}: stopped by a signal after step {step}, checkpoint written")
        every = self.config.validate_every * self.items.epoch_steps
        validating = every > 0 and step < self.items.steps and step // every > (step - 1) // every
        if validating:
            self._validate(step)
        return saving or validating

    def _validate(self, step: int) -> dict[str, float]:
        known = scores_at(self.out, step) if self.runtime.is_main else {}
        if known := self.runtime.tell_all(known):
            return known  # a run that was cut off after its last validation
        scores = self.validation.score(self.training.whole_encoder(), self.config, self.runtime)
        if scores:
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            log.info("step %d: val %s", step, told)
            if self.metrics is not None:
                self.metrics.write(step, "val", scores)
        return scores


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def _not_finite(step: int, value: float, posting_ids: list[str]) -> str:
    return (
        f"step {step}: loss is {value} on a batch with {', '.join(posting_ids[:4])}, …; "
        "lower lr or head.lr, or set precision fp32; the last checkpoint is whole"
    )
