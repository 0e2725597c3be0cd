"""The curve from one sort equals scoring every threshold by itself."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.evaluation import f1_curve as module
from dist_train.evaluation.f1_curve import F1Curve, f1_curve
from dist_train.evaluation.metrics import per_item_scores

NO_PAIRS = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0))


@st.composite
def scored_pairs(draw):
    """Few items, few distinct scores: ties, one group, all alone and no pairs all occur."""
    items = draw(st.integers(1, 8))
    groups = np.array(draw(st.lists(st.integers(0, 3), min_size=items, max_size=items)))
    every = [(a, b) for a in range(items) for b in range(a + 1, items)]
    chosen = draw(st.permutations([pair for pair in every if draw(st.booleans())]))
    ties = st.sampled_from([-0.25, 0.0, 0.1, 0.3, 0.30000001192092896, 0.7, 1.0])
    scores = [draw(st.one_of(ties, st.floats(-1, 1, width=32))) for _ in chosen]
    pairs = np.array(chosen, dtype=np.int64).reshape(-1, 2)
    return groups, pairs[:, 0], pairs[:, 1], np.array(scores, dtype=np.float32)


def mean_f1(groups, i, j, accepted) -> float:
    return per_item_scores(groups, i[accepted], j[accepted])[0].mean()


def mean_precision(groups, i, j, accepted) -> float:
    return per_item_scores(groups, i[accepted], j[accepted])[1].mean()


@given(scored_pairs())
def test_every_entry_equals_brute_force(case):
    groups, i, j, scores = case
    curve = f1_curve(groups, i, j, scores)
    np.testing.assert_array_equal(curve.thresholds, np.unique(scores)[::-1])
    expected = [mean_f1(groups, i, j, scores >= t) for t in curve.thresholds]
    np.testing.assert_allclose(curve.f1, expected, atol=1e-12)
    expected = [mean_precision(groups, i, j, scores >= t) for t in curve.thresholds]
    np.testing.assert_allclose(curve.precision, expected, atol=1e-12)
    assert curve.base == pytest.approx(mean_f1(groups, i, j, scores > 2))
    assert curve.items == len(groups)


@given(scored_pairs())
def test_best_threshold_selects_the_best_pairs_and_no_others(case):
    groups, i, j, scores = case
    curve = f1_curve(groups, i, j, scores)
    threshold, f1 = curve.best()
    assert f1 == pytest.approx(max([curve.base, *curve.f1]), abs=1e-11)
    # the same pairs whether scores are compared as float32 or as float64
    for compared in (scores, scores.astype(np.float64)):
        assert mean_f1(groups, i, j, compared >= threshold) == pytest.approx(f1, abs=1e-11)
    assert curve.at(threshold) == f1


@given(scored_pairs(), st.sampled_from([0.2, 0.6, 0.9, 1.0]))
def test_the_most_pairs_of_a_mean_precision_are_selected(case, precision):
    groups, i, j, scores = case
    threshold, f1 = f1_curve(groups, i, j, scores).precise(precision)
    reached = [mean_precision(groups, i, j, scores >= t) for t in np.unique(scores)]
    cuts = np.unique(scores)[np.array(reached) >= precision - 1e-12]
    wanted = scores >= min(cuts, default=np.float32(2))
    for compared in (scores, scores.astype(np.float64)):
        np.testing.assert_array_equal(compared >= threshold, wanted)
    assert f1 == pytest.approx(mean_f1(groups, i, j, wanted), abs=1e-11)


@given(scored_pairs())
def test_of_equal_f1_the_highest_threshold_wins(case):
    groups, i, j, scores = case
    curve = f1_curve(groups, i, j, scores)
    threshold, f1 = curve.best()
    higher = [curve.base, *curve.f1[curve.thresholds >= np.float32(threshold)]][:-1]
    assert all(value < f1 - 1e-13 for value in higher)


def gains_and_losses(steps: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pairs of falling score: at +1 two of a product of two, at -1 two that are alone.

    By the definition the one takes two items from 2/3 to 1, the other two from 1 to 2/3, so the
    mean moves by the same step up and down.
    """
    P = len(steps)
    first, second = np.arange(P), np.arange(P, 2 * P)
    groups = np.r_[first, np.where(steps > 0, first, second)]
    return groups, first, second, np.linspace(0.9, 0.1, P).astype(np.float32)


@pytest.mark.parametrize("first", [1, -1])
def test_of_equal_f1_the_fewest_pairs_win_however_their_sums_are_rounded(first):
    ties = 0
    for seed in range(300):
        steps = np.random.default_rng(seed).permutation(np.repeat([1, -1], 15))
        steps = np.r_[first, steps[: 7 + seed % 20]]
        height = np.r_[0, np.cumsum(steps)]  # in whole numbers: nothing is rounded
        fewest = int(np.argmax(height))
        ties += int((height == height.max()).sum() > 1)
        groups, i, j, scores = gains_and_losses(steps)
        threshold, f1 = f1_curve(groups, i, j, scores).best()
        assert (scores >= np.float32(threshold)).sum() == fewest, seed
        assert f1 == pytest.approx(mean_f1(groups, i, j, scores >= np.float32(threshold)))
    assert ties > 100


@given(scored_pairs(), st.floats(-1.5, 1.5))
def test_at_reads_any_threshold(case, threshold):
    groups, i, j, scores = case
    expected = mean_f1(groups, i, j, scores >= np.float32(threshold))
    assert f1_curve(groups, i, j, scores).at(threshold) == pytest.approx(expected, abs=1e-11)


@given(scored_pairs(), st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_change_a_bit(case, random):
    groups, i, j, scores = case
    order = list(range(len(i)))
    random.shuffle(order)
    curve = f1_curve(groups, i, j, scores)
    again = f1_curve(groups, j[order], i[order], scores[order])
    np.testing.assert_array_equal(curve.f1, again.f1)


def test_threshold_is_the_midpoint():
    groups, i, j = np.array([0, 0, 1]), np.array([0, 1]), np.array([1, 2])
    curve = f1_curve(groups, i, j, np.array([0.75, 0.25]))
    assert curve.best() == (0.5, pytest.approx(1.0))


def test_neighbouring_float32_scores_stay_apart():
    high = np.float32(0.6)
    low = np.nextafter(high, np.float32(0))
    groups, i, j = np.array([0, 0, 1]), np.array([0, 1]), np.array([1, 2])
    for above, below in ((high, low), (low, np.nextafter(low, np.float32(0)))):
        threshold, f1 = f1_curve(groups, i, j, np.array([above, below])).best()
        assert f1 == pytest.approx(1.0)
        assert below < threshold <= above


def test_without_pairs_or_without_use_only_itself():
    alone = f1_curve(np.array([0, 0, 1]), *NO_PAIRS)
    assert alone.best() == (1.0, alone.base)
    assert alone.at(0.0) == alone.base
    wrong = f1_curve(np.array([0, 1]), np.array([0]), np.array([1]), np.array([0.9]))
    threshold, f1 = wrong.best()
    assert f1 == wrong.base == 1.0
    assert np.float32(0.9) < threshold < 0.9001


def test_a_last_entry_that_is_best_is_its_own_threshold():
    curve = f1_curve(np.array([0, 0]), np.array([0]), np.array([1]), np.array([0.5]))
    assert curve.best() == (0.5, 1.0)


def test_bad_input_is_refused():
    pair = np.array([0]), np.array([1])
    with pytest.raises(ValueError, match="a score is NaN"):
        f1_curve(np.array([0, 0]), *pair, np.array([np.nan]))
    with pytest.raises(ValueError, match="no items"):
        f1_curve(np.empty(0, dtype=int), *NO_PAIRS)


def random_case(pairs: int, items: int = 5_000):
    rng = np.random.default_rng(8)
    groups = rng.integers(0, items // 3, items)
    i = rng.integers(0, items - 1, pairs)
    j = i + 1 + rng.integers(0, items, pairs) % (items - 1 - i)
    right = groups[i] == groups[j]
    return groups, i, j, rng.normal(0.5 + 0.3 * right, 0.1)


def saved(curve: F1Curve, points: int) -> F1Curve:
    """The curve as it is read again from a file that holds so many points at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POINTS", points)
        return F1Curve.from_json(json.loads(json.dumps(curve.as_json())))


@given(st.integers(4, 60), scored_pairs())
def test_thinned_keeps_its_ends_its_best_and_its_bound(points, case):
    for curve in (f1_curve(*case), f1_curve(*random_case(500))):
        thin = saved(curve, points)
        assert len(thin.f1) == len(thin.thresholds) <= points
        assert thin.best() == curve.best()
        ends = slice(None, None, max(len(curve.f1) - 1, 1))
        thin_ends = slice(None, None, max(len(thin.f1) - 1, 1))
        np.testing.assert_array_equal(thin.thresholds[thin_ends], curve.thresholds[ends])


@pytest.mark.parametrize("rights", range(100, 160, 7))
def test_thinned_keeps_the_best_entry_and_the_one_after_it(rights):
    curve = f1_curve(*gains_and_losses(np.repeat([1, -1], [rights, 300 - rights])))
    thin = saved(curve, 12)
    assert len(thin.f1) <= 12
    assert thin.best() == curve.best()
    scores = gains_and_losses(np.ones(300, int))[3]
    assert (scores >= np.float32(thin.best()[0])).sum() == rights
    assert set(curve.thresholds[[0, -1]]) <= set(thin.thresholds)
    assert (thin.base, thin.items) == (curve.base, curve.items)
    whole = saved(curve, 301)
    np.testing.assert_array_equal(whole.thresholds, curve.thresholds)


def test_five_entries_are_thinned_to_four():
    curve = f1_curve(*gains_and_losses(np.array([1, 1, -1, -1, -1])))
    assert len(curve.f1) == 5
    assert len(saved(curve, 4).f1) == 4


@given(scored_pairs())
def test_json_brings_the_curve_back_exactly(case):
    curve = f1_curve(*case)
    back = F1Curve.from_json(json.loads(json.dumps(curve.as_json())))
    np.testing.assert_array_equal(back.thresholds, curve.thresholds)
    np.testing.assert_array_equal(back.f1, curve.f1)
    np.testing.assert_array_equal(back.precision, curve.precision)
    assert (back.base, back.items, back.best()) == (curve.base, curve.items, curve.best())


def calls_and_bytes(pairs: int) -> tuple[int, int]:
    """Function calls of one curve, Python's and C's, and the most memory it held."""
    case, calls = random_case(pairs), []
    tracemalloc.start()
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    f1_curve(*case)
    sys.setprofile(None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return len(calls), peak


def test_work_does_not_grow_with_the_thresholds():
    """Scoring each threshold by itself would take more calls, or a table of pairs by
    thresholds. A bounded number of passes over arrays of the size of the pairs is n log n."""
    calls_and_bytes(100)
    few_calls, few_bytes = calls_and_bytes(10_000)
    many_calls, many_bytes = calls_and_bytes(100_000)
    assert many_calls <= few_calls + 10
    assert many_bytes < 12 * few_bytes
