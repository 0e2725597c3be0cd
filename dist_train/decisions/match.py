"""The stage match: scored pairs to the threshold, the matches and the groups."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from dist_train.config.options import MatchConfig
from dist_train.config.training import result_options
from dist_train.decisions import pair_model
from dist_train.decisions.candidates import recall_by_source
from dist_train.decisions.grouping import Links, group_rows, linked_matches, links_of
from dist_train.decisions.match_lists import read_postings, write_groups, write_lists
from dist_train.decisions.pair_tables import write_tables
from dist_train.decisions.probabilities import ProbablePairs, check_columns, probable_pairs
from dist_train.decisions.threshold import (
    Given,
    QueryMatches,
    Threshold,
    check_same_score,
    decide_threshold,
    given_threshold,
    queries_of,
)
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import ITEMS
from dist_train.evaluation.f1_curve import F1Curve
from dist_train.evaluation.labelled import CatalogueLabels, scoring_obstacle
from dist_train.evaluation.scores import difference
from dist_train.matching.pairs import PairSet, no_pairs
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import sha256_json, write_json

SOURCES = {
    "given": "given",
    "file": "from a file",
    "chosen": "chosen on {items} val items of {products} products",
    "near-certain": "near-certain pairs alone, as no labels could choose it",
}
NEAR_CERTAIN = 0.95
"""The threshold where there is nothing to choose it on: near-duplicates reach it."""
log = logging.getLogger(__name__)


def match(pairs: Path, out: Path, config: MatchConfig) -> Threshold:
    """Decide which pairs of a pairs directory are matches; returns threshold.json.

    One process does the work: under a launcher the others wait for the first.
    Raises BadInput when the given threshold belongs to another score or lies below the score floor
    of the pairs, when the catalogue has no such column to compare, when the links name unknown
    postings or contradict one another, or when `out` holds something else; Stopped after a signal.
    """
    runtime = Runtime("cpu")
    pair_set, given = PairSet(pairs), given_threshold(config)
    check_same_score(given, config.threshold_from, pair_set.weights)
    items = pair_set.embedding.read_items(["split", "label_group", "photo_group"])
    queries = queries_of(items, pair_set.proof["pairs"])
    groups = items.label_group.to_numpy(str)[queries]
    if given.threshold is None and (obstacle := scoring_obstacle(groups)):
        certain = max(NEAR_CERTAIN, pair_set.score_floor)
        given = Given(certain, "near-certain", score_threshold=certain)
        log.warning(
            f"{pair_set.embedding.path}: no threshold can be chosen on the val split: {obstacle}; "
            f"only pairs that score {certain:.2f} or more are matches; for others give --threshold "
            "T or --threshold-from MATCHES"
        )
    lowest = given.score_threshold
    if lowest is not None and not pair_set.reaches(lowest):
        raise BadInput(
            f"{pairs}: holds the pairs that score {pair_set.score_floor} or more, the threshold "
            f"is {lowest}; join again into a new folder with --max-score-floor {lowest}, or give "
            "a higher threshold"
        )
    embedding = pair_set.embedding
    check_columns(embedding.path, embedding.carried, config.features)
    postings = embedding.read_items(["posting_id"], with_rejected=True)
    links = links_of(postings.posting_id, config)
    # What was read from files, because they may be replaced at any time.
    options: dict[str, Any] = result_options(config) | {
        "given_threshold": given.threshold,
        "links": [sha256_json(rows.tolist()) for rows in links],
        "model": None if given.model is None else sha256_json(asdict(given.model)),
    }
    with runtime.stage(out, stage.MATCHES, options, stage.parents_for(out, pairs=pairs)) as done:
        if not done:
            runtime.alone(out, _decide, pair_set, queries, given, config, links, out)
    return Folder(out, stage.MATCHES).json("threshold.json")


def _decide(
    pair_set: PairSet,
    queries: np.ndarray,
    given: Given,
    config: MatchConfig,
    links: Links,
    out: Path,
) -> None:
    """Decide by the score alone, then by the pair model if that is better; write what follows."""
    postings = read_postings(pair_set.embedding.folder.file(ITEMS))
    all_labels = pair_set.embedding.read_items(["label_group"], with_rejected=True).label_group
    labels, items = CatalogueLabels.of(all_labels), pair_set.proof["items"]
    is_query = np.zeros(items, bool)
    is_query[queries] = True
    degree, of_queries = np.zeros(items, np.int64), [no_pairs(("i", "j", "score"))]
    for pairs in pair_set.batches():
        i, j = pairs.i.to_numpy(), pairs.j.to_numpy()
        np.add.at(degree, np.r_[i, j], 1)
        of_queries.append(pairs[is_query[i] | is_query[j]])
    scored = QueryMatches.of(queries, labels, pd.concat(of_queries, ignore_index=True))
    by_score = given._replace(threshold=given.score_threshold)
    decided = decide_threshold(
        queries, labels, scored, pair_set.score_floor, by_score, config.precision
    )
    decided["weights"] = pair_set.weights
    probable, names = None, ["matches.parquet", "groups.parquet", "submission.csv"]
    if given.model is not None or not (config.plain or given.threshold is not None):
        probable = decide_by_model(pair_set, queries, labels, scored, decided, given, config)
    if probable is not None:
        i, j, _ = probable.candidates
        degree = np.bincount(i, minlength=items) + np.bincount(j, minlength=items)
        probable.model.save(out / pair_model.NAME)
        names += [pair_model.NAME, *write_tables(out, probable, decided, postings, links)]
    elif decided["at_score_floor"]:
        log.warning(
            f"the best threshold lies at the score floor {pair_set.score_floor:.3f} of the pairs: "
            "join again with more --pairs-per-item, a better one may lie below"
        )
    gain, by_f1 = decided["over_self_match"], given.source == "chosen" and config.precision is None
    if by_f1 and gain is not None and gain["low"] <= 0:
        log.warning(
            f"{pair_set.embedding.path}: the matches may be no better than no match at all: on "
            f"{decided['items']} val items the gain in mean F1 is {gain['f1']:+.4f} "
            f"({gain['low']:+.4f} to {gain['high']:+.4f}); train longer, label more "
            "products, or give --precision"
        )

    def accepted() -> Iterator[pd.DataFrame]:
        for batch in (probable or pair_set).batches():
            yield batch[batch.score >= np.float32(decided["threshold"])]

    counts = write_lists(linked_matches(accepted(), links), out, postings, degree)
    batches, lowest = pairs_to_group(pair_set, probable, scored, decided)
    group, decided["groups_cut"] = group_rows(
        batches, lowest, queries, labels, config.max_group, links
    )
    write_groups(out / "groups.parquet", postings, group)
    if len(blank := postings.names.filter(pc.match_substring_regex(postings.names, r"\s"))):
        log.warning(
            f"{out / 'submission.csv'}: {len(blank)} posting ids hold blanks, such as "
            f"{blank[0].as_py()!r}, and its lists part the ids by blanks; read matches.parquet"
        )
    write_json(out / "threshold.json", decided)
    stage_files.finish(out, counts, [out / name for name in (*names, "threshold.json")])
    log.info(
        f"{out}: {counts['matches']} matching pairs of {counts['postings']} postings at threshold "
        f"{decided['threshold']:.4f} of the {decided['form']} "
        f"({SOURCES[decided['source']].format(**decided)})"
    )


def pairs_to_group(
    pair_set: PairSet,
    probable: ProbablePairs | None,
    scored: QueryMatches,
    decided: Threshold,
) -> tuple[Iterator[pd.DataFrame], float]:
    """Pairs with their probabilities as columns i, j and score, and the lowest that a match has.

    By the score alone they are those of the val items' pairs of that score, where the threshold was
    chosen on these, if there are any. Else a match counts as sure and there are no other pairs.
    """
    threshold = np.float32(decided["threshold"])
    if probable is not None:
        return probable.batches(), decided["threshold"]
    scores, known = scored.probabilities()
    if decided["source"] != "chosen" or not len(scores):
        matches = (batch[batch.score >= threshold] for batch in pair_set.batches())
        return (batch.assign(score=1.0) for batch in matches), 1.0
    lowest = np.float32(np.interp(threshold, scores, known))

    def batches() -> Iterator[pd.DataFrame]:
        for batch in pair_set.batches():
            probability = np.interp(batch.score, scores, known).astype(np.float32)
            # Pairs below the threshold may have the same probability, and are no matches.
            others = np.minimum(probability, np.nextafter(lowest, np.float32(0)))
            yield batch.assign(score=np.where(batch.score >= threshold, probability, others))

    return batches(), float(lowest)


def decide_by_model(
    pair_set: PairSet,
    queries: np.ndarray,
    labels: CatalogueLabels,
    scored: QueryMatches,
    decided: Threshold,
    given: Given,
    config: MatchConfig,
) -> ProbablePairs | None:
    """The pairs with their probabilities if the pair model is to decide; `decided` is brought up.

    A model that is fitted here decides if the val items have a better F1 by it than by the score
    alone, each at its best threshold and the interval of the difference above 0; else `decided`
    says why not. One that the user gives decides in any case.
    """
    score_threshold = decided["score_threshold"]
    if config.precision is not None and decided["curve"] is not None:
        # Of so strict a threshold few items would have neighbours.
        score_threshold = float(np.float32(F1Curve.from_json(decided["curve"]).best()[0]))
    probable = probable_pairs(pair_set, queries, labels, score_threshold, config, given.model)
    if isinstance(probable, str):
        log.info(f"the score alone decides: {probable}")
        decided["no_model"] = probable
        return None
    is_query = np.zeros(pair_set.proof["items"], bool)
    is_query[queries] = True
    pairs = QueryMatches.of(queries, labels, probable.of_items(is_query))
    by_model = decide_threshold(queries, labels, pairs, 0.0, given, config.precision)
    sizes, groups, gain = labels.sizes[queries], labels.codes[queries], None
    if len(queries):
        ours, theirs = (
            matches.f1(F1Curve.from_json(curve).best()[0], sizes)
            for matches, curve in ((pairs, by_model["curve"]), (scored, decided["curve"]))
            if curve is not None
        )
        gain = difference(ours, theirs, groups, "pair model", "plain score")
    if given.model is None and gain is not None and gain["low"] <= 0:
        decided["no_model"] = (
            f"the pair model is no better on {len(queries)} val items: its gain in mean F1 is "
            f"{gain['f1']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
        )
        log.info(f"the score alone decides: {decided['no_model']}")
        return None
    recall = recall_by_source(probable.candidates, labels.codes[: len(is_query)])
    score_floor = decided["score_floor"]
    decided.update(by_model)
    decided["form"], decided["score_threshold"] = "pair model", score_threshold
    decided["score_floor"], decided["at_score_floor"] = score_floor, False
    decided["gain"] = gain
    decided["candidates"] = {"pairs": len(probable.probability), "recall": recall}
    return probable
