"""The threshold: the best mean per-item F1 of the validation items, given, or from a file.

Validation items are matched with the whole catalogue, as the file that is delivered will be.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.distributed.stage import MATCHES
from dist_train.evaluation.f1_curve import MOST_PAIRS, SavedCurve, f1_curve_of_queries
from dist_train.evaluation.labelled import CatalogueLabels, labelled_rows
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import read_json

FORMAT = 4
NAME = "threshold.json"
Source = Literal["given", "file", "chosen"]


class Given(NamedTuple):
    """The threshold that the user gives, None where it is to be chosen, and where it is from."""

    threshold: float | None
    source: Source
    weights: dict[str, float] | None = None
    """Weight of each modality in the score that the threshold of a file was chosen on."""


class Threshold(TypedDict):
    """threshold.json."""

    format: int
    threshold: float
    source: Source
    objective: str
    split: str
    items: int
    """Labelled items of the split that were matched, of so many products."""
    products: int
    postings: int
    """The catalogue that they were matched with, so many of its postings labelled."""
    labelled: int
    f1: float | None
    """At the threshold, of these items; None without any."""
    score_floor: float
    """The lowest score of the pairs that were joined."""
    at_score_floor: bool
    """The chosen threshold is the lowest score that was compared: a better one may be lower."""
    curve: SavedCurve | None
    weights: NotRequired[dict[str, float]]
    """Weight of each modality in the score; added by match."""


def given_threshold(config: MatchConfig) -> Given:
    """The threshold of the options, read from its file now; BadInput names one that holds none.

    To be called once: the file may be replaced while the stage runs.
    """
    if config.threshold_from is None:
        return Given(config.threshold, "chosen" if config.threshold is None else "given")
    path = _threshold_file(config.threshold_from)
    saved = read_json(path)
    threshold = saved.get("threshold") if isinstance(saved, dict) else None
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise BadInput(
            f"{path}: holds no threshold; give a match's threshold.json, or the number itself: "
            "--threshold T"
        )
    weights = saved.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(w, float) for w in weights.values()):
        raise BadInput(
            f"{path}: does not say which score its threshold belongs to (weights of image and "
            f"text); to use it all the same: --threshold {threshold}"
        )
    return Given(float(threshold), "file", weights)


def _threshold_file(path: Path) -> Path:
    """The threshold.json that `path` names: the file, its match directory, or that of a run.

    Raises BadInput for a directory without one, Corrupt if it is not as the match wrote it.
    """
    if path.is_dir():
        folder = path if (path / stage_files.STAGE).exists() else path / "matches"
        if not folder.is_dir():
            raise BadInput(f"{path}: no match directory, and no run that has one (matches/)")
        path = folder / NAME
    if (path.parent / stage_files.STAGE).exists():
        matches = Folder(path.parent, MATCHES)
        if path.name in matches.manifest["files"]:
            return matches.file(path.name)
    return path


def check_same_score(given: Given, path: Path | None, weights: Mapping[str, float]) -> None:
    """Raise BadInput if the threshold from `path` was chosen on a score of other weights."""
    theirs = given.weights
    if theirs is None or (
        theirs.keys() == weights.keys()
        and all(math.isclose(theirs[name], weights[name], abs_tol=1e-6) for name in theirs)
    ):
        return
    one, other = (
        " + ".join(f"{weight:.3g} {name}" for name, weight in score.items())
        for score in (theirs, weights)
    )
    raise BadInput(
        f"{path}: its threshold {given.threshold} belongs to the score {one}, here the score is "
        f"{other}; give the file of a match with the same modalities and weights, or leave it out "
        "to have a threshold chosen"
    )


def queries_of(items: pd.DataFrame, pairs: int) -> np.ndarray:
    """Rows (n,) of the val items that a threshold is chosen on, ascending.

    All of them, or the products of the lowest hashes of their labels, so that about MOST_PAIRS of
    the `pairs` of the catalogue are held in memory.
    items: columns split, label_group and photo_group by vector row.
    """
    rows = labelled_rows(items, "val")
    most = MOST_PAIRS * len(items) / max(2 * pairs, 1)
    if len(rows) > most:
        hashes = pd.util.hash_array(items.label_group[rows].to_numpy(object))
        rows = rows[hashes <= np.sort(hashes)[int(most)]]
    return rows


def decide_threshold(
    queries: np.ndarray,
    labels: CatalogueLabels,
    pairs: pd.DataFrame,
    score_floor: float,
    given: Given,
) -> Threshold:
    """The given threshold, or the best one of val items as queries, with its curve.

    queries: rows (n,) of val items, as `queries_of` has them; labels: of all postings, the items by
    vector row first; pairs: columns i, j and score, from `score_floor` on, all those of a query.
    Where no threshold is given there are queries.
    """
    threshold, curve, at_score_floor = given.threshold, None, False
    if len(queries):
        ends = pairs[["i", "j"]].to_numpy().T
        query, answer = pd.Index(queries).get_indexer(ends.ravel()), ends[::-1].ravel()
        counted = (query >= 0) & (labels.codes[answer] >= 0)
        query, answer = query[counted], answer[counted]
        score = np.tile(pairs.score.to_numpy(), 2)[counted]
        right = labels.codes[queries[query]] == labels.codes[answer]
        sizes = labels.sizes[queries]
        curve = f1_curve_of_queries(sizes, query, right, score, labels.times)
        if threshold is None:
            threshold, lowest = curve.best()[0], curve.thresholds[-1:]
            at_score_floor = not len(lowest) or bool(threshold <= lowest[0])
    assert threshold is not None
    return {
        "format": FORMAT,
        "threshold": float(np.float32(threshold)),
        "source": given.source,
        "objective": "mean per-item F1",
        "split": "val",
        "items": len(queries),
        "products": len(np.unique(labels.codes[queries])),
        "postings": len(labels.codes),
        "labelled": int((labels.codes >= 0).sum()),
        "f1": curve.at(threshold) if curve else None,
        "score_floor": score_floor,
        "at_score_floor": at_score_floor,
        "curve": curve.as_json() if curve else None,
    }
