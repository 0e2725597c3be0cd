"""Two scores as one: the choice against every weight tried by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.evaluation.f1_curve import f1_curve
from dist_train.evaluation.fusion import WEIGHTS, Fusion, choose_fusion, union_of_pairs

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda p: p[0] < p[1]))


def columns(pairs):
    return tuple(np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))


@given(PAIRS, PAIRS)
def test_union_has_every_pair_once_in_order(first, second):
    i, j = union_of_pairs(columns(first), columns(second), items=7)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == sorted({*first, *second})


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all_weights(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 6, 20)
    i, j = np.triu_indices(20, k=1)
    first, second = (0.4 * (groups[i] == groups[j]) + rng.random((2, len(i)))).astype(np.float32)
    chosen = choose_fusion(groups, i, j, first, second)
    reached = f1_curve(groups, i, j, chosen.score(first, second)).at(chosen.threshold)
    tried = [f1_curve(groups, i, j, Fusion(w, 0).score(first, second)).best()[1] for w in WEIGHTS]
    assert reached == pytest.approx(max(tried), abs=1e-9)


def test_of_equal_weights_the_most_even_is_taken():
    """Both scores are right about every pair, so all weights are."""
    groups = np.array([0, 0, 1, 1])
    i, j = np.triu_indices(4, k=1)
    right = (groups[i] == groups[j]).astype(np.float32)
    assert choose_fusion(groups, i, j, right, 0.5 * right).weight == 0.5


def test_a_score_that_knows_nothing_gets_no_weight():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 3)
    i, j = np.triu_indices(60, k=1)
    right = (groups[i] == groups[j]).astype(np.float32)
    noise = 1_000 * rng.random(len(i), np.float32)
    assert choose_fusion(groups, i, j, noise, right) == Fusion(0.0, pytest.approx(0.5))


def test_without_pairs_nothing_matches():
    none = np.zeros(0, np.int64)
    empty = np.zeros(0, np.float32)
    assert choose_fusion(np.array([1, 1]), none, none, empty, empty) == Fusion(0.5, 1.0)
