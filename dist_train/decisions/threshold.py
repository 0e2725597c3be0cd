"""The threshold: the best mean per-item F1 on the validation products, given, or from a file."""

import math
from typing import Any

import numpy as np
import pandas as pd

from dist_train.config import MatchConfig
from dist_train.decisions.labelled import labelled_rows, pairs_among
from dist_train.evaluation.f1_curve import F1Curve, f1_curve
from shards.errors import BadInput
from shards.files import read_json

FORMAT = 1


def decide_threshold(
    items: pd.DataFrame, pairs: pd.DataFrame, floor: float, config: MatchConfig
) -> dict[str, Any]:
    """What threshold.json says; `pairs` i, j, score down to `floor`.

    Raises BadInput when a threshold must be chosen and no val posting has a label.
    """
    rows = labelled_rows(items, "val")
    curve = _curve(items, rows, pairs) if len(rows) else None
    source, threshold = "file" if config.threshold_from else "given", given_threshold(config)
    if threshold is None:
        check_threshold(items, config)
        assert curve is not None
        source, threshold = "chosen", curve.best()[0]
    return {
        "format": FORMAT,
        "threshold": float(np.float32(threshold)),
        "source": source,
        "objective": "mean per-item F1",
        "split": "val",
        "items": len(rows),
        "products": int(items.label_group[rows].nunique()),
        "f1": curve.at(threshold) if curve else None,
        "floor": floor,
        "at_floor": bool(curve and source == "chosen" and _at_floor(curve, threshold)),
        "curve": curve.thinned().as_json() if curve else None,
    }


def check_threshold(items: pd.DataFrame, config: MatchConfig) -> None:
    """Raise BadInput when a threshold must be chosen and no val posting has a label."""
    if given_threshold(config) is None and not len(labelled_rows(items, "val")):
        raise BadInput(
            "no val posting has a label_group to choose the threshold on; "
            "give one: --threshold T or --threshold-from FILE"
        )


def given_threshold(config: MatchConfig) -> float | None:
    """The user's threshold, from a file or by itself; BadInput names a file that holds none."""
    if config.threshold_from is None:
        return config.threshold
    told = read_json(config.threshold_from)
    threshold = told.get("threshold") if isinstance(told, dict) else None
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise BadInput(f"{config.threshold_from}: holds no threshold; give a match's "
                       "threshold.json, or the number itself: --threshold T")  # fmt: skip
    return float(threshold)


def _curve(items: pd.DataFrame, rows: np.ndarray, pairs: pd.DataFrame) -> F1Curve:
    i, j, score = pairs_among(rows, pairs, len(items))
    return f1_curve(items.label_group.iloc[rows].to_numpy(str), i, j, score)


def _at_floor(curve: F1Curve, threshold: float) -> bool:
    """The best threshold is the last that was looked at: below the floor may be a better one."""
    return not len(curve.thresholds) or bool(threshold <= curve.thresholds[-1])
