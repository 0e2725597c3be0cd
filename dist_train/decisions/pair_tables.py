"""Tables of single pairs with what speaks for and against them: matches, variants, pairs to review.

A variant is a pair that would be a match if its titles did not state different quantities, sizes,
model numbers or colours. To review are the pairs of which neither is sure, by what a right answer
is expected to add to the F1 of their two postings.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dist_train.decisions.grouping import Links
from dist_train.decisions.match_lists import Postings
from dist_train.decisions.probabilities import ProbablePairs
from dist_train.decisions.threshold import Threshold
from dist_train.matching.pairs import SCORES
from shards.storage.files import atomic_path

BLOCK = 20_000
"""Pairs that are explained at a time."""
REASONS = 3
"""Features that are named on either side."""
UNCERTAIN = (0.1, 0.9)
"""Probabilities of the pairs that a person may want to look at."""
REVIEWED_PER_POSTING = 0.2
LEAST_REVIEWED = 1000


def write_tables(
    out: Path, probable: ProbablePairs, decided: Threshold, postings: Postings, links: Links
) -> list[str]:
    """Write reasons.parquet (of all matches), variants.parquet and review.parquet; their names.

    Pairs that the user has linked, as one product or as two, are in none of them.
    """
    threshold, score_threshold = decided["threshold"], decided["score_threshold"]
    i, j, _ = probable.candidates
    rows = len(postings.names)
    is_open = ~np.isin(i.astype(np.int64) * rows + j, np.vstack(links) @ [rows, 1])
    is_match = probable.probability >= np.float32(threshold)
    tables = {
        "reasons.parquet": np.flatnonzero(is_match & is_open),
        "variants.parquet": variants(probable, threshold, score_threshold, is_open),
        "review.parquet": to_review(probable, rows, threshold, is_open),
    }
    for name, pairs in tables.items():
        write_pairs(out / name, probable, pairs, postings)
    return list(tables)


def write_pairs(path: Path, probable: ProbablePairs, pairs: np.ndarray, postings: Postings) -> None:
    """Write a row for each of some pairs (n,), given by their numbers, in this order.

    Columns: posting_id_1, posting_id_2, probability, score, score_image, score_text (null where
    unknown), and the names, values and log-odds of the features that speak most for and against.
    """
    i, j, _ = probable.candidates
    text = pa.list_(pa.string())
    schema = pa.schema(
        [("posting_id_1", pa.string()), ("posting_id_2", pa.string())]
        + [(name, pa.float32()) for name in ("probability", *SCORES)]
        + [("reasons_for", text), ("reasons_against", text)]
    )
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(pairs), BLOCK):
            some = pairs[start : start + BLOCK]
            features = probable.features.of(some)
            contributions = probable.model.contributions(features).to_numpy()
            values = features[list(probable.model.features)].to_numpy()
            names = (
                postings.names.take(pa.array(postings.place[side[some]])).cast(pa.string())
                for side in (i, j)
            )
            known = [
                features.get(name, pd.Series(np.nan, features.index)).to_numpy(np.float32)
                for name in SCORES
            ]
            columns = [
                *names,
                pa.array(probable.probability[some]),
                *(pa.array(column, from_pandas=True) for column in known),
                *(
                    pa.array(_reasons(probable.model.features, values, sign * contributions), text)
                    for sign in (1, -1)
                ),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _reasons(names: tuple[str, ...], values: np.ndarray, strength: np.ndarray) -> list[list[str]]:
    """For each row (n, F), "name value (+log-odds)" of the strongest features above 0."""
    best = np.argsort(-strength, axis=1, kind="stable")[:, :REASONS]
    return [
        [
            f"{names[column]} {values[row, column]:.3g} ({strength[row, column]:+.2f})"
            for column in columns
            if strength[row, column] > 0
        ]
        for row, columns in enumerate(best)
    ]


def variants(
    probable: ProbablePairs, threshold: float, score_threshold: float, is_open: np.ndarray
) -> np.ndarray:
    """Numbers (n,) of the pairs that only a conflict between their titles keeps from a match.

    Of the pairs is_open (P,) whose score alone would make them a match, those that are none, and
    to which the boosters give `threshold` or more only where every conflict is left out.
    """
    found, lowest = [np.zeros(0, np.int64)], np.float32(threshold)
    is_close = probable.features.score >= np.float32(score_threshold)
    close = np.flatnonzero(is_open & is_close & (probable.probability < lowest))
    for start in range(0, len(close), BLOCK):
        pairs = close[start : start + BLOCK]
        features = probable.features.of(pairs)
        conflicts = [
            name
            for name in features
            if name.endswith("_conflicting") and not name.startswith("feature_")
        ]
        without = features.assign(**dict.fromkeys(conflicts, np.float32(0)))
        before, after = map(probable.model.probabilities, (features, without))
        found.append(pairs[(before < lowest) & (after >= lowest)])
    return np.concatenate(found)


def to_review(
    probable: ProbablePairs, postings: int, threshold: float, is_open: np.ndarray
) -> np.ndarray:
    """Numbers (n,) of the uncertain pairs is_open (P,), the highest expected gain in F1 first.

    A right answer changes the decision with the probability that this is wrong, and then the F1 of
    each of the two postings by about 1 / (its matches, itself included, + 1).
    """
    i, j, _ = probable.candidates
    probability = probable.probability
    accepted = probability >= np.float32(threshold)
    matches = np.bincount(i[accepted], minlength=postings)
    matches += np.bincount(j[accepted], minlength=postings)
    is_uncertain = (probability >= UNCERTAIN[0]) & (probability <= UNCERTAIN[1])
    pairs = np.flatnonzero(is_open & is_uncertain)
    wrong = np.where(accepted[pairs], 1 - probability[pairs], probability[pairs])
    gain = wrong * (1 / (2 + matches[i[pairs]]) + 1 / (2 + matches[j[pairs]]))
    most = max(LEAST_REVIEWED, int(REVIEWED_PER_POSTING * postings))
    return pairs[np.argsort(-gain, kind="stable")[:most]]
