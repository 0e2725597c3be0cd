"""The threshold: the best mean per-item F1 on the validation products, given, or from a file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.distributed.stage import MATCHES
from dist_train.evaluation.f1_curve import SavedCurve, f1_curve
from dist_train.evaluation.labelled import labelled_rows
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import read_json, sha256_file

FORMAT = 3
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
    """Labelled items of the split, of so many products."""
    products: int
    f1: float | None
    """At the threshold, on these items; None without any."""
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
        facts = stage_files.open_finished(path.parent, MATCHES)["files"].get(path.name)
        if facts and path.is_file() and sha256_file(path) != facts["sha256"]:
            raise Corrupt(f"{path}: is not as the match wrote it; match again")
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


def decide_threshold(
    items: pd.DataFrame, pairs: pd.DataFrame, score_floor: float, given: Given
) -> Threshold:
    """The given threshold, or the best one on val items, with its curve there.

    items: columns split, label_group and photo_group by vector row; pairs: columns i, j and score,
    from `score_floor` on, of which those of two val items count. Where no threshold is given, val
    items have labels.
    """
    rows = labelled_rows(items, "val")
    threshold, curve, at_score_floor = given.threshold, None, False
    if len(rows):
        place = pd.Index(rows)
        i, j = place.get_indexer(pairs.i), place.get_indexer(pairs.j)
        both, groups = (i >= 0) & (j >= 0), items.label_group.iloc[rows].to_numpy(str)
        curve = f1_curve(groups, i[both], j[both], pairs.score.to_numpy()[both])
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
        "items": len(rows),
        "products": int(items.label_group[rows].nunique()),
        "f1": curve.at(threshold) if curve else None,
        "score_floor": score_floor,
        "at_score_floor": at_score_floor,
        "curve": curve.as_json() if curve else None,
    }
