"""The model card that travels with an encoder: data, recipe, scores beside their floors."""

from dist_train.config import View, result_options
from dist_train.training.data import TrainingItems
from dist_train.training.progress import Progress

LOADERS = {
    "image": "timm.create_model('local-dir:FOLDER', pretrained=True)",
    "text": "transformers.AutoModel.from_pretrained('FOLDER')",
}


def model_card(
    view: View, items: TrainingItems, scores: dict[str, float], progress: Progress, step: int
) -> str:
    """Markdown: what it is, on what and how it was trained, how it scored and how to load it."""
    config = items.config
    weights = "moving average of the weights" if config.ema else "weights"
    return f"""# {view} encoder for product matching

Fine-tuned from `{config.encoder.model}`: the {weights} after step {step} of {items.steps}.

## Data

{len(items.numbers)} postings of {items.classes} products, the train split of the shard set \
`{items.fingerprint[:12]}`.

## Scores

{_scores(scores, progress)}

## Recipe

| option | value |
|---|---|
{_recipe(result_options(config))}

## Loading

The backbone opens with `{LOADERS[view]}`; its vectors pass through `neck.safetensors` (batch \
normalisation) and are scaled to length one. `preprocessing.json` tells what happens before it.
"""


def _scores(scores: dict[str, float], progress: Progress) -> str:
    if not scores:
        return "There were no validation products to score it on."
    rows = [("this encoder", scores)]
    if progress.start and scores is not progress.start:
        rows.append(("floor: the encoder before training", progress.start))
    floor = {"f1": scores["f1_itself_only"]}
    table = [_row(*row) for row in [*rows, ("floor: each posting matched with itself only", floor)]]
    return (
        f"On {scores['items']:.0f} validation postings of products it has not seen. Mean per-item "
        "F1 at the threshold that is best for these same postings, so a little flattered.\n\n"
        "| | F1 | threshold | recall@1 |\n|---|---:|---:|---:|\n" + "\n".join(table)
    )


def _row(name: str, scores: dict[str, float]) -> str:
    cells = (scores.get(key) for key in ("f1", "threshold", "recall_at_1"))
    told = " | ".join("–" if value is None else f"{value:.4f}" for value in cells)
    return f"| {name} | {told} |"


def _recipe(options: dict, under: str = "") -> str:
    rows = []
    for name, value in options.items():
        if isinstance(value, dict):
            rows.append(_recipe(value, f"{under}{name}."))
        else:
            rows.append(f"| {under}{name} | {value} |")
    return "\n".join(rows)
