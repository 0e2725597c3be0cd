"""The end of a run: the encoder's folder and the manifest."""

import logging
from pathlib import Path

from dist_train.config import View
from dist_train.encoders.folder import save_encoder
from dist_train.runtime import Runtime
from dist_train.training.card import model_card
from dist_train.training.data import TrainingItems
from dist_train.training.setup import Training
from shards import stage_files

log = logging.getLogger(__name__)


def export(
    training: Training, view: View, items: TrainingItems, out: Path, runtime: Runtime
) -> None:
    """Write `out`/encoder, the best one where it was kept, else the last; finish the stage."""
    encoder, progress = training.judged_encoder(), training.progress
    runtime.check_newest(out)
    if runtime.is_main:
        step, scores = progress.validated, progress.scores
        if progress.best_weights:
            encoder.load_state_dict(progress.best_weights)
            step, scores = progress.best_step, progress.best
        if scores and progress.start and scores["f1"] < progress.start["f1"]:
            log.warning("val F1 %.4f after training is below the %.4f before: lower lr, or train "
                        "on more products", scores["f1"], progress.start["f1"])  # fmt: skip
        card = model_card(view, items, scores, progress, step)
        files = save_encoder(encoder, out / "encoder", card)
        counts = {"items": len(items.numbers), "classes": items.classes, "steps": items.steps}
        told = {"val": scores, "exported_step": step, "skipped": progress.skipped}
        stage_files.finish(out, counts | told, [*files, out / "metrics.jsonl"])
    runtime.barrier()
