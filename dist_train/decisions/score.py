"""The stage evaluate: matches on the test products, beside baselines and other encoders."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.decisions.comparison import Comparison, ScoredPairs
from dist_train.distributed import stage
from dist_train.embedding.store import EmbeddingSet
from dist_train.evaluation.baselines import same_photo_pairs, title_pairs, title_scores
from dist_train.evaluation.fusion import choose_fusion, union_of_pairs
from dist_train.evaluation.metrics import by_group_size, per_item_f1
from dist_train.evaluation.scores import Difference, MatcherScore, Scores
from dist_train.matching.pairs import PairSet
from dist_train.matching.vectors import open_vectors, subset
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import read_json, write_json

FORMAT = 2
TFIDF = "word TF-IDF"
WITH_TFIDF = "text + TF-IDF"


def evaluate(matches: Path, compare: dict[str, Path] | None = None) -> Scores:
    """Score a match directory on the test products, write its metrics.json and return it.

    `compare` names embedding sets over the same shards that are scored the same way. Raises
    BadInput when no test posting has a label, or one of these sets is over other shards.
    """
    stage_files.open_finished(matches, stage.MATCHES)
    embeddings = EmbeddingSet(PairSet(stage.parent(matches, "pairs")).embedding)
    items = embeddings.items
    comparison = Comparison(items)
    groups = comparison.groups["test"]
    if not len(groups):
        raise BadInput(
            f"{matches}: no test posting has a label_group, there is nothing to score on"
        )
    decided = read_json(matches / "threshold.json")
    threshold, weights = decided["threshold"], decided["weights"]
    lists = pd.read_parquet(matches / "matches.parquet", columns=["posting_id", "matches"])
    i, j = accepted_pairs(lists, items.posting_id[comparison.rows["test"]])
    ours = comparison.score(" + ".join(weights), "ours", i, j, threshold)
    rows = list(_baselines(comparison))
    if len(comparison.rows["val"]):
        image_weight = weights.get("image", 0.5) if len(weights) > 1 else 0.5
        if len(embeddings.modalities) > 1:
            rows += _encoders(comparison, embeddings, image_weight)
        if "text" in embeddings.modalities and TFIDF in comparison.f1:
            rows.append(_text_with_tfidf(comparison, embeddings))
        for name, path in (compare or {}).items():
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
        "by_group_size": by_group_size(groups, per_item_f1(groups, i, j)),
    }
    write_json(matches / "metrics.json", scores)
    return scores


def accepted_pairs(
    lists: pd.DataFrame, posting_ids: pd.Series | pd.Index
) -> tuple[np.ndarray, np.ndarray]:
    """The decided pairs within some postings (n,): positions i < j in `posting_ids`, (P,) int64.

    lists: columns posting_id and matches, as in matches.parquet.
    """
    position = pd.Series(np.arange(len(posting_ids)), index=posting_ids)
    long = lists[lists.posting_id.isin(posting_ids)].explode("matches")
    i, j = (long[column].map(position).to_numpy() for column in ("posting_id", "matches"))
    keep = i < j
    return i[keep].astype(np.int64), j[keep].astype(np.int64)


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
    if other is not None and len(embeddings.modalities) > 1:
        choices.append(embeddings.modalities)
    for names in choices:
        vectors = open_vectors(embeddings, names, image_weight)
        found = [
            comparison.pairs(subset(vectors, comparison.rows[split])) for split in ("val", "test")
        ]
        val, test = ((pairs.i, pairs.j, pairs.score) for pairs in found)
        if other is None:
            yield comparison.score_calibrated(" + ".join(names), "modality", val, test)
        else:
            name = f"{other}: {' + '.join(names)}"
            yield comparison.score_calibrated(name, "compare", val, test)


def _text_with_tfidf(comparison: Comparison, embeddings: EmbeddingSet) -> MatcherScore:
    """The text encoder's cosine and that of TF-IDF as one score, weight and threshold of val."""
    vectors = open_vectors(embeddings, ["text"], 0.5)
    scored: dict[str, tuple[np.ndarray, ...]] = {}
    for split, rows in comparison.rows.items():
        # The pairs that either of the two finds, with both scores.
        few, titles = subset(vectors, rows), comparison.titles(split)
        pairs, words = comparison.pairs(few), title_pairs(titles)
        i, j = union_of_pairs((pairs.i, pairs.j), words[:2], items=len(titles))
        text = few.scores(i, j)["score"]
        known = ~np.isnan(text)  # a title may have no vector
        i, j = i[known], j[known]
        scored[split] = i, j, text[known], title_scores(titles, i, j)
    fusion = choose_fusion(comparison.groups["val"], *scored["val"])
    i, j, first, second = scored["test"]
    test: ScoredPairs = (i, j, fusion.score(first, second))
    row = comparison.score_at(WITH_TFIDF, "modality", test, fusion.threshold)
    row["weight"] = fusion.weight
    return row


def _differences(comparison: Comparison, rows: list[MatcherScore]) -> list[Difference]:
    """Ours over the baselines, each encoder over the same of others, fused over its two scores."""
    ours = rows[-1]["name"]
    pairs = [(ours, row["name"]) for row in rows if row["kind"] == "baseline"]
    others = [row["name"] for row in rows if row["kind"] == "compare"]
    pairs += [(name.rsplit(": ", 1)[-1], name) for name in others]
    pairs += [(WITH_TFIDF, name) for name in (TFIDF, "text")]
    return [comparison.difference(*pair) for pair in pairs if comparison.f1.keys() >= set(pair)]
