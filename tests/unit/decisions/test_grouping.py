"""The groups where there are too many pairs to link by their means."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from dist_train.decisions import grouping
from dist_train.decisions.grouping import Links, group_rows
from dist_train.evaluation.labelled import CatalogueLabels

LABELS = CatalogueLabels(np.full(7, -1))
NO_LINKS = Links()
PAIRS = [(0, 1, 0.9), (1, 2, 0.6), (2, 3, 0.3), (3, 4, 0.8), (4, 5, 0.005), (0, 2, 0.7)]


def groups(*sizes: int, links: Links = NO_LINKS) -> tuple[list[int], float | None]:
    """The groups of PAIRS in batches of these sizes, where a match has 0.5 or more."""
    table = pd.DataFrame(PAIRS, columns=["i", "j", "score"]).astype({"score": "float32"})
    ends = np.cumsum((0, *sizes))
    batches = [table[start:end] for start, end in pairwise(ends)]
    none = np.zeros(0, np.int64)
    found, cut = group_rows(batches, 0.5, none, LABELS, None, links)
    return found.tolist(), cut


@pytest.mark.parametrize("sizes", [(6,), (1, 2, 3), (4, 0, 2)])
def test_of_too_many_pairs_the_matches_alone_are_joined(sizes, monkeypatch, caplog):
    assert groups(*sizes)[1] == grouping.HALF  # by their means
    assert "components" not in caplog.text
    monkeypatch.setattr(grouping, "MOST_PAIRS", 2)
    assert groups(*sizes) == ([0, 0, 0, 1, 1, 2, 3], None)
    assert "connected components of the matches, of any size: more than 2 pairs" in caplog.text
    assert "must not" not in caplog.text


@pytest.mark.parametrize("sizes", [(6,), (1, 2, 3), (4, 0, 2)])
def test_before_that_the_pairs_that_are_no_matches_are_left_out(sizes, monkeypatch, caplog):
    monkeypatch.setattr(grouping, "MOST_PAIRS", 4)  # five have 0.01 or more, four are matches
    assert groups(*sizes) == ([0, 0, 0, 1, 1, 2, 3], grouping.HALF)
    assert "components" not in caplog.text


def test_links_of_too_many_pairs(monkeypatch, caplog):
    """A pair that is never in one group is not joined itself; if others join it, that is said."""
    monkeypatch.setattr(grouping, "MOST_PAIRS", 2)
    links = Links(np.array([[5, 6]]), np.array([[3, 4], [0, 2]]))
    assert groups(6, links=links) == ([0, 0, 0, 1, 2, 3, 3], None)
    assert "1 pairs that must not be in one group are, through others" in caplog.text
