"""The order of items: a permutation an epoch, a function of (N, seed, position) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import Order

SIZES = [1, 2, 3, 4, 5, 8, 13, 64, 127, 128, 129, 1000, 4096, 10007]
FROZEN = [5, 1, 9, 3, 6, 0, 8, 7, 2, 4]


def epoch(items: int, seed: int, number: int, shuffle: bool = True) -> np.ndarray:
    places = np.arange(number * items, (number + 1) * items)
    return Order(items, seed, shuffle).at(places)


@pytest.mark.parametrize("items", SIZES)
def test_every_epoch_takes_every_item_once(items: int) -> None:
    for number in (0, 1, 2, 1_000_003):
        assert np.array_equal(np.sort(epoch(items, 7, number)), np.arange(items))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(-(2**40), 2**63), st.integers(0, 10**6))
def test_bijection_for_any_size_seed_and_epoch(items: int, seed: int, number: int) -> None:
    assert np.array_equal(np.sort(epoch(items, seed, number)), np.arange(items))


@pytest.mark.full
def test_bijection_for_every_small_size() -> None:
    for items in range(1, 1100):
        for number in range(3):
            assert np.array_equal(np.sort(epoch(items, items, number)), np.arange(items)), items


@pytest.mark.parametrize("items", [64, 127, 1000, 10007])
def test_epochs_and_seeds_differ(items: int) -> None:
    first = epoch(items, 0, 0)
    for other in (epoch(items, 0, 1), epoch(items, 0, 2), epoch(items, 1, 0), np.arange(items)):
        # Two independent permutations agree in about one place.
        assert (first == other).sum() < 10


def test_shuffled_order_shows_no_trend() -> None:
    items = 10007
    for number in range(4):
        correlation = np.corrcoef(np.arange(items), epoch(items, 3, number))[0, 1]
        assert abs(correlation) < 0.05  # five standard deviations of chance


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 500), st.integers(0, 99), st.integers(0, 500), st.integers(0, 200))
def test_any_slice_of_positions_equals_the_whole(
    items: int, seed: int, start: int, length: int
) -> None:
    order = Order(items, seed)
    whole = order.at(np.arange(700))
    assert np.array_equal(order.at(np.arange(start, start + length)), whole[start:][:length])


def test_positions_may_come_in_any_order_and_shape() -> None:
    order = Order(97, 5)
    positions = np.random.default_rng(0).integers(0, 10 * 97, (4, 33))
    expected = [[int(order.at(np.array([p]))[0]) for p in row] for row in positions]
    assert order.at(positions).tolist() == expected
    assert int(order.at(np.int64(31))) == int(order.at(np.arange(97))[31])


def test_strided_shares_of_ranks_make_up_the_whole() -> None:
    order, positions = Order(61, 2), np.arange(300)
    shares = np.empty(300, np.int64)
    for rank in range(7):
        shares[rank::7] = order.at(positions[rank::7])
    assert np.array_equal(shares, order.at(positions))


def test_without_shuffle_items_stay_as_they_lie() -> None:
    assert np.array_equal(Order(5, 9, shuffle=False).at(np.arange(12)), np.arange(12) % 5)


def test_positions_beyond_32_bits_work() -> None:
    items, start = 10007, 10007 * 2**35
    taken = Order(items, 0).at(np.arange(start, start + items))
    assert np.array_equal(np.sort(taken), np.arange(items))


def test_order_is_frozen() -> None:
    # A run is resumed by its position alone: this order may never change.
    assert Order(10, 0).at(np.arange(10)).tolist() == FROZEN
