"""The order of items: a permutation an epoch, a function of (N, seed, position) alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln

from shards.order.global_order import Order, OrderState, StoredOrder, WindowOrder, check_equal
from shards.storage.errors import BadInput
from tests.support.digests import digest

SIZES = [1, 2, 3, 4, 5, 8, 13, 64, 127, 128, 129, 1000, 4096, 10007]
FROZEN = [5, 1, 9, 3, 6, 0, 8, 7, 2, 4]
FROZEN_WINDOW = [3, 4, 6, 5, 1, 2, 8, 0, 7, 9]
WINDOWS = [(16, 2048), (64, 512), (64, 4), (7, 3), (1, 1), (1, 500), (500, 1)]


def epoch(items: int, seed: int, number: int) -> np.ndarray:
    places = np.arange(number * items, (number + 1) * items)
    return Order(items, seed).at(places)


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
    assert np.array_equal(StoredOrder(5).at(np.arange(12)), np.arange(12) % 5)


def test_positions_beyond_32_bits_work() -> None:
    items, start = 10007, 10007 * 2**35
    taken = Order(items, 0).at(np.arange(start, start + items))
    assert np.array_equal(np.sort(taken), np.arange(items))


def test_order_is_frozen() -> None:
    # A run is resumed by its position alone: this order may never change.
    assert Order(10, 0).at(np.arange(10)).tolist() == FROZEN
    assert WindowOrder(10, 0, 2, 2).at(np.arange(10)).tolist() == FROZEN_WINDOW


@pytest.mark.parametrize(
    ("order", "positions", "wanted"),
    [
        (Order(1000, 7), range(5000), "fe4bcfdd21e450d6"),
        (Order(5, 2), range(25), "4a59e96267474318"),
        (Order(10**12, 3), range(5 * 10**12, 5 * 10**12 + 1000), "34181b77b59a3bb4"),
        (WindowOrder(1000, 7, 16, 4), range(5000), "5d04dfd2a4a38643"),
        (WindowOrder(1003, 2, 16, 4), range(5015), "97f79dbb787843b6"),
        (WindowOrder(70, 5, 64, 2), range(350), "06a9930d5029c0b3"),
        (WindowOrder(10**12, 3), range(5 * 10**12 - 500, 5 * 10**12 + 1000), "8f15af4c0aff9ef2"),
    ],
    ids=str,
)
def test_orders_of_other_seeds_epochs_and_sizes_are_frozen(
    order: Order, positions: range, wanted: str
) -> None:
    """What runs that stand in the middle of an order go on with; as version 0.1 has them."""
    assert digest(order.at(np.arange(positions.start, positions.stop))) == wanted


# Windows


@pytest.mark.parametrize("items", [*SIZES, 65, 191, 32768, 70_001])
@pytest.mark.parametrize(("chunk", "chunks"), WINDOWS)
def test_every_epoch_in_windows_takes_every_item_once(items: int, chunk: int, chunks: int) -> None:
    order = WindowOrder(items, 7, chunk, chunks)
    for number in (0, 1, 1_000_003):
        taken = order.at(np.arange(number * items, (number + 1) * items))
        assert np.array_equal(np.sort(taken), np.arange(items))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 900), st.integers(1, 40), st.integers(1, 30), st.integers(0, 9))
def test_windows_of_any_size_are_a_bijection_and_sliceable(items, chunk, chunks, number) -> None:
    order = WindowOrder(items, 3, chunk, chunks)
    places = np.arange(number * items, (number + 1) * items)
    whole = order.at(places)
    assert np.array_equal(np.sort(whole), np.arange(items))
    backwards = np.concatenate([order.at(part) for part in np.array_split(places[::-1], 3)])
    assert np.array_equal(backwards[::-1], whole)


@pytest.mark.parametrize(("items", "chunk", "chunks"), [(10007, 64, 8), (40_000, 16, 40)])
def test_reads_stay_inside_the_regions_of_one_window(items: int, chunk: int, chunks: int) -> None:
    taken = WindowOrder(items, 0, chunk, chunks).at(np.arange(items))
    for start in range(0, items - chunk * chunks // 2, chunk * chunks // 2):
        near = np.sort(taken[start : start + chunk * chunks // 2])
        regions = 1 + int((np.diff(near) > chunk).sum())
        # Two neighbouring windows at most, each of one and a half times `chunks`.
        assert regions <= 3 * chunks
        assert regions > chunks // 4


def test_windows_differ_by_epoch_and_seed_and_move_their_chunks() -> None:
    items = 10007
    first = WindowOrder(items, 0).at(np.arange(2 * items))
    other = WindowOrder(items, 1).at(np.arange(items))
    for one, two in ((first[:items], first[items:]), (first[:items], other)):
        assert (one == two).sum() < 10
    small = WindowOrder(items, 0, 64, 2)
    begins = {int(np.sort(small.at(e * items + np.arange(64)))[0]) % 64 for e in range(20)}
    assert len(begins) > 10


def test_the_short_last_chunk_takes_any_items() -> None:
    # Else the last items of the last shard would always come at the end of the epoch.
    items = 64 * 30 + 5
    order = WindowOrder(items, 0, 64, 2)
    last = [order.at(np.array([e * items + items - 1]))[0] for e in range(40)]
    assert np.std(last) > items / 6


# How well it mixes


def distinct_expected(shards: int, items: int, batch: int) -> float:
    """Distinct shards in a batch drawn without replacement from equal shards (hypergeometric)."""
    others = items - items // shards
    none = gammaln(others + 1) - gammaln(others - batch + 1)
    none += gammaln(items - batch + 1) - gammaln(items + 1)
    return shards * (1 - np.exp(none))


def distinct_shards(order: Order, shards: int, batch: int = 256) -> float:
    """Mean number of shards that a batch of the first epoch reads from, over 300 at the most."""
    begins = np.random.default_rng(0).permutation(order.items // batch)[:300] * batch
    taken = order.at(begins[:, None] + np.arange(batch)) // (order.items // shards)
    return float(np.mean([len(np.unique(part)) for part in taken]))


@pytest.mark.parametrize("shards", [100, 200, 2_000, 10_000])
@pytest.mark.parametrize("items", [500_000, 1_000_000, 10_000_000])
def test_a_batch_reads_from_as_many_shards_as_chance_would(items: int, shards: int) -> None:
    uniform = distinct_expected(shards, items, 256)
    assert distinct_shards(Order(items, 0), shards) == pytest.approx(uniform, rel=0.02)
    assert distinct_shards(WindowOrder(items, 0), shards) >= 0.93 * uniform
    assert distinct_shards(StoredOrder(items), shards) <= 1 + 256 / (items // shards) + 0.5


def test_chance_would_read_from_92_of_100_shards() -> None:
    assert distinct_expected(100, 350_000, 256) == pytest.approx(92.4, abs=0.2)


def test_a_window_of_the_default_size_spans_few_shards() -> None:
    items, at_once = 10_000_000, 20_000
    taken = WindowOrder(items, 0).at(np.arange(at_once))
    near = 1 + int((np.diff(np.sort(taken)) > WindowOrder.chunk).sum())
    assert near <= 1.5 * WindowOrder.chunks  # regions that are read, of 16 items each, and no more
    assert WindowOrder.chunk * WindowOrder.chunks == 2**15


# The state


def state(**other) -> OrderState:
    facts = {"fingerprint": "f" * 64, "seed": 3, "mode": Order(10**12, 3).mode, "batch": 4096}
    return OrderState(**facts | other)


def test_the_state_is_small_and_comes_back() -> None:
    for order in (Order(10**12, 3), WindowOrder(10**12, 3), StoredOrder(10**12)):
        saved = json.dumps(state(mode=order.mode, position=10**15).to_json())
        assert len(saved) < 300
        assert state(mode=order.mode).check_goes_on(json.loads(saved), "there") == 10**15
    assert state(batch=1).check_goes_on(state().at(77).to_json(), "there") == 77


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        ({"fingerprint": "e" * 64}, "fingerprint ffff"),
        ({"seed": 4}, "seed 3 there, 4 now"),
        ({"mode": WindowOrder(10**12, 3).mode}, "mode .*global.* there, .*window.* now"),
        ({"mode": Order(10, 3).mode}, "mode .*1000000000000.* there"),
    ],
)
def test_another_order_is_refused_with_the_difference(other: dict, wanted: str) -> None:
    with pytest.raises(BadInput, match=f"run/step-7: stands in another order: {wanted}"):
        state(**other).check_goes_on(state().to_json(), "run/step-7")


def test_a_state_that_a_training_saved_long_ago_is_still_gone_on_from() -> None:
    # As a checkpoint of this version holds it, to the letter.
    saved = {"format": 1, "fingerprint": "f" * 64, "seed": 3, "batch": 4096, "position": 77,
             "mode": {"order": "window", "items": 9, "chunk": 16, "chunks": 2048}}  # fmt: skip
    ours = state(mode=WindowOrder(9, 3).mode)
    assert ours.check_goes_on(saved, "there") == 77
    assert ours.at(77).to_json() == saved
    assert state().position == 0
    for lost in ("format", "fingerprint", "seed", "mode"):
        without = {name: value for name, value in saved.items() if name != lost}
        with pytest.raises(BadInput, match=f"another order: {lost} None there"):
            ours.check_goes_on(without, "there")
    with pytest.raises(BadInput, match="format 2 there, 1 now"):
        ours.check_goes_on(saved | {"format": 2}, "there")


def test_ranks_that_differ_are_named() -> None:
    ours, other = state().to_json(), state(position=8).to_json()
    check_equal([ours])
    check_equal([ours, ours, ours])
    for states, wanted in (
        ([ours, ours, other], "rank 2 .* position 8 there, 0 on rank 0"),
        ([ours, other, ours], "rank 1 .* position 8 there, 0 on rank 0"),
        ([other, ours, ours], "rank 1 .* position 0 there, 8 on rank 0"),
        ([ours, other, other], "rank 1 .* position 8 there, 0 on rank 0"),
        ([ours, ours | {"more": 1}], "rank 1 .* more 1 there, None on rank 0"),
        ([ours | {"more": 1}, ours], "rank 1 .* more None there, 1 on rank 0"),
    ):
        with pytest.raises(BadInput, match=wanted):
            check_equal(states)
