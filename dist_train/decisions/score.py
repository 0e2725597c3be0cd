"""The stage evaluate: matches on the test products, beside baselines and other encoders."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dist_train.decisions.match_lists import read_matches
from dist_train.distributed import stage
from dist_train.embedding.store import EmbeddingSet
from dist_train.evaluation.baselines import same_photo_pairs, title_pairs, title_scores
from dist_train.evaluation.f1_curve import (
    choose_weight,
    f1_curve,
    pairs_per_item,
    weighted_mean,
)
from dist_train.evaluation.labelled import labelled_rows
from dist_train.evaluation.metrics import (
    bootstrap_interval,
    by_group_size,
    paired_difference,
    per_item_scores,
)
from dist_train.evaluation.scores import Difference, Kind, MatcherScore, Scores, write_scores
from dist_train.matching.join import pairs_in_memory
from dist_train.matching.pairs import PairSet
from dist_train.matching.vectors import ItemVectors, open_vectors, subset
from shards.read.location import Folder
from shards.storage.errors import BadInput

FORMAT = 3
TFIDF = "word TF-IDF"
WITH_TFIDF = "text + TF-IDF"
ScoredPairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""i, j and score (P,) of pairs within the rows of a split."""


def evaluate(matches: Path, compare: Mapping[str, Path] = {}) -> Scores:
    """Score a match directory on the test products, write its metrics.json and return it.

    `compare` names embedding sets over the same shards that are scored the same way. Raises
    BadInput when no test posting has a label, or one of these sets is over other shards.
    """
    folder = Folder(matches, stage.MATCHES)
    embeddings = PairSet(stage.parent(matches, "pairs")).embedding
    items = embeddings.items
    comparison = Comparison(items)
    groups = comparison.groups["test"]
    if not len(groups):
        raise BadInput(
            f"{matches}: no test posting has a label_group, there is nothing to score on"
        )
    decided = folder.json("threshold.json")
    threshold, weights = decided["threshold"], decided["weights"]
    test_ids = items.posting_id[comparison.rows["test"]]
    accepted = read_matches(folder.file("matches.parquet"), test_ids)
    pairs = accepted.i.to_numpy(), accepted.j.to_numpy()
    ours = comparison.score(" + ".join(weights), "ours", *pairs, threshold)
    f1 = comparison.f1[ours["name"]]
    rows = list(_baselines(comparison))
    if len(comparison.rows["val"]):
        image_weight = weights.get("image", 0.5) if len(weights) > 1 else 0.5
        if len(embeddings.modalities) > 1:
            rows += _encoders(comparison, embeddings, image_weight)
        if "text" in embeddings.modalities and TFIDF in comparison.f1:
            rows.append(_text_with_tfidf(comparison, embeddings))
        for name, path in compare.items():
            other = EmbeddingSet(path)
            if not other.items.posting_id.equals(items.posting_id):
                raise BadInput(f"{path}: is over another shard set than {embeddings.path}")
            rows += _encoders(comparison, other, image_weight, name)
    rows.append(ours)
    labelled = (items.split == "test") & (items.label_group != "")
    scores: Scores = {
        "format": FORMAT,
        "split": "test",
        "items": len(groups),
        "products": len(np.unique(groups)),
        "threshold": threshold,
        "left_out": int(labelled.sum()) - len(groups),
        "rows": rows,
        "differences": _differences(comparison, rows),
        "by_group_size": by_group_size(groups, f1),
    }
    return write_scores(folder, scores)


class Comparison:
    """The labelled rows: those of val choose thresholds, those of test score every matcher."""

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

    def pairs(self, vectors: ItemVectors) -> ScoredPairs:
        """The best scored pairs within the rows of a split, whose vectors these are."""
        budget = max(pairs_per_item(groups) for groups in self.groups.values())
        found = pairs_in_memory(vectors, torch.device("cpu"), budget)
        return found.i, found.j, found.score

    def score(
        self, name: str, kind: Kind, i: np.ndarray, j: np.ndarray, threshold: float | None = None
    ) -> MatcherScore:
        """The score of a matcher that accepts these pairs (P,) of test rows."""
        groups = self.groups["test"]
        f1, precision, recall = per_item_scores(groups, i, j)
        self.f1[name] = f1
        low, high = bootstrap_interval(f1, groups)
        return {
            "name": name,
            "kind": kind,
            "f1": float(f1.mean()),
            "low": low,
            "high": high,
            "precision": float(precision.mean()),
            "recall": float(recall.mean()),
            "threshold": threshold,
            "items": len(groups),
        }

    def score_calibrated(
        self, name: str, kind: Kind, val: ScoredPairs, test: ScoredPairs
    ) -> MatcherScore:
        """The score of a matcher from the threshold on that is best on its pairs of val rows."""
        threshold = f1_curve(self.groups["val"], *val).best()[0]
        i, j, score = test
        keep = score >= np.float32(threshold)
        return self.score(name, kind, i[keep], j[keep], threshold)


def _baselines(comparison: Comparison) -> Iterator[MatcherScore]:
    """Self-match, the same photo, and similar titles at the best val threshold."""
    nothing = np.zeros(0, np.int64)
    yield comparison.score("self-match", "baseline", nothing, nothing)
    test = comparison.items.iloc[comparison.rows["test"]]
    if (test.sha256 != "").any():
        i, j = same_photo_pairs(test.phash.to_numpy())
        yield comparison.score("same photo", "baseline", i, j)
    if (test.title != "").any() and len(comparison.rows["val"]):
        val_pairs, test_pairs = (title_pairs(comparison.titles(split)) for split in ("val", "test"))
        yield comparison.score_calibrated(TFIDF, "baseline", val_pairs, test_pairs)


def _encoders(
    comparison: Comparison, embeddings: EmbeddingSet, image_weight: float, other: str | None = None
) -> Iterator[MatcherScore]:
    """Each modality of an embedding set alone; of an `other` one, by name, all together too."""
    choices = [[modality] for modality in embeddings.modalities]
    if other is not None and len(choices) > 1:
        choices.append(embeddings.modalities)
    kind: Kind = "modality" if other is None else "compare"
    prefix = "" if other is None else f"{other}: "
    for names in choices:
        vectors = open_vectors(embeddings, names, image_weight)
        val, test = (comparison.pairs(subset(vectors, rows)) for rows in comparison.rows.values())
        yield comparison.score_calibrated(prefix + " + ".join(names), kind, val, test)


def _text_with_tfidf(comparison: Comparison, embeddings: EmbeddingSet) -> MatcherScore:
    """The text encoder's cosine and that of TF-IDF as one score, weight and threshold of val."""
    vectors = open_vectors(embeddings, ["text"], 0.5)
    scored = []
    for split, rows in comparison.rows.items():
        # The pairs that either of the two finds, with both scores.
        few, titles = subset(vectors, rows), comparison.titles(split)
        found = [i * len(titles) + j for i, j, _ in (comparison.pairs(few), title_pairs(titles))]
        i, j = np.divmod(np.unique(np.concatenate(found)), len(titles))
        text = few.scores(i, j)["score"]
        known = ~np.isnan(text)  # a title may have no vector
        i, j = i[known], j[known]
        scored.append((i, j, text[known], title_scores(titles, i, j)))
    weight = choose_weight(comparison.groups["val"], *scored[0])
    val, test = ((i, j, weighted_mean(weight, first, other)) for i, j, first, other in scored)
    row = comparison.score_calibrated(WITH_TFIDF, "modality", val, test)
    row["weight"] = weight
    return row


def _differences(comparison: Comparison, rows: list[MatcherScore]) -> list[Difference]:
    """Ours over the baselines, each encoder over the same of others, fused over its two scores."""
    ours, f1 = rows[-1]["name"], comparison.f1
    pairs = [(ours, row["name"]) for row in rows if row["kind"] == "baseline"]
    others = [row["name"] for row in rows if row["kind"] == "compare"]
    pairs += [(name.rsplit(": ", 1)[-1], name) for name in others]
    pairs += [(WITH_TFIDF, name) for name in (TFIDF, "text")]
    found: list[Difference] = []
    for of, over in pairs:
        if f1.keys() >= {of, over}:
            gain, low, high = paired_difference(f1[of], f1[over], comparison.groups["test"])
            found.append({"f1": gain, "low": low, "high": high, "of": of, "over": over})
    return found
