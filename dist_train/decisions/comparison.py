"""Where matchers are compared: val rows choose their thresholds, the same test rows score them."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from dist_train.decisions.labelled import labelled_rows
from dist_train.evaluation.budget import pairs_per_item
from dist_train.evaluation.f1_curve import f1_curve
from dist_train.evaluation.metrics import (
    bootstrap_interval,
    paired_difference,
    per_item_f1,
    precision_recall,
)
from dist_train.matching.join import Pairs, pairs_in_memory
from dist_train.matching.vectors import ItemVectors

Scored = tuple[np.ndarray, np.ndarray, np.ndarray]
"""i, j and score (P,) of pairs among the rows of a split."""


class Bench:
    """The labelled val and test rows of one catalogue, and what each matcher made of them."""

    def __init__(self, items: pd.DataFrame) -> None:
        self.items = items
        self.rows = {split: labelled_rows(items, split) for split in ("val", "test")}
        labels = items.label_group.to_numpy(str)
        self.groups = {split: labels[rows] for split, rows in self.rows.items()}
        self.f1: dict[str, np.ndarray] = {}
        """Of each matcher by its name, F1 of every test item (n,)."""

    def titles(self, split: str) -> np.ndarray:
        """Titles (n,) of the rows of `split`."""
        return self.items.title.to_numpy()[self.rows[split]]

    def pairs(self, few: ItemVectors) -> Pairs:
        """The scored pairs among the rows of a split; `few` are the views of these rows."""
        budget = max(pairs_per_item(groups) for groups in self.groups.values())
        return pairs_in_memory(few, torch.device("cpu"), budget)

    def row(
        self, name: str, kind: str, i: np.ndarray, j: np.ndarray, threshold: float | None
    ) -> dict[str, Any]:
        """A line of the table for accepted pairs (P,) among the test rows."""
        groups = self.groups["test"]
        f1 = self.f1[name] = per_item_f1(groups, i, j)
        low, high = bootstrap_interval(f1, groups)
        precision, recall = precision_recall(groups, i, j)
        return {
            "name": name, "kind": kind, "f1": float(f1.mean()), "low": low, "high": high,
            "precision": precision, "recall": recall, "threshold": threshold,
            "items": len(groups),
        }  # fmt: skip

    def calibrated(self, name: str, kind: str, val: Scored, test: Scored) -> dict[str, Any]:
        """A line for scored pairs, the threshold chosen on val as ours is."""
        return self.at(name, kind, test, f1_curve(self.groups["val"], *val).best()[0])

    def at(self, name: str, kind: str, test: Scored, threshold: float) -> dict[str, Any]:
        """A line for scored pairs of the test rows at a threshold."""
        keep = test[2] >= np.float32(threshold)
        return self.row(name, kind, test[0][keep], test[1][keep], float(threshold))

    def difference(self, ours: str, theirs: str) -> dict[str, Any]:
        """What one matcher gains over another on the same items, paired by product."""
        found = paired_difference(self.f1[ours], self.f1[theirs], self.groups["test"])
        return dict(zip(("f1", "low", "high"), found, strict=True)) | {"of": ours, "over": theirs}
