"""What the report shows, gathered and ready to be laid out."""

from dataclasses import dataclass

import numpy as np

from dist_train.evaluation.f1_curve import F1Curve


@dataclass(frozen=True)
class Posting:
    """One side of a pair. photo: a data URI, or None where there is none to show."""

    posting_id: str
    title: str
    photo: str | None


@dataclass(frozen=True)
class PairCard:
    """Two postings and their scores; None where the pair or the part was never scored."""

    left: Posting
    right: Posting
    score: float | None
    score_image: float | None
    score_text: float | None


@dataclass(frozen=True)
class Gallery:
    """kind: right, wrong, missed, or matches (without labels); total: pairs of this kind, None
    for matches, of which only the best are read."""

    kind: str
    total: int | None
    cards: list[PairCard]


@dataclass(frozen=True)
class Histogram:
    """edges (K+1,) of the scores; right, wrong (K,) pairs of each bin."""

    edges: np.ndarray
    right: np.ndarray
    wrong: np.ndarray


@dataclass(frozen=True)
class ReportData:
    """One match directory. Without labels metrics, curve, histogram and shown_split are None."""

    name: str
    made: str
    postings: int
    matched: int
    groups: int
    largest_group: int
    threshold: dict
    metrics: dict | None
    curve: F1Curve | None
    histogram: Histogram | None
    shown_split: str | None
    galleries: list[Gallery]
    photos_missing: str | None
