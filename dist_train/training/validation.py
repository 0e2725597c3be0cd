"""Validation: how good the encoder is on products it has not seen, F1 at the best threshold."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from dist_train.config.training import Modality, TrainingOptions
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import load, plan_batches, unit_vectors
from dist_train.encoders.encoder import Encoder
from dist_train.evaluation.f1_curve import f1_curve, pairs_per_item
from dist_train.evaluation.labelled import near_duplicates_across_splits
from dist_train.evaluation.metrics import recall_at_1
from dist_train.matching.join import Pairs, pairs_in_memory
from dist_train.matching.vectors import vectors_of_array
from dist_train.monitor.metrics import Metrics, read_metrics
from dist_train.training.checkpoint import Checkpoints
from dist_train.training.data import TrainingItems
from dist_train.training.setup import Training
from shards.read.shard_set import ItemReader, ShardSet
from shards.storage.errors import Stopped

SCORES_AT_ONCE = 4 << 20
"""Scores held in memory while the nearest items of some rows are searched."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationItems:
    """Items of the val split that have the modality, with their label groups (n,)."""

    reader: ItemReader
    numbers: np.ndarray
    """Item numbers in `reader`, ascending (n,)."""
    groups: np.ndarray

    def score(
        self, encoder: Encoder, config: TrainingOptions, runtime: Runtime
    ) -> dict[str, float] | None:
        """f1, its threshold, recall_at_1 and the baseline, equal on all ranks; empty without items.

        Each rank encodes its share of the batches. All ranks check for a stop signal after each
        round of batches; None when there was one.
        """
        if not len(self.numbers):
            return {}
        training = encoder.training
        encoder.eval()
        vectors = np.zeros((len(self.numbers), encoder.width), np.float32)
        plans = plan_batches(self.reader, self.numbers, config.batch_size)
        batches = load(self.reader, encoder.inputs(), runtime.share(plans), config.workers)
        stopping = False
        for _ in range(-(-len(plans) // runtime.world)):
            for items, unit in unit_vectors(encoder, batches, 1, runtime.device):
                vectors[np.searchsorted(self.numbers, items)] = unit
            if stopping := runtime.any_stop_requested():
                break
        encoder.train(training)
        if stopping:
            return None
        if runtime.world > 1:
            total = torch.from_numpy(vectors).to(runtime.device)
            dist.all_reduce(total)  # every row is zero on all ranks but one
            vectors = total.cpu().numpy()
        scores = self.score_vectors(vectors, runtime.device) if runtime.is_main else {}
        return runtime.broadcast(scores)

    def score_vectors(self, vectors: np.ndarray, device: torch.device) -> dict[str, float]:
        """The scores of unit vectors (n, D)."""
        budget = pairs_per_item(self.groups)
        pairs = pairs_in_memory(vectors_of_array(vectors), device, budget)
        curve = f1_curve(self.groups, pairs.i, pairs.j, pairs.score)
        threshold, f1 = curve.best()
        recall = recall_at_1(self.groups, nearest_items(vectors, pairs))
        scores = {"f1": f1, "threshold": float(threshold), "f1_self_match": curve.base}
        # Where every item is alone in its group there is no recall, and JSON has no NaN.
        known = {} if math.isnan(recall) else {"recall_at_1": recall}
        return scores | known | {"items": len(vectors)}


def validation_items(shards: ShardSet, modality: Modality) -> ValidationItems:
    """The val items of a shard set that have the modality `modality`.

    As in the final scores, those whose photo stands in another split are left out: an encoder that
    has memorised a photo would score too well.
    """
    table = shards.packed
    val = (table.split == "val") & table[f"has_{modality}"]
    leaked = val & near_duplicates_across_splits(table)
    if leaked.any():
        log.info(
            "val: %d of %d items have a near-duplicate in another split: left out of the scores",
            *(leaked.sum(), val.sum()),
        )
    kept = table[val & ~leaked]
    return ValidationItems(shards.reader(), kept.index.to_numpy(), kept.label_group.to_numpy(str))


def nearest_items(vectors: np.ndarray, pairs: Pairs) -> np.ndarray:
    """The nearest other item of each of N unit vectors (N, D): (N,) int64; -1 for a lone item.

    An item that occurs in the best-scored `pairs` has its nearest one there. The others are
    compared with all items, SCORES_AT_ONCE scores at a time.
    """
    query, other = np.concatenate([pairs.i, pairs.j]), np.concatenate([pairs.j, pairs.i])
    order = np.lexsort((other, -np.concatenate([pairs.score, pairs.score]), query))
    found, first = np.unique(query[order], return_index=True)
    nearest = np.full(len(vectors), -1, np.int64)
    nearest[found] = other[order][first]
    left = np.flatnonzero(nearest < 0) if len(vectors) > 1 else np.zeros(0, np.int64)
    step = max(1, SCORES_AT_ONCE // max(1, len(vectors)))
    for start in range(0, len(left), step):
        rows = left[start : start + step]
        scores = vectors[rows] @ vectors.T
        scores[np.arange(len(rows)), rows] = -np.inf
        nearest[rows] = scores.argmax(1)
    return nearest


@dataclass(frozen=True)
class Validator:
    """Validates the encoder during one attempt at a run; all ranks call it and decide alike."""

    training: Training
    items: TrainingItems
    validation: ValidationItems
    checkpoints: Checkpoints
    metrics: Metrics

    def is_due(self, step: int) -> bool:
        """Whether the encoder after `step` steps is to be validated and has not been."""
        every = self.items.config.validate_every * self.items.epoch_steps
        ends = step in (0, self.items.steps)
        due = ends or (every > 0 and step // every > (step - 1) // every)
        return due and self.training.progress.validated < step

    def validate(self, step: int) -> None:
        """Score the encoder of `step`, log the scores, and keep its weights if it is the best.

        Raises Stopped when a signal comes meanwhile, after writing a checkpoint.
        """
        progress, config = self.training.progress, self.items.config
        out, runtime = self.checkpoints.run, self.checkpoints.runtime
        encoder = self.training.encoder_to_validate()
        # An attempt that was cut off may have validated this step after its last checkpoint.
        rows = read_metrics(out) if runtime.is_main else []
        known = [row for row in rows if row["step"] == step and "val/f1" in row]
        found = known[0].items() if known else ()
        scores = runtime.broadcast({k[4:]: v for k, v in found if k.startswith("val/")})
        if not scores:
            scores = self.validation.score(encoder, config, runtime)
            if scores is None:
                if step > 0:
                    self.checkpoints.save(self.training, step, self.metrics)
                raise Stopped(f"{out}: stopped by a signal in the validation of step {step}")
            if scores:
                figures = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                log.info("step %d: val %s", step, figures)
                self.metrics.write(step, "val", scores)
        progress.validated, progress.scores = step, scores
        if step == 0:
            progress.start = scores
        if step == 0 or not scores:
            return
        if progress.best and scores["f1"] <= progress.best["f1"]:
            progress.without_better += 1
            return
        progress.best_step, progress.best, progress.without_better = step, scores, 0
        if config.keep_best and runtime.is_main:
            state = encoder.state_dict()
            progress.best_weights = {name: value.cpu().clone() for name, value in state.items()}

    def should_stop_early(self) -> bool:
        """Whether `patience` validations in a row were no better than the best."""
        return 0 < self.items.config.patience <= self.training.progress.without_better
