"""How good the encoder is on products it has not seen, F1 at the best threshold; its export."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dist_train.config.training import Modality, TrainingOptions, result_options
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import load, plan_batches, unit_vectors
from dist_train.encoders.encoder import Encoder, save_encoder
from dist_train.evaluation.f1_curve import f1_curve, pairs_per_item
from dist_train.evaluation.labelled import near_duplicates_across_splits, scoring_obstacle
from dist_train.evaluation.metrics import recall_at_1
from dist_train.matching.join import Pairs, pairs_in_memory
from dist_train.matching.vectors import vectors_of_array
from dist_train.monitor.metrics import Metrics, read_metrics
from dist_train.training.checkpoint import Checkpoints
from dist_train.training.data import TrainingItems
from dist_train.training.setup import Progress, Training
from shards.read.shard_set import ShardSet
from shards.storage import stage_files
from shards.storage.errors import Stopped

SCORES_AT_ONCE = 4 << 20
"""Scores held in memory while the nearest items of some rows are searched."""
LOADERS = {
    "image": "timm.create_model('local-dir:FOLDER', pretrained=True)",
    "text": "transformers.AutoModel.from_pretrained('FOLDER')",
}
log = logging.getLogger(__name__)


class ValidationItems:
    """Items of the val split that have the modality: their `numbers` in `reader` and `groups` (n,).

    As in the final scores, those whose photo stands in another split are left out: an encoder that
    has memorised a photo would score too well.
    """

    def __init__(self, shards: ShardSet, modality: Modality) -> None:
        table = shards.packed
        val = (table.split == "val") & table[f"has_{modality}"]
        leaked = val & near_duplicates_across_splits(table)
        if leaked.any():
            log.info(
                "val: %d of %d items have a near-duplicate in another split: left out of the "
                "scores",
                *(leaked.sum(), val.sum()),
            )
        kept = table[val & ~leaked]
        self.reader, self.numbers = shards.reader(), kept.index.to_numpy()
        self.groups = kept.label_group.to_numpy(str)
        if obstacle := scoring_obstacle(self.groups):
            log.warning("val: the scores of this training say nothing: %s", obstacle)

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
        batches = load(
            self.reader,
            encoder.inputs(),
            runtime.share(plans),
            config.workers,
            refuse_damaged=not config.max_unreadable,
        )
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
        is_main, device = runtime.is_main, runtime.device
        return runtime.broadcast(score_vectors(self.groups, vectors, device) if is_main else {})


def score_vectors(
    groups: np.ndarray, vectors: np.ndarray, device: torch.device
) -> dict[str, float]:
    """The scores of unit vectors (n, D) of items of the label groups (n,)."""
    pairs = pairs_in_memory(vectors_of_array(vectors), device, pairs_per_item(groups))
    curve = f1_curve(groups, pairs.i, pairs.j, pairs.score)
    threshold, f1 = curve.best()
    recall = recall_at_1(groups, nearest_items(vectors, pairs))
    scores = {"f1": f1, "threshold": float(threshold), "f1_self_match": curve.base}
    # Where every item is alone in its group there is no recall, and JSON has no NaN.
    known = {} if math.isnan(recall) else {"recall_at_1": recall}
    return scores | known | {"items": len(vectors)}


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
    validation: ValidationItems
    checkpoints: Checkpoints
    metrics: Metrics

    def is_due(self, step: int) -> bool:
        """Whether the encoder after `step` steps is to be validated and has not been."""
        items, config = self.training.items, self.training.items.config
        every = config.validate_every * (items.order.positions / config.batch_size)
        due = step in (0, items.steps) or (every > 0 and step // every > (step - 1) // every)
        return due and self.training.progress.validated < step

    def validate(self, step: int) -> None:
        """Score the encoder of `step`, log the scores, and keep its weights if it is the best.

        Raises Stopped when a signal comes meanwhile, after writing a checkpoint.
        """
        progress, config = self.training.progress, self.training.items.config
        out, runtime = self.checkpoints.run, self.training.runtime
        encoder = self.training.encoder_to_validate()
        # An attempt that was cut off may have validated this step after its last checkpoint.
        rows = read_metrics(out) if runtime.is_main else []
        found = next((row for row in rows if row["step"] == step and "val/f1" in row), {})
        scores = runtime.broadcast({k[4:]: v for k, v in found.items() if k.startswith("val/")})
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
        elif scores and progress.best and scores["f1"] <= progress.best["f1"]:
            progress.without_better += 1
        elif scores:
            progress.best_step, progress.best, progress.without_better = step, scores, 0
            if config.keep_best and runtime.is_main:
                state = encoder.state_dict()
                progress.best_weights = {k: value.cpu().clone() for k, value in state.items()}

    def should_stop_early(self) -> bool:
        """Whether `patience` validations in a row were no better than the best."""
        return 0 < self.training.items.config.patience <= self.training.progress.without_better


def export(training: Training, modality: Modality, out: Path) -> None:
    """Write `out`/encoder, the best one if it was kept, else the last, and finish the stage."""
    items, runtime, progress = training.items, training.runtime, training.progress
    encoder = training.encoder_to_validate()
    runtime.check_newest(out)
    if runtime.is_main:
        step, scores = progress.validated, progress.scores
        if progress.best_weights:
            encoder.load_state_dict(progress.best_weights)
            step, scores = progress.best_step, progress.best
        if scores and progress.start and scores["f1"] < progress.start["f1"]:
            log.warning(
                "val F1 %.4f after training is below the %.4f before: lower lr, or train on more "
                "products",
                *(scores["f1"], progress.start["f1"]),
            )
        card = model_card(modality, items, scores, progress, step)
        files = save_encoder(encoder, out / "encoder", card)
        counts = {"items": len(items.numbers), "classes": items.classes, "steps": items.steps}
        results = {"val": scores, "exported_step": step, "skipped": progress.skipped}
        stage_files.finish(out, counts | results, [*files, out / "metrics.jsonl"])
    runtime.barrier()


def model_card(
    modality: Modality,
    items: TrainingItems,
    scores: dict[str, float],
    progress: Progress,
    step: int,
) -> str:
    """Markdown: what it is, on what and how it was trained, how it scored and how to load it."""
    config = items.config
    weights = "moving average of the weights" if config.ema else "weights"
    origin = f"Fine-tuned from `{config.encoder.model}`: the {weights} after step {step} of "
    origin += f"{items.steps}."
    data = f"{len(items.numbers)} postings of {items.classes} products, the train split of"
    if not items.steps:
        origin = f"`{config.encoder.model}` as it was, not trained."
        data = "None was trained on. The validation postings are of"
    if scores:
        rows = [("this encoder", scores)]
        if progress.start and scores is not progress.start:
            rows.append(("baseline: the encoder before training", progress.start))
        baseline = {"f1": scores["f1_self_match"]}
        rows.append(("baseline: each posting matched only with itself", baseline))
        table = []
        for name, row in rows:
            cells = (row.get(key) for key in ("f1", "threshold", "recall_at_1"))
            figures = " | ".join("–" if value is None else f"{value:.4f}" for value in cells)
            table.append(f"| {name} | {figures} |")
        results = (
            f"On {scores['items']:.0f} validation postings of products it has not seen. Mean "
            "per-item F1 at the threshold that is best for these same postings, so slightly "
            "optimistic.\n\n| | F1 | threshold | recall@1 |\n|---|---:|---:|---:|\n"
            + "\n".join(table)
        )
    else:
        results = "There were no validation products to score it on."
    return f"""# {modality} encoder for product matching

{origin}

## Data

{data} the shard set `{items.fingerprint[:12]}`.

## Scores

{results}

## Recipe

| option | value |
|---|---|
{_option_rows(result_options(config))}

## Loading

The backbone opens with `{LOADERS[modality]}`; its vectors pass through `neck.safetensors` (batch \
normalisation) and are scaled to length one. `preprocessing.json` describes what happens before it.
"""


def _option_rows(options: dict, prefix: str = "") -> str:
    """One table row an option, nested ones by their dotted name."""
    return "\n".join(
        _option_rows(value, f"{prefix}{name}.")
        if isinstance(value, dict)
        else f"| {prefix}{name} | {value} |"
        for name, value in options.items()
    )
