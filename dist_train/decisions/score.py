"""The stage evaluate: matches on the test products, beside the floors and other encoders."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.decisions.comparison import Bench
from dist_train.decisions.labelled import left_out, pairs_among
from dist_train.decisions.tables import accepted_pairs
from dist_train.distributed import stage
from dist_train.embedding.store import EmbeddingSet
from dist_train.evaluation.baselines import same_photo_pairs, title_pairs, title_scores
from dist_train.evaluation.fusion import choose_fusion, union_of_pairs
from dist_train.evaluation.metrics import per_item_f1
from dist_train.evaluation.strata import by_group_size
from dist_train.matching.pairs import PairSet
from dist_train.matching.vectors import ItemVectors, open_vectors, subset
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import read_json, write_json

FORMAT = 1
WORDS = "word TF-IDF"
WITH_WORDS = "text + TF-IDF"


def evaluate(matches: Path, compare: dict[str, Path] | None = None) -> dict[str, Any]:
    """Score a match directory on the test products and write its metrics.json; what it says.

    `compare` names embedding sets over the same shards that are scored the same way. Raises
    BadInput when no test posting has a label.
    """
    stage_files.open_finished(matches, stage.MATCHES)
    embeddings = EmbeddingSet(PairSet(stage.parent(matches, "pairs")).embedding)
    bench = Bench(embeddings.items)
    if not len(bench.rows["test"]):
        raise BadInput(
            f"{matches}: no test posting has a label_group, there is nothing to score on"
        )
    threshold = read_json(matches / "threshold.json")
    i, j = _decided(matches, embeddings, bench)
    ours = bench.row(_name_of(list(threshold["weights"])), "ours", i, j, threshold["threshold"])
    weight = threshold["weights"].get("image", 0.5) if len(threshold["weights"]) > 1 else 0.5
    rows = [*_floors(bench), *_branches(bench, embeddings, "", "branch", weight)]
    rows += _with_words(bench, embeddings)
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
        "differences": _differences(bench, [*rows, ours]),
        "by_group_size": _strata(bench, i, j),
    }
    write_json(matches / "metrics.json", metrics)
    return metrics


def _decided(matches: Path, embeddings: EmbeddingSet, bench: Bench) -> tuple[np.ndarray, ...]:
    row_of = pd.Series(embeddings.items.index, index=embeddings.items.posting_id)
    table = pd.read_parquet(matches / "matches.parquet")
    table = table[table.posting_id.isin(embeddings.items.posting_id[bench.rows["test"]])]
    pairs = accepted_pairs(table, row_of)
    i, j, _ = pairs_among(bench.rows["test"], pairs, len(embeddings.items))
    return i, j


def _floors(bench: Bench) -> Iterator[dict[str, Any]]:
    nothing = np.zeros(0, np.int64)
    yield bench.row("itself only", "floor", nothing, nothing, None)
    test = bench.items.iloc[bench.rows["test"]]
    if (test.sha256 != "").any():
        yield bench.row("same photo", "floor", *same_photo_pairs(test.phash.to_numpy()), None)
    if (test.title != "").any() and len(bench.rows["val"]):
        val, test = (title_pairs(bench.titles(split)) for split in ("val", "test"))
        yield bench.calibrated(WORDS, "floor", val, test)


def _branches(
    bench: Bench, embeddings: EmbeddingSet, prefix: str, kind: str, image_weight: float
) -> Iterator[dict[str, Any]]:
    """Each modality alone; of encoders to compare with, both together too."""
    if not len(bench.rows["val"]):
        return
    choices = [[modality] for modality in embeddings.views]
    if kind == "compare" and len(embeddings.views) > 1:
        choices.append(embeddings.views)
    if kind == "branch" and len(choices) == 1:
        return
    for names in choices:
        views = open_vectors(embeddings, names, image_weight)
        found = [bench.pairs(subset(views, bench.rows[split])) for split in ("val", "test")]
        val, test = ((pairs.i, pairs.j, pairs.score) for pairs in found)
        yield bench.calibrated(f"{prefix}{_name_of(names)}", kind, val, test)


def _with_words(bench: Bench, embeddings: EmbeddingSet) -> Iterator[dict[str, Any]]:
    """The text encoder's cosine and that of TF-IDF as one score, weight and threshold of val."""
    if "text" not in embeddings.views or WORDS not in bench.f1:
        return
    views = open_vectors(embeddings, ["text"], 0.5)
    val, test = (_both_scores(bench, views, split) for split in ("val", "test"))
    fusion = choose_fusion(bench.groups["val"], *val)
    i, j, *parts = test
    row = bench.at(WITH_WORDS, "branch", (i, j, fusion.score(*parts)), fusion.threshold)
    yield row | {"weight": fusion.weight}


def _both_scores(bench: Bench, views: ItemVectors, split: str) -> tuple[np.ndarray, ...]:
    """i, j and both scores (P,) of the pairs that either of the two finds."""
    few, titles = subset(views, bench.rows[split]), bench.titles(split)
    pairs, words = bench.pairs(few), title_pairs(titles)
    i, j = union_of_pairs((pairs.i, pairs.j), words[:2], items=len(titles))
    text = few.scores(i, j)["score"]
    both = ~np.isnan(text)  # a title that gave no vector
    i, j, text = i[both], j[both], text[both]
    return i, j, text, title_scores(titles, i, j)


def _differences(bench: Bench, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over every floor, each modality over the same of other encoders, fused over its parts."""
    ours = rows[-1]["name"]
    pairs = [(ours, row["name"]) for row in rows if row["kind"] == "floor"]
    pairs += [(name.rsplit(": ", 1)[-1], name) for row in rows
              if row["kind"] == "compare" and (name := row["name"])]  # fmt: skip
    pairs += [(WITH_WORDS, part) for part in (WORDS, "text")]
    return [bench.difference(*pair) for pair in pairs if bench.f1.keys() >= set(pair)]


def _same_items(path: Path, embeddings: EmbeddingSet) -> EmbeddingSet:
    other = EmbeddingSet(path)
    if not other.items.posting_id.equals(embeddings.items.posting_id):
        raise BadInput(f"{path}: is over another shard set than {embeddings.path}")
    return other


def _name_of(views: Sequence[str]) -> str:
    return " + ".join(views)


def _strata(bench: Bench, i: np.ndarray, j: np.ndarray) -> list[dict[str, Any]]:
    groups = bench.groups["test"]
    return by_group_size(groups, per_item_f1(groups, i, j)).to_dict("records")
