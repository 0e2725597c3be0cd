"""The threshold: the best mean per-item F1 on the validation products, given, or from a file."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.decisions.labelled import labelled_rows, pairs_among
from dist_train.evaluation.f1_curve import F1Curve, f1_curve
from dist_train.matching.pairs import PairSet
from shards.storage.errors import BadInput
from shards.storage.files import read_json

FORMAT = 2


class Given(NamedTuple):
    """The threshold that the user gives, None where it is to be chosen, and where it is from."""

    threshold: float | None
    source: str
    """given or file; chosen where there is none."""


def given_threshold(config: MatchConfig) -> Given:
    """The threshold of the options, read from its file now; BadInput names one that holds none.

    To be called once: the file may be written anew while the stage works.
    """
    if config.threshold_from is None:
        return Given(config.threshold, "chosen" if config.threshold is None else "given")
    told = read_json(config.threshold_from)
    threshold = told.get("threshold") if isinstance(told, dict) else None
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise BadInput(
            f"{config.threshold_from}: holds no threshold; give a match's threshold.json, or the "
            "number itself: --threshold T"
        )
    return Given(float(threshold), "file")


def check_given(given: Given, pairs: PairSet, items: pd.DataFrame) -> None:
    """Raise BadInput when nothing can be decided by the given threshold, or none can be chosen."""
    if given.threshold is None:
        if not len(labelled_rows(items, "val")):
            raise BadInput(
                "no val posting has a label_group to choose the threshold on; "
                "give one: --threshold T or --threshold-from FILE"
            )
    elif not pairs.reaches(given.threshold):
        raise BadInput(
            f"{pairs.path}: holds the pairs that score {pairs.score_floor} or more, the threshold "
            f"is {given.threshold}; join again into a new folder with --max-score-floor "
            f"{given.threshold}, or give a higher threshold"
        )


def decide_threshold(
    items: pd.DataFrame, pairs: pd.DataFrame, floor: float, given: Given
) -> dict[str, Any]:
    """What threshold.json says of the given threshold, or of the best; `pairs` i, j, score.

    `floor` is the score floor of the pairs; val items have labels where none is given.
    """
    rows = labelled_rows(items, "val")
    curve = _curve(items, rows, pairs) if len(rows) else None
    threshold = given.threshold
    if threshold is None:
        assert curve is not None
        threshold = curve.best()[0]
    return {
        "format": FORMAT,
        "threshold": float(np.float32(threshold)),
        "source": given.source,
        "objective": "mean per-item F1",
        "split": "val",
        "items": len(rows),
        "products": int(items.label_group[rows].nunique()),
        "f1": curve.at(threshold) if curve else None,
        "floor": floor,
        "at_floor": bool(curve and given.threshold is None and _at_floor(curve, threshold)),
        "curve": curve.thinned().as_json() if curve else None,
    }


def _curve(items: pd.DataFrame, rows: np.ndarray, pairs: pd.DataFrame) -> F1Curve:
    i, j, score = pairs_among(rows, pairs, len(items))
    return f1_curve(items.label_group.iloc[rows].to_numpy(str), i, j, score)


def _at_floor(curve: F1Curve, threshold: float) -> bool:
    """The best threshold is the last that was looked at: below the floor may be a better one."""
    return not len(curve.thresholds) or bool(threshold <= curve.thresholds[-1])
