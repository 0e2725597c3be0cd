"""The stage match: scored pairs to the threshold, the matches and the groups."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.config.training import result_options
from dist_train.decisions.match_lists import read_postings, write_lists
from dist_train.decisions.threshold import Given, Threshold, decide_threshold, given_threshold
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import ITEMS
from dist_train.evaluation.labelled import labelled_rows
from dist_train.matching.pairs import PairSet, no_pairs
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import write_json

log = logging.getLogger(__name__)


def match(pairs: Path, out: Path, config: MatchConfig) -> Threshold:
    """Decide which pairs of a pairs directory are matches; returns threshold.json.

    One process does the work: under a launcher the others wait for the first.
    Raises BadInput when no threshold can be chosen, when the given one lies below the score floor
    of the pairs, or when `out` holds something else.
    """
    runtime = Runtime("cpu")
    pair_set, given = PairSet(pairs), given_threshold(config)
    items = pair_set.embedding.read_items(["split", "label_group", "photo_group"])
    if given.threshold is None and not len(labelled_rows(items, "val")):
        raise BadInput(
            "no val posting has a label_group to choose the threshold on; "
            "give one: --threshold T or --threshold-from FILE"
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
        if not done and runtime.is_main:
            _decide(pair_set, items, given, out)
        runtime.barrier()
    return Folder(out, stage.MATCHES).json("threshold.json")


def _decide(pair_set: PairSet, items: pd.DataFrame, given: Given, out: Path) -> None:
    """Read the pairs twice: for the threshold, then for the lists of matches."""
    is_val = np.isin(np.arange(len(items)), labelled_rows(items, "val"))
    degree, within_val = np.zeros(len(items), np.int64), [no_pairs(("i", "j", "score"))]
    for pairs in pair_set.batches():
        i, j = pairs.i.to_numpy(), pairs.j.to_numpy()
        np.add.at(degree, np.r_[i, j], 1)
        within_val.append(pairs[is_val[i] & is_val[j]])
    val_pairs = pd.concat(within_val, ignore_index=True)
    decided = decide_threshold(items, val_pairs, pair_set.score_floor, given)
    if decided["at_score_floor"]:
        log.warning(
            f"the best threshold lies at the score floor {pair_set.score_floor:.3f} of the pairs: "
            "join again with more --pairs-per-item, a better one may lie below"
        )
    decided["weights"] = pair_set.weights
    postings = read_postings(pair_set.embedding.folder.file(ITEMS))
    counts = write_lists(pair_set, out, postings, degree, decided["threshold"])
    write_json(out / "threshold.json", decided)
    names = ("matches.parquet", "groups.parquet", "submission.csv", "threshold.json")
    stage_files.finish(out, counts, [out / name for name in names])
    log.info(
        f"{out}: {counts['matches']} matching pairs of {counts['postings']} postings at threshold "
        f"{decided['threshold']:.4f} ({decided['source']})"
    )
