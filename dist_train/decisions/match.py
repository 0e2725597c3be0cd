"""The stage match: scored pairs to the threshold, the matches and the groups."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig, result_options
from dist_train.decisions.labelled import labelled_rows, read_labels
from dist_train.decisions.match_lists import read_postings, write_lists
from dist_train.decisions.threshold import Given, check_given, decide_threshold, given_threshold
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime
from dist_train.matching.pairs import PairSet, no_pairs
from shards.storage import stage_files
from shards.storage.files import read_json, write_json

log = logging.getLogger(__name__)


def match(pairs: Path, out: Path, config: MatchConfig) -> dict[str, Any]:
    """Decide which pairs of a pairs directory are matches; what threshold.json says.

    It is the work of one process: of several under a launcher the others wait for the first.
    Raises BadInput when no threshold can be chosen, when the given one lies below the score floor
    of the pairs, or when `out` holds something else.
    """
    runtime = Runtime("cpu")
    pair_set, given = PairSet(pairs), given_threshold(config)
    labels = read_labels(pair_set.embedding)
    check_given(given, pair_set, labels)
    # What the file said when it was read: it may be written anew at any time.
    options = result_options(config) | {"threshold": given.threshold}
    with runtime.stage(out, stage.MATCHES, options, stage.parents_for(out, pairs=pairs)) as done:
        if not done and runtime.is_main:
            _decide(pair_set, labels, given, out)
        runtime.barrier()
    return read_json(out / "threshold.json")


def _decide(pair_set: PairSet, labels: pd.DataFrame, given: Given, out: Path) -> None:
    is_val = np.zeros(len(labels), bool)
    is_val[labelled_rows(labels, "val")] = True
    degree, among = np.zeros(len(labels), np.int64), [no_pairs(("i", "j", "score"))]
    for pairs in pair_set.batches():
        i, j = pairs.i.to_numpy(), pairs.j.to_numpy()
        np.add.at(degree, i, 1)
        np.add.at(degree, j, 1)
        among.append(pairs[is_val[i] & is_val[j]])
    floor = pair_set.score_floor
    chosen = decide_threshold(labels, pd.concat(among, ignore_index=True), floor, given)
    if chosen["at_floor"]:
        log.warning(
            "the best threshold lies at the score floor %.3f of the pairs: join again with more "
            "--pairs-per-item, a better one may lie below",
            floor,
        )
    chosen["weights"] = pair_set.weights
    postings = read_postings(pair_set.embedding / "items.parquet")
    counts = write_lists(pair_set, out, postings, degree, chosen["threshold"])
    write_json(out / "threshold.json", chosen)
    names = ("matches.parquet", "groups.parquet", "submission.csv", "threshold.json")
    counts = {"postings": len(postings.row)} | counts
    stage_files.finish(out, counts, [out / name for name in names])
    log.info(
        "%s: %d matching pairs among %d postings at threshold %.4f (%s)",
        out, counts["matches"], len(postings.row), chosen["threshold"], chosen["source"],
    )  # fmt: skip
