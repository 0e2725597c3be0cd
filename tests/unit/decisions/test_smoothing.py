"""Smoothed probabilities against a plain computation, and what holds of any graph."""

import numpy as np
import pytest

from dist_train.decisions import smoothing
from dist_train.decisions.smoothing import row_blocks, smoothed


def random_pairs(items: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs i < j in ascending order, with probabilities, some of them 0, 1/2 and 1."""
    random = np.random.default_rng(seed)
    i, j = np.triu_indices(items, 1)
    kept = np.sort(random.choice(len(i), pairs, replace=False))
    probability = random.random(pairs).astype(np.float32)
    probability[random.random(pairs) < 0.3] = random.choice(np.float32([0, 0.5, 1]))
    return i[kept].astype(np.int32), j[kept].astype(np.int32), probability


def plain(
    items: int, i: np.ndarray, j: np.ndarray, probability: np.ndarray, accepted: float
) -> list[float]:
    known = {(a, a): 1.0 for a in range(items)}
    for a, b, p in zip(i.tolist(), j.tolist(), probability.tolist(), strict=True):
        known[a, b] = known[b, a] = p

    def mean(a: int, b: int) -> float:
        weights = {c: w for c in range(items) if (w := known.get((a, c), 0.0)) >= accepted}
        total = sum(w * known.get((c, b), 0.0) for c, w in weights.items())
        return total / sum(weights.values())

    return [
        (known[a, b] + (mean(a, b) + mean(b, a)) / 2) / 2
        for a, b in zip(i.tolist(), j.tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("accepted", [0.3, 0.5, 0.9])
def test_it_is_the_plain_mean_over_accepted_neighbours(seed: int, accepted: float) -> None:
    i, j, probability = random_pairs(items=12, pairs=40, seed=seed)
    smooth = smoothed(12, i, j, probability, accepted)
    assert smooth.dtype == np.float32
    np.testing.assert_allclose(smooth, plain(12, i, j, probability, accepted), atol=1e-6)


def test_a_triangle_by_hand() -> None:
    """(0, 1) and (1, 2) are sure; (0, 2) gains, and the others lose by what it lacks."""
    i, j = np.array([0, 0, 1]), np.array([1, 2, 2])
    smooth = smoothed(3, i, j, np.array([1, 0.2, 1], np.float32))
    # Of 0 the neighbours are 0 and 1, of 1 all three, of 2 both 1 and 2.
    sure = (1 + ((1 + 1) / 2 + (1 + 1 + 0.2) / 3) / 2) / 2
    np.testing.assert_allclose(smooth, [sure, (0.2 + (0.2 + 1) / 2) / 2, sure], rtol=1e-6)


def test_the_bits_do_not_depend_on_blocks_sides_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    i, j, probability = random_pairs(items=60, pairs=600, seed=5)
    expected = smoothed(60, i, j, probability)
    assert np.array_equal(smoothed(60, j, i, probability), expected)
    order = np.random.default_rng(0).permutation(len(i))
    assert np.array_equal(smoothed(60, i[order], j[order], probability[order]), expected[order])
    for most in (1, 700, 5000):
        monkeypatch.setattr(smoothing, "PRODUCTS_AT_ONCE", most)
        assert np.array_equal(smoothed(60, i, j, probability), expected), most


def test_renumbered_items_keep_their_probabilities() -> None:
    i, j, probability = random_pairs(items=60, pairs=600, seed=6)
    number = np.random.default_rng(1).permutation(60)
    renumbered = smoothed(60, number[i], number[j], probability)
    np.testing.assert_allclose(renumbered, smoothed(60, i, j, probability), atol=1e-6)


def test_no_pairs_and_no_items() -> None:
    none = np.empty(0, np.int32)
    for items in (0, 3):
        assert smoothed(items, none, none, np.empty(0, np.float32)).shape == (0,)


def test_blocks_cover_every_row_once() -> None:
    cost = np.array([3, 0, 4, 9, 1, 1])
    assert list(row_blocks(cost, 7)) == [(0, 3), (3, 4), (4, 6)]
    assert list(row_blocks(cost[:0], 7)) == []
