"""The stage match: scored pairs to the threshold, the matches and the groups."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from dist_train.config.options import MatchConfig
from dist_train.config.training import result_options
from dist_train.decisions.match_lists import read_postings, write_lists
from dist_train.decisions.threshold import (
    Given,
    Threshold,
    check_same_score,
    decide_threshold,
    given_threshold,
    queries_of,
)
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import ITEMS
from dist_train.evaluation.labelled import CatalogueLabels, scoring_obstacle
from dist_train.matching.pairs import PairSet, no_pairs
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import write_json

SOURCES = {
    "given": "given",
    "file": "from a file",
    "chosen": "chosen on {items} val items of {products} products",
}
log = logging.getLogger(__name__)


def match(pairs: Path, out: Path, config: MatchConfig) -> Threshold:
    """Decide which pairs of a pairs directory are matches; returns threshold.json.

    One process does the work: under a launcher the others wait for the first.
    Raises BadInput when no threshold can be chosen, when the given one belongs to another score or
    lies below the score floor of the pairs, or when `out` holds something else; Stopped after a
    signal.
    """
    runtime = Runtime("cpu")
    pair_set, given = PairSet(pairs), given_threshold(config)
    check_same_score(given, config.threshold_from, pair_set.weights)
    items = pair_set.embedding.read_items(["split", "label_group", "photo_group"])
    queries = queries_of(items, pair_set.proof["pairs"])
    groups = items.label_group.to_numpy(str)[queries]
    if given.threshold is None and (obstacle := scoring_obstacle(groups)):
        raise BadInput(
            f"{pair_set.embedding.path}: no threshold can be chosen on the val split: {obstacle}; "
            "give one: --threshold T or --threshold-from MATCHES"
        )
    if given.threshold is not None and not pair_set.reaches(given.threshold):
        raise BadInput(
            f"{pairs}: holds the pairs that score {pair_set.score_floor} or more, the threshold "
            f"is {given.threshold}; join again into a new folder with --max-score-floor "
            f"{given.threshold}, or give a higher threshold"
        )
    # The number that was read from the file, because the file may be replaced at any time.
    options = result_options(config) | {"threshold": given.threshold}
    with runtime.stage(out, stage.MATCHES, options, stage.parents_for(out, pairs=pairs)) as done:
        if not done:
            runtime.alone(out, _decide, pair_set, queries, given, out)
    return Folder(out, stage.MATCHES).json("threshold.json")


def _decide(pair_set: PairSet, queries: np.ndarray, given: Given, out: Path) -> None:
    """Read the pairs twice: for the threshold, then for the lists of matches."""
    postings = read_postings(pair_set.embedding.folder.file(ITEMS))
    all_labels = pair_set.embedding.read_items(["label_group"], with_rejected=True).label_group
    is_query = np.zeros(len(postings.place), bool)
    is_query[queries] = True
    degree, of_queries = np.zeros(len(is_query), np.int64), [no_pairs(("i", "j", "score"))]
    for pairs in pair_set.batches():
        i, j = pairs.i.to_numpy(), pairs.j.to_numpy()
        np.add.at(degree, np.r_[i, j], 1)
        of_queries.append(pairs[is_query[i] | is_query[j]])
    query_pairs = pd.concat(of_queries, ignore_index=True)
    labels, score_floor = CatalogueLabels.of(all_labels), pair_set.score_floor
    decided = decide_threshold(queries, labels, query_pairs, score_floor, given)
    if decided["at_score_floor"]:
        log.warning(
            f"the best threshold lies at the score floor {score_floor:.3f} of the pairs: "
            "join again with more --pairs-per-item, a better one may lie below"
        )
    decided["weights"] = pair_set.weights
    counts = write_lists(pair_set, out, postings, degree, decided["threshold"])
    if len(blank := postings.names.filter(pc.match_substring_regex(postings.names, r"\s"))):
        log.warning(
            f"{out / 'submission.csv'}: {len(blank)} posting ids hold blanks, such as "
            f"{blank[0].as_py()!r}, and its lists part the ids by blanks; read matches.parquet"
        )
    write_json(out / "threshold.json", decided)
    names = ("matches.parquet", "groups.parquet", "submission.csv", "threshold.json")
    stage_files.finish(out, counts, [out / name for name in names])
    log.info(
        f"{out}: {counts['matches']} matching pairs of {counts['postings']} postings at threshold "
        f"{decided['threshold']:.4f} ({SOURCES[decided['source']].format(**decided)})"
    )
