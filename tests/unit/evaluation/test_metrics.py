"""Per-item scores against sets written out by hand, and intervals that cover."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.evaluation.metrics import (
    bootstrap_interval,
    by_group_size,
    paired_difference,
    per_item_scores,
    recall_at_1,
)
from dist_train.evaluation.scores import difference


@st.composite
def labelled_pairs(draw):
    """Groups of up to 9 items (so also one group, and all alone), and some of their pairs."""
    items = draw(st.integers(1, 9))
    groups = draw(st.lists(st.integers(0, 4), min_size=items, max_size=items))
    every = [(a, b) for a in range(items) for b in range(a + 1, items)]
    chosen = [pair for pair in every if draw(st.booleans())]
    i = np.array([a for a, _ in chosen], dtype=np.int64)
    j = np.array([b for _, b in chosen], dtype=np.int64)
    return np.array(groups), i, j


def sets_of(groups, i, j):
    """For each item: what is predicted, what is right; both with itself."""
    predicted = [{k} for k in range(len(groups))]
    for a, b in zip(i, j, strict=True):
        predicted[a].add(b)
        predicted[b].add(a)
    true = [set(np.flatnonzero(groups == group)) for group in groups]
    return predicted, true


@given(labelled_pairs())
def test_f1_precision_and_recall_equal_sets(case):
    groups, i, j = case
    predicted, true = sets_of(groups, i, j)
    right = np.array([len(p & t) for p, t in zip(predicted, true, strict=True)])
    sizes = np.array([len(t) for t in true])
    asked = np.array([len(p) for p in predicted])
    f1, precision, recall = per_item_scores(groups, i, j)
    np.testing.assert_allclose(f1, 2 * right / (asked + sizes))
    np.testing.assert_allclose(precision, right / asked)
    np.testing.assert_allclose(recall, right / sizes)


@given(labelled_pairs())
def test_names_of_groups_do_not_matter(case):
    groups, i, j = case
    names = np.array([f"group {code}" for code in groups], dtype=object)
    np.testing.assert_array_equal(per_item_scores(groups, i, j), per_item_scores(names, j, i))


@pytest.mark.parametrize("missing", [None, "", float("nan")])
def test_an_item_without_a_group_is_refused(missing):
    groups = np.array(["a", "b", missing, "b"], dtype=object)
    with pytest.raises(ValueError, match="row 2"):
        per_item_scores(groups, np.array([0]), np.array([1]))


def test_recall_at_1_asks_only_items_with_a_partner():
    groups = np.array([7, 7, 7, 8, 9, 9])
    nearest = np.array([1, 3, -1, 0, 5, 4])
    assert recall_at_1(groups, nearest) == pytest.approx(3 / 5)
    assert np.isnan(recall_at_1(np.arange(3), np.array([1, 0, 0])))


def test_no_neighbour_is_never_a_hit():
    """-1 must not be read as the last row."""
    assert recall_at_1(np.array([1, 1]), np.array([-1, -1])) == 0.0


def test_interval_draws_groups_not_items():
    """50 groups of 20 equal items carry the information of 50 values, not of 1,000."""
    rng = np.random.default_rng(3)
    of_group = rng.random(50)
    groups = np.repeat(np.arange(50), 20)
    low, high = bootstrap_interval(of_group[groups], groups, rounds=4000)
    expected = 2 * 1.96 * of_group.std() / np.sqrt(50)
    assert high - low == pytest.approx(expected, rel=0.1)
    assert low < of_group.mean() < high


def test_interval_weighs_groups_by_their_items(monkeypatch):
    monkeypatch.setattr("dist_train.evaluation.metrics.LEVEL", 0.4)
    groups = np.array([0] * 30 + [1])
    values = np.array([0.0] * 30 + [1.0])
    low, high = bootstrap_interval(values, groups, rounds=2000)
    # a quarter of the draws has only group 0, half has both, a quarter only group 1
    assert low == high == pytest.approx(1 / 31)


def test_interval_repeats_and_does_not_depend_on_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    values, groups = rng.random(60), rng.integers(0, 20, 60)
    once = bootstrap_interval(values, groups)
    monkeypatch.setattr("dist_train.evaluation.metrics.WEIGHTS_AT_ONCE", 64)
    assert bootstrap_interval(values, groups) == once


@given(labelled_pairs())
def test_interval_of_a_constant_is_the_constant(case):
    groups = case[0]
    low, high = bootstrap_interval(np.full(len(groups), 0.25), groups, rounds=20)
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)


def test_interval_without_items_is_refused():
    with pytest.raises(ValueError, match="no items"):
        bootstrap_interval(np.empty(0), np.empty(0, dtype=int))


def test_paired_difference_is_the_bootstrap_written_out():
    """Groups of different sizes, drawn here one by one."""
    rng = np.random.default_rng(7)
    groups = rng.integers(0, 25, 90)
    ours, theirs = rng.random(90), rng.random(90)
    mean, low, high = paired_difference(ours, theirs, groups)
    names = np.unique(groups)
    totals = np.array([[(ours - theirs)[groups == g].sum(), (groups == g).sum()] for g in names])
    drawn = totals[rng.integers(0, len(names), (20_000, len(names)))].sum(1)
    expected = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    assert mean == pytest.approx((ours - theirs).mean())
    np.testing.assert_allclose([low, high], expected, atol=0.01)


def test_what_is_hard_for_both_cancels():
    """Two matchers that differ by the same step on every item: no doubt, however hard the items."""
    rng = np.random.default_rng(1)
    theirs, groups = rng.random(60), rng.integers(0, 12, 60)
    found = paired_difference(theirs + 0.125, theirs, groups)
    np.testing.assert_allclose(found, 0.125)
    low, high = bootstrap_interval(theirs + 0.125, groups)
    assert high - low > 0.05


def test_the_sign_turns_with_the_sides():
    rng = np.random.default_rng(2)
    ours, theirs, groups = rng.random(40), rng.random(40), rng.integers(0, 8, 40)
    mean, low, high = paired_difference(ours, theirs, groups)
    np.testing.assert_allclose(
        paired_difference(theirs, ours, groups), [-mean, -high, -low], atol=0.01
    )


@given(st.lists(st.integers(1, 25), min_size=1, max_size=12), st.integers(0, 2**16))
def test_group_sizes_split_the_items_and_keep_the_mean(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    f1 = np.random.default_rng(seed).random(len(groups))
    table = pd.DataFrame(by_group_size(groups, f1))
    size_of = np.repeat(sizes, sizes)
    for row in table.itertuples():
        inside = (size_of >= row.size_from) & (size_of <= row.size_to)
        assert row.items == inside.sum() > 0
        assert np.isclose(row.f1, f1[inside].mean())
    assert table["items"].sum() == len(groups)


def test_group_sizes_have_the_named_bands():
    sizes = [1, 2, 3, 4, 5, 9, 10, 19, 20, 33]
    table = pd.DataFrame(by_group_size(np.repeat(sizes, sizes), np.ones(sum(sizes))))
    bands = table[["size_from", "size_to"]].to_numpy().tolist()
    assert bands == [[1, 1], [2, 2], [3, 4], [5, 9], [10, 19], [20, 33]]
    assert table["items"].tolist() == [1, 2, 7, 14, 29, 53]


def test_a_difference_is_paired() -> None:
    draw = np.random.default_rng(0)
    plain = draw.uniform(0.2, 0.9, 300)
    found = difference(plain + 0.05, plain, np.repeat(np.arange(100), 3), "one", "other")
    assert found["low"] > 0.049
    assert found["f1"] == pytest.approx(0.05)
    assert (found["of"], found["over"]) == ("one", "other")
    assert difference(plain, plain, np.arange(300), "one", "other")["low"] == 0
