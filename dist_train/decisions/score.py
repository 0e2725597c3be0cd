"""The stage evaluate: matches on the test products, beside the floors and other encoders."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dist_train import stage
from dist_train.decisions.labelled import labelled_rows, left_out, pairs_among
from dist_train.decisions.tables import accepted_pairs
from dist_train.embedding.store import EmbeddingSet
from dist_train.evaluation.f1_curve import f1_curve
from dist_train.evaluation.floors import same_photo_pairs, title_pairs
from dist_train.evaluation.metrics import bootstrap_interval, per_item_f1, precision_recall
from dist_train.evaluation.strata import by_group_size
from dist_train.matching.join import pairs_in_memory
from dist_train.matching.views import open_views, subset
from shards import stage_files
from shards.errors import BadInput
from shards.files import read_json, write_json

FORMAT = 1
PAIRS_PER_ITEM = 100.0
Scored = tuple[np.ndarray, np.ndarray, np.ndarray]


class _Bench:
    """The val rows that choose thresholds and the test rows that score, of one catalogue."""

    def __init__(self, items: pd.DataFrame) -> None:
        self.items = items
        self.rows = {split: labelled_rows(items, split) for split in ("val", "test")}
        labels = items.label_group.to_numpy(str)
        self.groups = {split: labels[rows] for split, rows in self.rows.items()}

    def row(
        self, name: str, kind: str, i: np.ndarray, j: np.ndarray, threshold: float | None
    ) -> dict[str, Any]:
        """A line of the table for accepted pairs (P,) among the test rows."""
        groups = self.groups["test"]
        f1 = per_item_f1(groups, i, j)
        low, high = bootstrap_interval(f1, groups)
        precision, recall = precision_recall(groups, i, j)
        return {
            "name": name, "kind": kind, "f1": float(f1.mean()), "low": low, "high": high,
            "precision": precision, "recall": recall, "threshold": threshold,
            "items": len(groups),
        }  # fmt: skip

    def calibrated(self, name: str, kind: str, val: Scored, test: Scored) -> dict[str, Any]:
        """A line for scored pairs, the threshold chosen on val as ours is."""
        threshold, _ = f1_curve(self.groups["val"], *val).best()
        keep = test[2] >= threshold
        return self.row(name, kind, test[0][keep], test[1][keep], float(threshold))


def evaluate(matches: Path, compare: dict[str, Path] | None = None) -> dict[str, Any]:
    """Score a match directory on the test products and write its metrics.json; what it says.

    `compare` names embedding sets over the same shards that are scored the same way. Raises
    BadInput when no test posting has a label.
    """
    stage_files.open_finished(matches, stage.MATCHES)
    embeddings = EmbeddingSet(stage.parent(matches, "embedding"))
    bench = _Bench(embeddings.items)
    if not len(bench.rows["test"]):
        raise BadInput(
            f"{matches}: no test posting has a label_group, there is nothing to score on"
        )
    threshold = read_json(matches / "threshold.json")
    i, j = _decided(matches, embeddings, bench)
    ours = bench.row(_name_of(list(threshold["weights"])), "ours", i, j, threshold["threshold"])
    weight = threshold["weights"].get("image", 0.5) if len(threshold["weights"]) > 1 else 0.5
    rows = [*_floors(bench), *_branches(bench, embeddings, "", "branch", weight)]
    if len(bench.rows["val"]):
        for name, path in (compare or {}).items():
            rows += _branches(bench, _same_items(path, embeddings), f"{name}: ", "compare", weight)
    metrics = {
        "format": FORMAT,
        "split": "test",
        "items": len(bench.rows["test"]),
        "products": len(np.unique(bench.groups["test"])),
        "threshold": threshold["threshold"],
        "left_out": left_out(embeddings.items, "test"),
        "rows": [*rows, ours],
        "by_group_size": _strata(bench, i, j),
    }
    write_json(matches / "metrics.json", metrics)
    return metrics


def _decided(matches: Path, embeddings: EmbeddingSet, bench: _Bench) -> tuple[np.ndarray, ...]:
    row_of = pd.Series(embeddings.items.index, index=embeddings.items.posting_id)
    table = pd.read_parquet(matches / "matches.parquet")
    table = table[table.posting_id.isin(embeddings.items.posting_id[bench.rows["test"]])]
    pairs = accepted_pairs(table, row_of)
    i, j, _ = pairs_among(bench.rows["test"], pairs, len(embeddings.items))
    return i, j


def _floors(bench: _Bench) -> Iterator[dict[str, Any]]:
    nothing = np.zeros(0, np.int64)
    yield bench.row("itself only", "floor", nothing, nothing, None)
    test = bench.items.iloc[bench.rows["test"]]
    if (test.sha256 != "").any():
        yield bench.row("same photo", "floor", *same_photo_pairs(test.phash.to_numpy()), None)
    if (test.title != "").any() and len(bench.rows["val"]):
        val = bench.items.iloc[bench.rows["val"]]
        scored = [title_pairs(table.title.to_numpy()) for table in (val, test)]
        yield bench.calibrated("word TF-IDF", "floor", *scored)


def _branches(
    bench: _Bench, embeddings: EmbeddingSet, prefix: str, kind: str, image_weight: float
) -> Iterator[dict[str, Any]]:
    """Each view alone; of encoders to compare with, both together too."""
    if not len(bench.rows["val"]):
        return
    choices = [[view] for view in embeddings.views]
    if kind == "compare" and len(embeddings.views) > 1:
        choices.append(embeddings.views)
    if kind == "branch" and len(choices) == 1:
        return
    for names in choices:
        views = open_views(embeddings, names, image_weight)
        scored = []
        for split in ("val", "test"):
            few = subset(views, bench.rows[split])
            pairs = pairs_in_memory(few, torch.device("cpu"), PAIRS_PER_ITEM)
            scored.append((pairs.i, pairs.j, pairs.score))
        yield bench.calibrated(f"{prefix}{_name_of(names)}", kind, *scored)


def _same_items(path: Path, embeddings: EmbeddingSet) -> EmbeddingSet:
    other = EmbeddingSet(path)
    if not other.items.posting_id.equals(embeddings.items.posting_id):
        raise BadInput(f"{path}: is over another shard set than {embeddings.path}")
    return other


def _name_of(views: Sequence[str]) -> str:
    return " + ".join(views)


def _strata(bench: _Bench, i: np.ndarray, j: np.ndarray) -> list[dict[str, Any]]:
    groups = bench.groups["test"]
    return by_group_size(groups, per_item_f1(groups, i, j)).to_dict("records")
