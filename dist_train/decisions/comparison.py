"""Where matchers are compared: val rows choose their thresholds, the same test rows score them."""

import numpy as np
import pandas as pd
import torch

from dist_train.evaluation.f1_curve import f1_curve, pairs_per_item
from dist_train.evaluation.labelled import labelled_rows
from dist_train.evaluation.metrics import (
    bootstrap_interval,
    paired_difference,
    per_item_f1,
    precision_recall,
)
from dist_train.evaluation.scores import Difference, Kind, MatcherScore
from dist_train.matching.join import Pairs, pairs_in_memory
from dist_train.matching.vectors import ItemVectors

ScoredPairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""i, j and score (P,) of pairs within the rows of a split."""


class Comparison:
    """The labelled val and test rows of one catalogue, and the test scores of each matcher."""

    def __init__(self, items: pd.DataFrame) -> None:
        """`items`: columns split, label_group, photo_group; title for `titles`."""
        self.items = items
        self.rows = {split: labelled_rows(items, split) for split in ("val", "test")}
        labels = items.label_group.to_numpy(str)
        self.groups = {split: labels[rows] for split, rows in self.rows.items()}
        self.f1: dict[str, np.ndarray] = {}
        """By the name of a matcher, F1 of every test item (n,)."""

    def titles(self, split: str) -> np.ndarray:
        """Titles (n,) of the rows of `split`."""
        return self.items.title.to_numpy()[self.rows[split]]

    def pairs(self, vectors: ItemVectors) -> Pairs:
        """The best scored pairs within the rows of a split, whose vectors these are."""
        budget = max(pairs_per_item(groups) for groups in self.groups.values())
        return pairs_in_memory(vectors, torch.device("cpu"), budget)

    def score(
        self, name: str, kind: Kind, i: np.ndarray, j: np.ndarray, threshold: float | None = None
    ) -> MatcherScore:
        """The score of a matcher that accepts these pairs (P,) of test rows."""
        groups = self.groups["test"]
        f1 = self.f1[name] = per_item_f1(groups, i, j)
        low, high = bootstrap_interval(f1, groups)
        precision, recall = precision_recall(groups, i, j)
        return {
            "name": name,
            "kind": kind,
            "f1": float(f1.mean()),
            "low": low,
            "high": high,
            "precision": precision,
            "recall": recall,
            "threshold": threshold,
            "items": len(groups),
        }

    def score_at(self, name: str, kind: Kind, test: ScoredPairs, threshold: float) -> MatcherScore:
        """The score of a matcher that accepts the pairs from a threshold on."""
        i, j, score = test
        keep = score >= np.float32(threshold)
        return self.score(name, kind, i[keep], j[keep], float(threshold))

    def score_calibrated(
        self, name: str, kind: Kind, val: ScoredPairs, test: ScoredPairs
    ) -> MatcherScore:
        """As `score_at`, with the threshold that is best on the pairs of val rows."""
        return self.score_at(name, kind, test, f1_curve(self.groups["val"], *val).best()[0])

    def difference(self, ours: str, theirs: str) -> Difference:
        """The gain of one matcher over another on the same items, paired by product."""
        f1, low, high = paired_difference(self.f1[ours], self.f1[theirs], self.groups["test"])
        return {"f1": f1, "low": low, "high": high, "of": ours, "over": theirs}
