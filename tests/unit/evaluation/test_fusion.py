"""Two scores as one: the choice of the weight against every one tried by hand."""

import numpy as np
import pytest

from dist_train.evaluation.f1_curve import WEIGHTS, choose_weight, f1_curve, weighted_mean


def reached(groups, i, j, first, second, weight) -> float:
    """Mean F1 of the mean of two scores at its best threshold."""
    return f1_curve(groups, i, j, weighted_mean(weight, first, second)).best()[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all_weights(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 6, 20)
    i, j = np.triu_indices(20, k=1)
    first, second = (0.4 * (groups[i] == groups[j]) + rng.random((2, len(i)))).astype(np.float32)
    case = groups, i, j, first, second
    tried = [reached(*case, weight) for weight in WEIGHTS]
    assert reached(*case, choose_weight(*case)) == pytest.approx(max(tried), abs=1e-9)


def test_of_equal_weights_the_most_even_is_taken():
    """Both scores are right about every pair, so all weights are."""
    groups = np.array([0, 0, 1, 1])
    i, j = np.triu_indices(4, k=1)
    right = (groups[i] == groups[j]).astype(np.float32)
    assert choose_weight(groups, i, j, right, 0.5 * right) == 0.5


def test_a_score_that_knows_nothing_gets_no_weight():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 3)
    i, j = np.triu_indices(60, k=1)
    right = (groups[i] == groups[j]).astype(np.float32)
    noise = 1_000 * rng.random(len(i), np.float32)
    assert choose_weight(groups, i, j, noise, right) == 0.0
    np.testing.assert_array_equal(weighted_mean(0.0, noise, right), right)


def test_without_pairs_nothing_matches():
    none = np.zeros(0, np.int64)
    empty = np.zeros(0, np.float32)
    assert choose_weight(np.array([1, 1]), none, none, empty, empty) == 0.5
