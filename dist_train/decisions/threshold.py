"""The threshold: the best mean per-item F1 of the validation items, given, or from a file.

Validation items are matched with the whole catalogue, as the file that is delivered will be.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from dist_train.config.options import MatchConfig
from dist_train.decisions import pair_model
from dist_train.decisions.pair_model import PairModel
from dist_train.distributed.stage import MATCHES
from dist_train.evaluation.f1_curve import MOST_PAIRS, SavedCurve, f1_curve_of_queries
from dist_train.evaluation.labelled import CatalogueLabels, labelled_rows
from dist_train.evaluation.metrics import scores_of_counts
from dist_train.evaluation.scores import Difference, difference
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import read_json

FORMAT = 5
NAME = "threshold.json"
Source = Literal["given", "file", "chosen", "near-certain"]
Form = Literal["score", "pair model"]


class CandidateFacts(TypedDict):
    """Candidate pairs, and the part of the labelled pairs of a product that each source found."""

    pairs: int
    recall: dict[str, float]


class Given(NamedTuple):
    """The threshold that the user gives, None where it is to be chosen, and where it is from."""

    threshold: float | None
    source: Source
    weights: dict[str, float] | None = None
    """Weight of each modality in the score that the threshold of a file was chosen on."""
    score_threshold: float | None = None
    """The threshold by the score alone: the same, but where a pair model of the file decides."""
    model: PairModel | None = None


class Threshold(TypedDict):
    """threshold.json."""

    format: int
    threshold: float
    """Lowest score of a match, or lowest probability where a pair model decides."""
    form: Form
    score_threshold: float
    """The threshold by the score alone."""
    no_model: str | None
    """Why the score alone decides."""
    gain: Difference | None
    """Mean F1 of the val items by the pair model over that by the score alone."""
    over_self_match: Difference | None
    """Mean F1 of the val items at the best threshold over that of matching nothing."""
    candidates: CandidateFacts | None
    """What the pair model compared."""
    groups_cut: float | None
    """Lowest mean probability of the pairs between two groups that were made one."""
    source: Source
    objective: str | None
    """What the threshold was chosen by, None where it was not."""
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
        source: Source = "chosen" if config.threshold is None else "given"
        return Given(config.threshold, source, score_threshold=config.threshold)
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
    if saved.get("form") != "pair model":
        return Given(float(threshold), "file", weights, float(threshold))
    by_score = saved.get("score_threshold")
    if not isinstance(by_score, float):
        raise BadInput(f"{path}: holds no score_threshold; give the file as its match wrote it")
    if config.plain:
        return Given(by_score, "file", weights, by_score)
    file = path.with_name(pair_model.NAME)
    model = pair_model.load(_as_written(file))
    # Whether the columns that it compares are compared here is known before any work.
    known = [name for name in model.features if not name.startswith("feature_")]
    model.check_features([*known, *(f"feature_{name}" for name in config.features)], file)
    return Given(float(threshold), "file", weights, by_score, model)


def _threshold_file(path: Path) -> Path:
    """The threshold.json that `path` names: the file, its match directory, or that of a run.

    Raises BadInput for a directory without one, Corrupt if it is not as the match wrote it.
    """
    if path.is_dir():
        folder = path if (path / stage_files.STAGE).exists() else path / "matches"
        if not folder.is_dir():
            raise BadInput(f"{path}: no match directory, and no run that has one (matches/)")
        path = folder / NAME
    return _as_written(path)


def _as_written(path: Path) -> Path:
    """The file, if it is as the match whose folder it lies in wrote it; else raises Corrupt."""
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


class QueryMatches(NamedTuple):
    """Pairs of queries with other postings, one from the side of each query."""

    query: np.ndarray
    """(P,) 0 to n - 1."""
    right: np.ndarray
    """(P,) bool: both have the same label."""
    wrong: np.ndarray
    """(P,) float64: by how much the pair counts as wrong. 1 where the labels differ; where the
    other posting has none, the part of such pairs that `wrong_shares` expects to be wrong."""
    score: np.ndarray
    """(P,) float32."""

    @classmethod
    def of(
        cls, queries: np.ndarray, labels: CatalogueLabels, pairs: pd.DataFrame
    ) -> "QueryMatches":
        """From columns i, j and score of pairs, all those of a query among them.

        queries: rows (n,), ascending; labels: of all postings, the items by vector row first.
        """
        ends = pairs[["i", "j"]].to_numpy().T
        query, answer = pd.Index(queries).get_indexer(ends.ravel()), ends[::-1].ravel()
        of_query = query >= 0
        query, code = query[of_query], labels.codes[answer[of_query]]
        score = np.tile(pairs.score.to_numpy(), 2)[of_query]
        right, unknown = code == labels.codes[queries[query]], code < 0
        wrong = (~right & ~unknown).astype(np.float64)
        wrong[unknown] = labels.wrong_shares(score, wrong > 0, unknown)
        return cls(query, right, wrong, score)

    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (K,), ascending, and the probability (K,) that a pair of each is one product.

        Isotonic regression: the probability never falls with the score.
        """
        counted = np.flatnonzero(self.right | (self.wrong > 0))
        scores, place = np.unique(self.score[counted], return_inverse=True)
        right = np.bincount(place, self.right[counted], len(scores))
        weight = right + np.bincount(place, self.wrong[counted], len(scores))
        return scores, isotonic_regression(right / weight, weights=weight).x

    def f1(self, threshold: float, sizes: np.ndarray) -> np.ndarray:
        """F1 (n,) of every query; sizes: (n,) of their products."""
        kept = self.score >= np.float32(threshold)
        right = np.bincount(self.query[kept & self.right], minlength=len(sizes))
        wrong = np.bincount(self.query[kept], self.wrong[kept], minlength=len(sizes))
        return scores_of_counts(right, wrong, sizes)[0]


def decide_threshold(
    queries: np.ndarray,
    labels: CatalogueLabels,
    pairs: QueryMatches,
    score_floor: float,
    given: Given,
    precision: float | None = None,
) -> Threshold:
    """The given threshold, or the best one of val items as queries, with its curve.

    queries: rows (n,) of val items, as `queries_of` has them; labels: of all postings, the items by
    vector row first; pairs: all those of the queries from `score_floor` on; precision: the mean
    precision that the threshold is to reach, in place of the best F1. Where no threshold is given
    there are queries.
    """
    threshold, curve, at_score_floor = given.threshold, None, False
    over_self_match: Difference | None = None
    if len(queries):
        sizes = labels.sizes[queries]
        curve = f1_curve_of_queries(sizes, *pairs)
        if threshold is None:
            found = curve.best() if precision is None else curve.precise(precision)
            threshold, lowest = found[0], curve.thresholds[-1:]
            at_score_floor = not len(lowest) or bool(threshold <= lowest[0])
        ours, alone = pairs.f1(curve.best()[0], sizes), 2.0 / (1.0 + sizes)
        products = labels.codes[queries]
        over_self_match = difference(ours, alone, products, "matches", "self-match")
    assert threshold is not None
    objective = None
    if given.source == "chosen":
        objective = "mean per-item F1" if precision is None else f"mean precision {precision}"
    return {
        "format": FORMAT,
        "threshold": float(np.float32(threshold)),
        "form": "score",
        "score_threshold": float(np.float32(threshold)),
        "no_model": None,
        "gain": None,
        "over_self_match": over_self_match,
        "candidates": None,
        "groups_cut": None,
        "source": given.source,
        "objective": objective,
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
