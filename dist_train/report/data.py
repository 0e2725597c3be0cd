"""What the report shows, as the page lays it out."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_train.decisions.threshold import Threshold
from dist_train.evaluation.f1_curve import F1Curve
from dist_train.evaluation.scores import Scores

Kind = Literal["right", "wrong", "missed", "matches"]


@dataclass(frozen=True)
class Posting:
    """One side of a pair. photo: a data URI, or None where there is none to show."""

    posting_id: str
    title: str
    photo: str | None


@dataclass(frozen=True)
class PairCard:
    """Two postings and their scores; None where the pair, or one of its modalities, was never
    scored."""

    left: Posting
    right: Posting
    score: float | None
    score_image: float | None
    score_text: float | None


@dataclass(frozen=True)
class Gallery:
    """kind: matches is that of a catalogue without labels; total: pairs of this kind, None for
    matches, of which only the best are read."""

    kind: Kind
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
    created: str
    """Day."""
    postings: int
    matched: int
    """Postings that match another."""
    groups: int
    """Of two postings or more."""
    largest_group: int
    threshold: Threshold
    metrics: Scores | None
    curve: F1Curve | None
    histogram: Histogram | None
    shown_split: str | None
    galleries: list[Gallery]
    photos_missing: str | None
    """Why there are no photos; None where there are."""
