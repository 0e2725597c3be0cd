"""The end of a run: the encoder's folder and the manifest."""

from pathlib import Path

from dist_train.encoders.folder import Encoder, save_encoder
from dist_train.runtime import Runtime
from dist_train.training.data import TrainingItems
from shards import stage_files


def export(
    encoder: Encoder, out: Path, card: str, items: TrainingItems, scores: dict[str, float],
    runtime: Runtime,
) -> None:  # fmt: skip
    """Write `out`/encoder and finish the stage."""
    if runtime.is_main:
        files = save_encoder(encoder, out / "encoder", card)
        counts = {"items": len(items.numbers), "classes": items.classes, "steps": items.steps}
        stage_files.finish(out, counts | {"val": scores}, [*files, out / "metrics.jsonl"])
    runtime.barrier()
