"""The end of a run: the encoder's folder with its model card, and the manifest."""

import logging
from pathlib import Path

from dist_train.config.training import Modality, result_options
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.encoder import save_encoder
from dist_train.training.data import TrainingItems
from dist_train.training.setup import Progress, Training
from shards.storage import stage_files

LOADERS = {
    "image": "timm.create_model('local-dir:FOLDER', pretrained=True)",
    "text": "transformers.AutoModel.from_pretrained('FOLDER')",
}
log = logging.getLogger(__name__)


def export(
    training: Training, modality: Modality, items: TrainingItems, out: Path, runtime: Runtime
) -> None:
    """Write `out`/encoder, the best one if it was kept, else the last, and finish the stage."""
    encoder, progress = training.encoder_to_validate(), training.progress
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

Fine-tuned from `{config.encoder.model}`: the {weights} after step {step} of {items.steps}.

## Data

{len(items.numbers)} postings of {items.classes} products, the train split of the shard set \
`{items.fingerprint[:12]}`.

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
