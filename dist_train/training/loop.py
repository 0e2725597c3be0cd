"""The stage train: shards to a fine-tuned encoder."""

import logging
from pathlib import Path

from tqdm import tqdm

from dist_train import stage
from dist_train.config import TrainingOptions, View, result_options
from dist_train.encoders.batches import load
from dist_train.monitor.meter import Meter
from dist_train.monitor.metrics import Metrics
from dist_train.runtime import Runtime
from dist_train.training.checkpoint import Checkpoints
from dist_train.training.data import TrainingItems, training_items
from dist_train.training.export import export
from dist_train.training.head_start import start_centres
from dist_train.training.judge import Judge
from dist_train.training.replicas import compare_replicas
from dist_train.training.setup import Training, set_up
from dist_train.training.step import Stepper
from dist_train.training.validation import ValidationItems, validation_items
from shards.errors import Stopped
from shards.location import Location
from shards.reader import ShardSet

log = logging.getLogger(__name__)


def train(view: View, shards: Location, out: Path, config: TrainingOptions) -> None:
    """Train the encoder of `view` on `shards` into the run `out`, or go on where it stopped.

    Raises BadInput for data or options that cannot work, Failed when weights or files cannot be
    trusted any more, and Stopped after a signal, when the same command goes on.
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
        _Loop(training, items, validation_items(shard_set, view), out, runtime).run()
        export(training, view, items, out, runtime)


class _Loop:
    """One life of a run: from the newest checkpoint to the last step."""

    def __init__(
        self, training: Training, items: TrainingItems, validation: ValidationItems,
        out: Path, runtime: Runtime,
    ) -> None:  # fmt: skip
        self.training, self.items, self.validation = training, items, validation
        self.config, self.runtime, self.out = items.config, runtime, out
        self.checkpoints = Checkpoints(out, self.config.keep, runtime, self.config.grace)
        self.meter = Meter(runtime.device)

    def run(self) -> None:
        """Every step that is left, then a last validation."""
        self.start = self.checkpoints.load_newest(self.training)
        self.metrics = Metrics(self.out, self.start) if self.runtime.is_main else None
        self.judge = Judge(
            self.training, self.items, self.validation, self.out, self.runtime, self.metrics
        )  # fmt: skip
        try:
            if self.start == 0 < self.items.steps:
                self._begin()
            elif self.judge.is_due(self.start):
                self._validate(self.start)
            if not self.judge.has_seen_enough():
                self._steps()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _begin(self) -> None:
        training = self.training
        start_centres(
            training.head, training.head_optimizer, training.whole_encoder, self.items, self.runtime
        )
        self._validate(0)

    def _steps(self) -> None:
        rank, world, last = self.runtime.rank, self.runtime.world, self.items.steps
        left = range(self.start, last)
        # Step by step: the start costs the same at any position.
        plans = (plan for t in left for plan in self.items.plans(t, t + 1, rank, world))
        inputs = self.training.encoder.training_inputs(self.config)
        batches = load(
            self.items.reader, inputs, plans, self.config.workers, stand_ins=self.items.numbers
        )
        waited = self.meter.waited_for(batches)
        stepper = Stepper(self.training, self.config, waited, self.runtime)
        quiet = None if self.runtime.is_main else True
        for step in tqdm(left, "train", last, initial=self.start, unit="step", disable=quiet):
            with self.meter.step():
                outcome = stepper.take(step)
            if (step + 1) % self.config.log_every == 0 or step + 1 == last:
                self._log(step + 1, outcome.values, stepper)
            self._pause(step + 1, outcome.stopping)
            if self.judge.has_seen_enough():
                log.info("no better for %d validations: training ends", self.config.patience)
                self._save(step + 1)
                break

    def _log(self, step: int, values: dict[str, float], stepper: Stepper) -> None:
        broken = stepper.broken((step - self.start) * self.config.batch_size)
        values = values | self.meter.read(self.config.batch_size) | {"unreadable": broken}
        log.info("step %d of %d: loss %.3f, %.1f samples/s, %.0f %% of it waiting for data",
                 step, self.items.steps, values["loss"], values["samples_per_second"],
                 100 * values["data_wait"])  # fmt: skip
        self.runtime.check_newest(self.out)
        if self.metrics is not None:
            self.metrics.write(step, "train", values)

    def _pause(self, step: int, stopping: bool) -> None:
        """What is to be done between two steps: compare, save, stop, validate."""
        every, last = self.config.compare_every, step == self.items.steps
        saving = stopping or last or step % self.config.checkpoint_every == 0
        if every and (saving or step % every == 0):
            compare_replicas(self.training.encoder, self.runtime, step)
        if saving:
            self._save(step)
        if stopping:
            raise Stopped(f"{self.out}: stopped by a signal after step {step}, checkpoint written")
        if self.judge.is_due(step):
            self._validate(step)

    def _validate(self, step: int) -> None:
        if not self.judge.look(step):
            if step > 0:
                self._save(step)
            raise Stopped(f"{self.out}: stopped by a signal in the validation of step {step}")

    def _save(self, step: int) -> None:
        seconds = self.checkpoints.save(self.training, step)
        if self.metrics is not None and seconds:
            self.metrics.write(step, "save", {"seconds": seconds})
