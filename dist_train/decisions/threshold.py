"""The threshold: the best mean per-item F1 on the validation products, given, or from a file."""

import math
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.evaluation.f1_curve import SavedCurve, f1_curve
from dist_train.evaluation.labelled import labelled_rows
from shards.storage.errors import BadInput
from shards.storage.files import read_json

FORMAT = 3
Source = Literal["given", "file", "chosen"]


class Given(NamedTuple):
    """The threshold that the user gives, None where it is to be chosen, and where it is from."""

    threshold: float | None
    source: Source


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
    saved = read_json(config.threshold_from)
    threshold = saved.get("threshold") if isinstance(saved, dict) else None
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise BadInput(
            f"{config.threshold_from}: holds no threshold; give a match's threshold.json, or the "
            "number itself: --threshold T"
        )
    return Given(float(threshold), "file")


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
