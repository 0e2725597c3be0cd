"""Candidate pairs of a join, each with the probability that it is one product.

The pair model is fitted on the pairs of val items, matched with the whole catalogue, or comes from
another match.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.decisions.candidates import Candidates, find_candidates
from dist_train.decisions.features import PairFeatures
from dist_train.decisions.pair_model import (
    LEAST_PRODUCTS,
    PairModel,
    fit,
    fitting_obstacle,
    fold_of_products,
)
from dist_train.decisions.title_vectors import title_vectors
from dist_train.evaluation.labelled import CatalogueLabels
from dist_train.matching.pairs import BATCH, PairSet
from dist_train.matching.vectors import open_vectors
from shards.storage.errors import BadInput

BLOCK = 1 << 18
"""Pairs whose features are in memory at one time, but for those that a model is fitted on."""
MOST_FITTED = 2_000_000
"""Pairs that a model is fitted on: every k-th where there are more. Memory holds their features,
some 250 bytes a pair, three times."""
log = logging.getLogger(__name__)


class ProbablePairs(NamedTuple):
    """P candidate pairs with what decides about them."""

    candidates: Candidates
    probability: np.ndarray
    """(P,) float32; of a pair with a val item from boosters that have not seen it."""
    features: PairFeatures
    model: PairModel

    def batches(self) -> Iterator[pd.DataFrame]:
        """Columns i, j and score, which is the probability, of all pairs."""
        i, j, _ = self.candidates
        for start in range(0, len(i), BATCH):
            cut = slice(start, start + BATCH)
            yield pd.DataFrame({"i": i[cut], "j": j[cut], "score": self.probability[cut]})

    def of_items(self, wanted: np.ndarray) -> pd.DataFrame:
        """The same columns of all pairs of items (N,) bool."""
        i, j, _ = self.candidates
        pairs = np.flatnonzero(wanted[i] | wanted[j])
        return pd.DataFrame({"i": i[pairs], "j": j[pairs], "score": self.probability[pairs]})


def check_columns(path: Path, carried: Sequence[str], columns: Sequence[str]) -> None:
    """Raise BadInput for a name of --features that is none of the columns the catalogue adds.

    Ours are none: the label is the answer itself, and the split follows from it.
    path: the set of shards or embeddings that has the `carried` columns.
    """
    for name in columns:
        if name not in carried:
            raise BadInput(
                f"--features {name}: {path} has no such column of the catalogue to compare; it has "
                f"{', '.join(carried) or 'none beside the known ones'}"
            )


def probable_pairs(
    pair_set: PairSet,
    queries: np.ndarray,
    labels: CatalogueLabels,
    accepted: float,
    config: MatchConfig,
    model: PairModel | None,
) -> ProbablePairs | str:
    """The candidate pairs of a catalogue with their probabilities, or why no model can be fitted.

    queries: rows (n,) of val items; labels: of all postings, the items by vector row first;
    accepted: the lowest score of a match by the score alone; model: that of another match, or None
    to fit one. Raises BadInput when the model needs features that this catalogue lacks.
    """
    several = int((np.unique(labels.codes[queries], return_counts=True)[1] > 1).sum())
    if model is None and several < LEAST_PRODUCTS:  # known before any work
        return fitting_obstacle(several, np.zeros(0, bool), np.zeros((0, 2), np.int8))
    columns = ["title", "phash", "photo_group", "label_group", *config.features]
    items = pair_set.embedding.read_items(columns)
    modalities = list(pair_set.weights)
    image_weight = pair_set.weights.get("image", 0.0)
    vectors = open_vectors(pair_set.embedding, modalities, image_weight)
    titles = title_vectors(items.title.fillna("").tolist())
    photo_group = items.photo_group.fillna(-1).to_numpy(np.int64)
    found = find_candidates(pair_set, vectors, titles, photo_group, config.candidates)
    i, j, _ = found
    log.info(f"{pair_set.path}: {len(i)} candidate pairs of {len(items)} items")
    features = PairFeatures(items, vectors, titles, i, j, accepted, config.features)
    if model is not None:
        model.check_features(features.names, config.threshold_from)
    fold = np.full(len(items), -1, np.int8)
    if model is None:
        fold[queries] = fold_of_products(items.label_group[queries].to_numpy(str))
        fitted = fit_on_queries(features, i, j, fold, labels)
        if isinstance(fitted, str):
            return fitted
        model = fitted
    probability = np.empty(len(i), np.float32)
    for start in range(0, len(i), BLOCK):
        cut = slice(start, start + BLOCK)
        folds = np.stack([fold[i[cut]], fold[j[cut]]], axis=1)
        probability[cut] = model.probabilities(features.of(cut), folds)
    return ProbablePairs(found, probability, features, model)


def fit_on_queries(
    features: PairFeatures,
    i: np.ndarray,
    j: np.ndarray,
    fold: np.ndarray,
    labels: CatalogueLabels,
) -> PairModel | str:
    """A model of the pairs of queries, or why there is none.

    A pair with a posting without a label counts as two products, by the part of such pairs of its
    score that is expected to be wrong: without them the model would know too few strangers.
    i, j: (P,) rows; fold: (N,) of a query, -1 of every other item.
    """
    pairs = np.flatnonzero((fold[i] >= 0) | (fold[j] >= 0))
    pairs = pairs[:: -(-len(pairs) // MOST_FITTED) or 1]
    codes = np.stack([labels.codes[i[pairs]], labels.codes[j[pairs]]])
    unknown = codes.min(axis=0) < 0
    same = (codes[0] == codes[1]) & ~unknown
    folds = np.stack([fold[i[pairs]], fold[j[pairs]]], axis=1)
    of_queries = labels.codes[: len(fold)][fold >= 0]
    products, sizes = np.unique(of_queries, return_counts=True)
    several = int((sizes > 1).sum())
    if obstacle := fitting_obstacle(several, same[~unknown], folds[~unknown]):
        return obstacle
    weight = np.ones(len(pairs))
    weight[unknown] = labels.wrong_shares(features.score[pairs], ~same & ~unknown, unknown)
    counts = {"queries": len(of_queries), "products": len(products)}
    cores = len(os.sched_getaffinity(0))
    return fit(features.of(pairs), same, folds, weight, threads=cores, **counts)
