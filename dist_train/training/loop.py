"""The stage train: from a shard set to a fine-tuned encoder."""

import logging
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from dist_train.config.training import Modality, TrainingOptions, result_options
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import load
from dist_train.monitor.metrics import Meter, Metrics
from dist_train.training.checkpoint import Checkpoints
from dist_train.training.data import TrainingItems, training_items
from dist_train.training.export import export
from dist_train.training.head_setup import start_centres
from dist_train.training.setup import Training, set_up
from dist_train.training.sharded_state import compare_replicas
from dist_train.training.step import Stepper
from dist_train.training.validation import ValidationItems, Validator, validation_items
from shards.read.location import Location
from shards.read.shard_set import ShardSet
from shards.storage.errors import Stopped

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
        training = set_up(modality, config, items, runtime)
        fit(training, items, validation_items(shard_set, modality), out, runtime)
        export(training, modality, items, out, runtime)


def fit(
    training: Training,
    items: TrainingItems,
    validation: ValidationItems,
    out: Path,
    runtime: Runtime,
) -> None:
    """Take the steps that are left, from the newest checkpoint to the last step.

    Raises Stopped after a signal, with a checkpoint written.
    """
    config, last = items.config, items.steps
    checkpoints = Checkpoints(out, config.keep, runtime, config.grace)
    start = checkpoints.load_newest(training)
    with closing(Metrics(out, start, enabled=runtime.is_main)) as metrics:
        validator = Validator(training, items, validation, checkpoints, metrics)
        if start == 0 < last:
            start_centres(
                training.head, training.head_optimizer, training.complete_encoder, items, runtime
            )
        # Step 0 is validated for comparison; a later one where a signal or a kill came before it.
        if validator.is_due(start):
            validator.validate(start)
        if validator.should_stop_early():
            return  # an earlier attempt ended here, before the export

        # Planned step by step, so that starting costs the same at any position.
        plans = (
            plan
            for step in range(start, last)
            for plan in items.plans(step, step + 1, runtime.rank, runtime.world)
        )
        inputs = training.encoder.inputs(config)
        batches = load(items.reader, inputs, plans, config.workers, stand_ins=items.numbers)
        meter = Meter(runtime.device)
        stepper = Stepper(training, config, meter.timed_batches(batches), runtime)
        left = range(start, last)
        quiet = None if runtime.is_main else True  # None: shown on a terminal only
        for step in tqdm(left, "train", last, initial=start, unit="step", disable=quiet):
            with meter.step():
                outcome = stepper.run_step(step)
            taken = step + 1  # steps that the weights have now seen

            if taken % config.log_every == 0 or taken == last:
                unreadable = stepper.check_unreadable((taken - start) * config.batch_size)
                values = outcome.values | meter.read(config.batch_size)
                speed, wait = values["samples_per_second"], 100 * values["data_wait"]
                log.info(
                    "step %d of %d: loss %.3f, %.1f samples/s, %.0f %% of it waiting for data",
                    *(taken, last, values["loss"], speed, wait),
                )
                runtime.check_newest(out)
                metrics.write(taken, "train", values | {"unreadable": unreadable})

            # Replicas are compared before every checkpoint, so that none holds a corrupted weight.
            saving = outcome.stopping or taken == last or taken % config.checkpoint_every == 0
            if config.compare_every and (saving or taken % config.compare_every == 0):
                compare_replicas(training.encoder, runtime, taken)
            if saving:
                checkpoints.save(training, taken, metrics)
            if outcome.stopping:
                raise Stopped(f"{out}: stopped by a signal after step {taken}, checkpoint written")

            if validator.is_due(taken):
                validator.validate(taken)
            if validator.should_stop_early():
                log.info("no better for %d validations: training ends", config.patience)
                checkpoints.save(training, taken, metrics)
                break
