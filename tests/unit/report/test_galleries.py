"""Which pairs are shown, and where the lines of the charts lie."""

import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.evaluation.f1_curve import F1Curve, f1_curve
from dist_train.report import charts
from dist_train.report.charts import Histogram
from dist_train.report.galleries import choose_pairs


@st.composite
def matched_items(draw):
    """Products of some items, and scored pairs of which those over one half are matched."""
    product = np.array(draw(st.lists(st.integers(0, 5), min_size=2, max_size=14)))
    every = [(a, b) for a in range(len(product)) for b in range(a + 1, len(product))]
    rows = [(a, b, draw(st.floats(0, 1))) for a, b in every if draw(st.booleans())]
    scored = pd.DataFrame(rows, columns=["i", "j", "score"]).astype({"i": int, "j": int})
    return product, scored, scored[scored["score"] >= 0.5]


def pairs_of(table) -> list[tuple[int, int]]:
    return list(zip(table["i"], table["j"], strict=True))


def chosen(matched, scored, product) -> list[tuple[int, pd.DataFrame]]:
    """How many there are and those to show: right, wrong, missed."""
    found = choose_pairs(matched, scored, product, np.ones(len(product), dtype=bool))
    assert [kind for kind, *_ in found] == ["right", "wrong", "missed"]
    return [(total, pairs) for _, total, pairs in found]


@given(matched_items())
def test_every_kind_holds_its_own_pairs_two_a_product(case):
    product, scored, matched = case
    everything = np.ones(len(product), dtype=bool)
    right, wrong, missed = chosen(matched, scored, product)
    same = {(a, b) for a in everything.nonzero()[0] for b in range(a) if product[a] == product[b]}
    same = {(b, a) for a, b in same}
    known = set(pairs_of(matched))
    expected = (known & same, known - same, same - known)
    for (total, table), pairs in zip((right, wrong, missed), expected, strict=True):
        assert total == len(pairs)
        assert set(pairs_of(table)) <= pairs
        assert bool(len(table)) == bool(pairs)
        assert len(table) <= 12
        used = Counter(one for a, b in pairs_of(table) for one in {product[a], product[b]})
        assert max(used.values(), default=0) <= 2


@given(matched_items())
def test_the_highest_scores_come_first(case):
    product, scored, matched = case
    _, (_, wrong), (_, missed) = chosen(matched, scored, product)
    assert wrong["score"].is_monotonic_decreasing
    known = missed["score"].dropna()
    assert known.is_monotonic_decreasing
    assert missed["score"].isna().to_numpy()[len(known) :].all()
    if len(wrong):
        across = matched[product[matched["i"]] != product[matched["j"]]]
        assert wrong["score"].iloc[0] == across["score"].max()


def test_right_matches_run_from_the_surest_to_the_closest_call():
    i = np.arange(0, 200, 2)
    matched = pd.DataFrame({"i": i, "j": i + 1, "score": np.linspace(0.5, 1, 100)})
    total, table = chosen(matched, matched, np.arange(200) // 2)[0]
    assert (total, len(table)) == (100, 12)
    steps = -np.diff(table["score"])
    assert (table["score"].iloc[0], table["score"].iloc[-1]) == (1.0, 0.5)
    assert steps.min() > 0.9 * steps.max() - 0.006


def test_a_product_with_very_many_items_costs_little():
    product = np.zeros(20_000, dtype=np.int64)
    none = pd.DataFrame({"i": [0], "j": [1], "score": [0.9]})
    total, table = chosen(none, none, product)[2]
    assert total == 20_000 * 19_999 // 2 - 1
    assert len(table) == 2
    assert (0, 1) not in pairs_of(table)


def numbers(path: str) -> np.ndarray:
    return np.array(re.findall(r"-?\d+\.\d", path), dtype=float).reshape(-1, 2)


@given(st.lists(st.floats(0.125, 1, width=32), min_size=2, max_size=30, unique=True), st.data())
def test_the_curve_stays_in_its_box_and_marks_the_threshold(scores, data):
    n = len(scores)
    groups = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n + 1, max_size=n + 1)))
    curve = f1_curve(groups, np.arange(n), np.arange(1, n + 1), np.array(scores))
    chart = charts.curve_chart(curve, float(curve.thresholds[1]))
    x, y = numbers(chart.paths["line"]).T
    assert (x[0], x[-1]) == (charts.RIGHT, charts.LEFT)
    assert (np.diff(x) <= 0).all()
    assert y.min() >= charts.TOP - 0.1
    assert y.max() <= charts.BOTTOM + 0.1
    assert (chart.mark.at, chart.dot) == pytest.approx((x[1], y[1]), abs=0.06)
    for ticks in (chart.x_ticks, chart.y_ticks):
        assert len({tick.label for tick in ticks}) == len(ticks) <= 8


def test_too_short_a_curve_has_no_chart_and_a_far_threshold_no_mark():
    assert (
        charts.curve_chart(F1Curve(np.array([0.5]), np.array([1.0]), np.array([1.0]), 0.5, 2), 0.5)
        is None
    )
    curve = F1Curve(np.float32([0.6, 0.5]), np.array([0.7, 0.6]), np.ones(2), 0.5, 9)
    assert charts.curve_chart(curve, 0.9).mark is None


@given(st.lists(st.integers(0, 10**6), min_size=3, max_size=3))
def test_more_pairs_are_drawn_higher(right):
    wrong = np.array([5, 0, 1])
    bins = Histogram(np.array([0.2, 0.4, 0.6, 0.8]), np.array(right), wrong)
    chart = charts.histogram_chart(bins, 0.5)
    points = numbers(chart.paths["right"])
    tops = points[[1, 3, 5], 1]
    assert points[0, 1] == points[-1, 1] == charts.BOTTOM
    order = np.argsort(right)
    assert (np.diff(tops[order]) <= 0).all()
    assert tops.min() >= charts.TOP
    assert (tops[np.array(right) == 0] == charts.BOTTOM).all()
