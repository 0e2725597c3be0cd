"""The stage evaluate: matches on the test products, beside baselines and other encoders."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dist_train.decisions.match_lists import iterate_matches, read_matches
from dist_train.decisions.metrics_file import write_scores
from dist_train.decisions.threshold import Threshold
from dist_train.distributed import stage
from dist_train.embedding.store import EmbeddingSet
from dist_train.evaluation.baselines import same_photo_pairs, title_pairs, title_scores
from dist_train.evaluation.f1_curve import (
    choose_weight,
    f1_curve,
    pairs_per_item,
    weighted_mean,
)
from dist_train.evaluation.labelled import CatalogueLabels, labelled_rows, scoring_obstacle
from dist_train.evaluation.metrics import (
    bootstrap_interval,
    by_group_size,
    per_item_scores,
    scores_of_counts,
)
from dist_train.evaluation.scores import (
    Delivered,
    Difference,
    Kind,
    MatcherScore,
    Scores,
    difference,
)
from dist_train.matching.join import pairs_in_memory
from dist_train.matching.pairs import PairSet
from dist_train.matching.vectors import ItemVectors, open_vectors, subset
from shards.read.location import Folder
from shards.storage.errors import BadInput
from shards.storage.files import corrupt_error, remove_abandoned
from shards.storage.stops import stops_interrupt

FORMAT = 3
TFIDF = "word TF-IDF"
WITH_TFIDF = "text + TF-IDF"
ScoredPairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""i, j and score (P,) of pairs within the rows of a split."""
PerItem = tuple[np.ndarray, np.ndarray, np.ndarray]
"""F1, precision and recall (n,) of items."""
log = logging.getLogger(__name__)


@stops_interrupt()
def evaluate(matches: Path, compare: Mapping[str, Path] = {}) -> Scores:
    """Score a match directory on the test products, write its metrics.json and return it.

    First its files as they are delivered, then matchers among the test items alone. `compare`
    names embedding sets over the same shards that are scored the same way. Without a row where all
    labelled test postings were rejected or share a photo with another split. Raises
    BadInput when no test posting has a label, or one of these sets is over other shards.
    """
    folder = Folder(matches, stage.MATCHES)
    remove_abandoned(matches)
    pair_set = PairSet(stage.parent(matches, "pairs"))
    embeddings = pair_set.embedding
    items = embeddings.items
    comparison = Comparison(items)
    groups = comparison.groups["test"]
    decided = folder.json("threshold.json")
    threshold, weights = decided["threshold"], decided["weights"]
    columns = ["posting_id", "split", "label_group", "photo_group", "phash"]
    postings = embeddings.read_items(columns, with_rejected=True)
    labelled = postings[(postings.split == "test") & (postings.label_group != "")]
    if not len(labelled):
        raise BadInput(
            f"{matches}: no test posting has a label_group, there is nothing to score on"
        )
    scores: Scores = {
        "format": FORMAT,
        "delivered": score_delivered(folder, postings, decided, pair_set),
        "split": "test",
        "items": len(groups),
        "products": len(np.unique(groups)),
        "threshold": threshold,
        "left_out": len(labelled) - len(labelled_rows(postings, "test")),
        "rows": [],
        "differences": [],
        "by_group_size": [],
    }
    if not len(groups):
        # The end of a pipeline over a catalogue that has test products: its report is to follow.
        log.warning(
            f"{matches}: none of the {len(labelled)} labelled test postings can be scored among "
            f"one another: {scores['left_out']} share a photo with another split, "
            f"{len(labelled) - scores['left_out']} were rejected"
        )
        return write_scores(folder, scores)
    if obstacle := scoring_obstacle(groups):
        log.warning(f"{matches}: the scores on the test split say nothing: {obstacle}")
    test_ids = items.posting_id[comparison.rows["test"]]
    accepted = read_matches(folder.file("matches.parquet"), test_ids)
    pairs = accepted.i.to_numpy(), accepted.j.to_numpy()
    by_score = decided["form"] == "score"
    name = " + ".join(weights) if by_score else "pair model"
    ours = comparison.score(name, "ours", *pairs, threshold)
    f1 = comparison.f1[ours["name"]]
    rows = list(_baselines(comparison))
    if comparison.calibrates:
        image_weight = weights.get("image", 0.5) if len(weights) > 1 else 0.5
        if len(embeddings.modalities) > 1 or not by_score:
            rows += _encoders(comparison, embeddings, image_weight, together=not by_score)
        if "text" in embeddings.modalities and TFIDF in comparison.f1:
            rows.append(_text_with_tfidf(comparison, embeddings))
        for name, path in compare.items():
            other = EmbeddingSet(path)
            if not other.items.posting_id.equals(items.posting_id):
                raise BadInput(f"{path}: is over another shard set than {embeddings.path}")
            rows += _encoders(comparison, other, image_weight, name)
    rows.append(ours)
    scores["rows"], scores["differences"] = rows, _differences(comparison, rows)
    scores["by_group_size"] = by_group_size(groups, f1)
    return write_scores(folder, scores)


def score_delivered(
    matches: Folder, postings: pd.DataFrame, decided: Threshold, pair_set: PairSet
) -> Delivered:
    """The scores of matches.parquet and groups.parquet against the labels of all postings.

    Every match of a test posting counts, of whatever split it is. Test postings that pack rejected
    count too; those with a near-duplicate in another split do not.
    postings: columns posting_id, split, label_group, photo_group and phash (M,), the items by
    vector row first.
    """
    labels, queries = CatalogueLabels.of(postings.label_group), labelled_rows(postings, "test")
    sizes, place = labels.sizes[queries], np.full(len(postings), -1)
    place[queries] = np.arange(len(queries))

    def counted(batches: Iterable[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
        """Right and wrong matches (n,) of the queries; batches: columns i of queries and j."""
        kinds = np.zeros((3, len(queries)), np.int64)
        for found in batches:
            found = found[(found.i != found.j) & (place[found.i] >= 0)]
            code = labels.codes[found.j]
            kind = np.where(code < 0, 2, code != labels.codes[found.i])
            np.add.at(kinds, (kind, place[found.i]), 1)
        right, wrong, unknown = kinds
        return right, labels.with_unknown(wrong, unknown)

    def from_both_sides() -> Iterator[pd.DataFrame]:
        for pairs in pair_set.batches():
            pairs = pairs[pairs.score >= np.float32(decided["score_threshold"])]
            yield from (pairs, pairs.rename(columns={"i": "j", "j": "i"}))

    by_score: dict[str, tuple[Kind, tuple[np.ndarray, np.ndarray]]] = {}
    if decided["form"] != "score":
        by_score["score alone"] = ("baseline", counted(from_both_sides()))
    listed = iterate_matches(matches.file("matches.parquet"), postings.posting_id)
    with corrupt_error(matches.file("groups.parquet")) as path:
        table = pd.read_parquet(path)
    group = table.set_index("posting_id").group_id.reindex(postings.posting_id).to_numpy()
    photo = pd.factorize(postings.phash.where(postings.phash != ""))[0]
    alone = np.full(len(postings), -1)
    counts: dict[str, tuple[Kind, tuple[np.ndarray, np.ndarray]]] = {
        "matches": ("ours", counted(listed)),
        "groups": ("groups", labels.counts_in_groups(queries, group)),
        **by_score,
        "same photo": ("baseline", labels.counts_in_groups(queries, photo)),
        "self-match": ("baseline", labels.counts_in_groups(queries, alone)),
    }
    rows, f1 = [], {}
    for name, (kind, of_kind) in counts.items() if len(queries) else ():
        scores = scores_of_counts(*of_kind, sizes)
        rows.append(matcher_score(name, kind, scores, labels.codes[queries]))
        f1[name] = scores[0]
    thresholds = {"matches": decided["threshold"], "score alone": decided["score_threshold"]}
    for row in rows:
        row["threshold"] = thresholds.get(row["name"])
    return {
        "postings": len(postings),
        "labelled": int((labels.codes >= 0).sum()),
        "items": len(queries),
        "products": len(np.unique(labels.codes[queries])),
        "largest_group": int(np.bincount(group).max()),
        "largest_product": int(labels.sizes.max()),
        "rows": rows,
        "differences": [
            difference(f1["matches"], f1[over], labels.codes[queries], "matches", over)
            for over in ("score alone", "self-match", "same photo", "groups")
            if over in f1
        ],
    }


def matcher_score(
    name: str, kind: Kind, scores: PerItem, groups: np.ndarray, threshold: float | None = None
) -> MatcherScore:
    """Means over items of the label groups (n,), with an interval of F1."""
    f1, precision, recall = scores
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
        "items": len(f1),
    }


class Comparison:
    """The labelled rows: those of val choose thresholds, those of test score every matcher."""

    def __init__(self, items: pd.DataFrame) -> None:
        """`items`: columns split, label_group, photo_group; title for `titles`."""
        self.items = items
        self.rows = {split: labelled_rows(items, split) for split in ("val", "test")}
        labels = items.label_group.to_numpy(str)
        self.groups = {split: labels[rows] for split, rows in self.rows.items()}
        self.calibrates = not scoring_obstacle(self.groups["val"])
        """Whether a threshold can be chosen on the rows of val."""
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
        scores = per_item_scores(self.groups["test"], i, j)
        self.f1[name] = scores[0]
        return matcher_score(name, kind, scores, self.groups["test"], threshold)

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
    if (test.title != "").any() and comparison.calibrates:
        val_pairs, test_pairs = (title_pairs(comparison.titles(split)) for split in ("val", "test"))
        yield comparison.score_calibrated(TFIDF, "baseline", val_pairs, test_pairs)


def _encoders(
    comparison: Comparison,
    embeddings: EmbeddingSet,
    image_weight: float,
    other: str | None = None,
    together: bool = True,
) -> Iterator[MatcherScore]:
    """Each modality of an embedding set alone, and all `together`; `other` names another set."""
    choices = [[modality] for modality in embeddings.modalities]
    if together and len(choices) > 1:
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
    groups = comparison.groups["test"]
    return [
        difference(f1[of], f1[over], groups, of, over)
        for of, over in pairs
        if f1.keys() >= {of, over}
    ]
