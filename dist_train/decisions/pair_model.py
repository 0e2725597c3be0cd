"""The pair model: boosted trees that give the probability that a candidate pair is one product.

It is fitted on the candidate pairs of val queries by cross-fitting (Chernozhukov et al. 2018): the
products of the queries are dealt into folds, and the booster of a fold has seen no pair of its
queries. So the threshold, chosen on the same queries, is chosen on probabilities of pairs that the
boosters had not seen, as they will be for the rest of the catalogue.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, TypeGuard, TypeVar

import lightgbm
import numpy as np
import pandas as pd

from dist_train.decisions import booster_text
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import read_json, sha256_json, write_json

FORMAT = 1
NAME = "pair_model.json"
FOLDS = 5
ROUNDS = 200
LEAST_PRODUCTS = 20
"""Val products with two postings. Drawn from two catalogues four times each, the model of 20 always
gained in F1 on test products (0.03 to 0.13), that of 10 lost 0.10 once."""
PARAMETERS: dict[str, Any] = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 7,
    "min_data_in_leaf": 30,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "seed": 0,
    "deterministic": True,
    "force_row_wise": True,
    # One thread a booster: sums of several would depend on their number in the last bits.
    "num_threads": 1,
    "verbose": -1,
}


class FittedOn(TypedDict):
    """Val queries and their products; candidate pairs of these, and those of one product."""

    queries: int
    products: int
    pairs: int
    positives: int


def fold_of_products(labels: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """The fold (n,) int8 of each query by its label, a text or an integer, and by nothing else.

    A keyed hash, so that it depends neither on order nor on which products became val or queries,
    which other hashes of the label decide. Folds differ in size as those of a draw do.
    """
    texts = np.asarray(labels).astype(str).astype(object)
    return (pd.util.hash_array(texts, hash_key="pair model folds") % folds).astype(np.int8)


def monotone_of(name: str) -> int:
    """1 if a pair can only be more probable for more of the feature, -1 if less, 0 if either.

    A value beside the item's best, a rank or a mean of its neighbours has no such direction, as
    what it means depends on the value itself. Nor has a column of the user, such as the seller.
    """
    if name.startswith("feature_") or any(part in name for part in ("_gap_", "_rank_", "_mean_")):
        return 0
    if name.endswith("_conflicting"):
        return -1
    similar = name in ("words", "characters") or name.startswith(("score", "averaged"))
    return int(similar or name.endswith("_shared"))


@dataclass(frozen=True)
class PairModel:
    """FOLDS boosters over the same features; pair_model.json."""

    features: tuple[str, ...]
    monotone: tuple[int, ...]
    """(F,) of each feature, as `monotone_of` gives it."""
    boosters: tuple[str, ...]
    """The text of each, as LightGBM reads it."""
    fitted_on: FittedOn
    lightgbm_version: str = lightgbm.__version__
    """The version that fitted it."""

    def probabilities(self, features: pd.DataFrame, folds: np.ndarray | None = None) -> np.ndarray:
        """The probability (n,) float32 that each pair is one product, whatever the other rows are.

        features: (n, F or more) as in `fit`, in any order of columns; folds: (n, 2) int8 fold of
        each end, -1 for an end that is no val query, all of them if None. A pair of val queries is
        given the mean of the boosters of their folds, neither of which has seen it; every other
        pair that of all boosters. Raises BadInput for a feature that is missing.
        """
        table = self._table(features)
        shares = np.full((len(table), FOLDS), 1 / FOLDS)
        if folds is not None:
            ends = np.stack([(folds == fold).sum(axis=1) for fold in range(FOLDS)], axis=1)
            known = ends.any(axis=1)
            shares[known] = ends[known] / ends[known].sum(axis=1, keepdims=True)
        total = np.zeros(len(table))
        for booster, share in zip(self._boosters, shares.T, strict=True):
            if len(rows := np.flatnonzero(share)):
                total[rows] += share[rows] * booster.predict(table[rows])
        return total.astype(np.float32)

    def contributions(self, features: pd.DataFrame) -> pd.DataFrame:
        """How much each feature speaks for (above 0) or against a pair, (n, F) float32 log-odds.

        Tree SHAP (Lundberg et al. 2020), the mean over all boosters: a row and a constant sum to
        the mean of the boosters' log-odds. Some 25 times as slow as `probabilities`.
        """
        table = self._table(features)
        total = np.zeros(table.shape)
        for booster in self._boosters if len(table) else ():
            total += np.asarray(booster.predict(table, pred_contrib=True))[:, :-1]
        names = list(self.features)
        return pd.DataFrame((total / FOLDS).astype(np.float32), features.index, names)

    def check_features(self, names: Iterable[str], path: Path | None = None) -> None:
        """Raise BadInput, with the file of the model, unless all its features are among `names`."""
        known = set(names)
        if missing := [name for name in self.features if name not in known]:
            raise BadInput(
                f"{path or 'the pair model'}: needs features that are not known of this "
                f"catalogue: {', '.join(missing)}; give the model of a catalogue with the same "
                "modalities and --features, or none, so that one is fitted here"
            )

    def save(self, path: Path) -> None:
        """Write pair_model.json, atomically."""
        content = {"format": FORMAT, **asdict(self)}
        write_json(path, content | {"sha256": sha256_json(content)})

    def _table(self, features: pd.DataFrame) -> np.ndarray:
        self.check_features(features.columns)
        return features[list(self.features)].to_numpy(np.float32)

    @cached_property
    def _boosters(self) -> list[lightgbm.Booster]:
        return [lightgbm.Booster(model_str=text) for text in self.boosters]


def fit(
    features: pd.DataFrame,
    same: np.ndarray,
    folds: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    queries: int,
    products: int,
    threads: int = 1,
) -> PairModel:
    """Fit the booster of each fold on the pairs none of whose ends is in it.

    features: (n, F) float32, NaN for unknown, no two names alike; same: (n,) bool; folds: (n, 2)
    int8 fold of each end, -1 for an end that is no val query; pairs without a val query are left
    out; weight: (n,) how much each pair counts, 1 if None; queries, products: how many val queries
    these are, to be kept; threads: how many boosters are fitted at once, which changes no bit.
    Raises ValueError where a booster would see no pair of one product, or no other.
    """
    names = tuple(map(str, features.columns))
    monotone = tuple(map(monotone_of, names))
    table, labels = features.to_numpy(np.float32), np.asarray(same, bool)

    def booster(fold: int) -> str:
        rows = _outside(folds, fold)
        if len(np.unique(labels[rows])) < 2:
            raise ValueError(f"fold {fold} leaves no pair of one product, or only such pairs")
        data = lightgbm.Dataset(
            table[rows], labels[rows], weight=None if weight is None else weight[rows]
        )
        fitted = lightgbm.train(PARAMETERS | {"monotone_constraints": monotone}, data, ROUNDS)
        return booster_text.render(booster_text.trees_of(fitted.model_to_string()), monotone)

    with ThreadPoolExecutor(threads) as pool:
        boosters = tuple(pool.map(booster, range(FOLDS)))
    used = (folds >= 0).any(axis=1)
    pairs, positives = int(used.sum()), int(labels[used].sum())
    fitted_on = FittedOn(queries=queries, products=products, pairs=pairs, positives=positives)
    return PairModel(names, monotone, boosters, fitted_on)


def _outside(folds: np.ndarray, fold: int) -> np.ndarray:
    """The pairs (n,) with a val query that have none of this fold."""
    return np.flatnonzero((folds >= 0).any(axis=1) & (folds != fold).all(axis=1))


def load(path: Path) -> PairModel:
    """The model of a pair_model.json.

    Raises BadInput if it is missing or of another format, Corrupt if it is not as `save` wrote it.
    """
    saved = read_json(path)
    if not isinstance(saved, dict) or "boosters" not in saved:
        raise BadInput(f"{path}: is not a pair model; give the {NAME} of a match")
    if saved.get("format") != FORMAT:
        raise BadInput(
            f"{path}: is of format {saved.get('format')}, this version reads {FORMAT}; match its "
            "catalogue again with this version"
        )
    if fault := _fault_of(saved):
        raise Corrupt(f"{path}: {fault}; take it from its match again, or match again")
    return PairModel(
        tuple(saved["features"]),
        tuple(saved["monotone"]),
        tuple(saved["boosters"]),
        saved["fitted_on"],
        saved["lightgbm_version"],
    )


def _fault_of(saved: dict[str, Any]) -> str:
    """What is wrong with the content of a file of this format, "" for nothing."""
    content = {name: value for name, value in saved.items() if name != "sha256"}
    if saved.get("sha256") != sha256_json(content):
        return "is not as the match wrote it"
    names, monotone, boosters, fitted_on = (
        saved.get(name) for name in ("features", "monotone", "boosters", "fitted_on")
    )
    if not _all(names, str) or not names or len(set(names)) < len(names):
        return "features are not different names"
    if not _all(monotone, int) or len(monotone) != len(names) or not {*monotone} <= {-1, 0, 1}:
        return "monotone is not -1, 0 or 1 for each feature"
    if not _all(boosters, str) or len(boosters) != FOLDS:
        return f"boosters are not {FOLDS} texts"
    counts = fitted_on if isinstance(fitted_on, dict) else {}
    if counts.keys() != FittedOn.__annotations__.keys() or not _all([*counts.values()], int):
        return f"fitted_on is not the number of {', '.join(FittedOn.__annotations__)}"
    if not isinstance(saved.get("lightgbm_version"), str):
        return "lightgbm_version is not a text"
    faults = (booster_text.fault_of(text, monotone) for text in boosters)
    return next((f"booster {n} {fault}" for n, fault in enumerate(faults) if fault), "")


Kind = TypeVar("Kind")


def _all(values: Any, kind: type[Kind]) -> TypeGuard[list[Kind]]:
    """Whether this is a list of values of just this type; true and false are no integers."""
    return isinstance(values, list) and all(type(value) is kind for value in values)


def fitting_obstacle(products: int, same: np.ndarray, folds: np.ndarray) -> str:
    """Why no pair model can be fitted, in a sentence, "" if one can.

    products: val products with two postings or more; same, folds: as in `fit`.
    """
    used = (folds >= 0).any(axis=1)
    if products < LEAST_PRODUCTS:
        reason = (
            f"it takes {LEAST_PRODUCTS} val products with two labelled postings or more, here are "
            f"{products}"
        )
    elif any(len(np.unique(same[_outside(folds, fold)])) < 2 for fold in range(FOLDS)):
        pairs, positives = (int(kind.sum()) for kind in (used, same & used))
        reason = (
            f"{positives} of {pairs} candidate pairs of val postings are of one product, and a "
            "fifth of the products has all of one kind"
        )
    else:
        return ""
    return (
        f"No pair model is fitted: {reason}; the plain score decides. Label more products, or give "
        "the pair model of another catalogue."
    )
