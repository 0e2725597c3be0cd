"""The model card that travels with an encoder."""

from dist_train.config import TrainingOptions, View
from dist_train.training.data import TrainingItems


def model_card(
    view: View, config: TrainingOptions, items: TrainingItems, scores: dict[str, float]
) -> str:
    """Markdown: what it is, on what it was trained, how it scored and how to load it."""
    loader = "timm.create_model('local-dir:FOLDER', pretrained=True)"
    if view == "text":
        loader = "transformers.AutoModel.from_pretrained('FOLDER')"
    return f"""# {view} encoder for product matching

Fine-tuned from `{config.encoder.model}` with a {config.head.loss} head (margin \
{config.head.margin}, scale {config.head.scale}) on {len(items.numbers)} postings of \
{items.classes} products, {items.steps} steps of {config.batch_size}.

{_scores(scores)}

The backbone opens with `{loader}`; its vectors pass through `neck.safetensors` (batch \
normalisation) and are scaled to length one. `preprocessing.json` tells what happens before it.
"""


def _scores(scores: dict[str, float]) -> str:
    if not scores:
        return "There were no validation products to score it on."
    return (
        f"On {scores['items']:.0f} validation postings of products it has not seen: mean per-item "
        f"F1 {scores['f1']:.4f} at the threshold {scores['threshold']:.3f} chosen on the same "
        f"postings (matching each with itself only: {scores['f1_itself_only']:.4f})."
    )
