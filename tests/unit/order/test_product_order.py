"""P x K batches: K items of a product together, all items every epoch, products distinct."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order.global_order import OrderState
from shards.order.product_order import ProductOrder
from tests.support.digests import digest

FROZEN = [8, 7, 0, 2, 4, 3, 5, 5, 9, 10, 1, 0, 6, 8, 1, 2, 9, 8, 3, 4, 5, 5, 10, 6, 7, 9, 0, 1]
EPOCHS = 4


def catalogue(sizes, seed: int = 0) -> np.ndarray:
    """Class ids with gaps, as where some products have no photo, in random places."""
    ids = np.repeat(np.arange(len(sizes)) * 3 + 2, sizes)
    return np.random.default_rng(seed).permutation(ids)


def batches(order: ProductOrder, ids: np.ndarray, epochs: int = EPOCHS) -> np.ndarray:
    """The products (n, P) of the whole batches of some epochs."""
    taken = ids[order.at(np.arange(epochs * order.positions))].reshape(-1, order.photos)
    assert (taken == taken[:, :1]).all()  # a group is of one product
    whole = len(taken) // order.products * order.products
    return taken[:whole, 0].reshape(-1, order.products)


def repeats(of_batches: np.ndarray) -> int:
    """Places in batches that hold a product a second time."""
    return sum(len(batch) - len(np.unique(batch)) for batch in of_batches)


sizes_of_products = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@settings(max_examples=80, deadline=None)
@given(sizes_of_products, st.integers(1, 20), st.integers(1, 6), st.integers(0, 9))
def test_every_item_comes_every_epoch_and_no_more_than_its_class_needs(sizes, P, K, seed) -> None:
    ids = catalogue(sizes, seed)
    order = ProductOrder(ids, seed, P, K)
    groups = -(-np.array(sizes) // K)
    assert order.positions == groups.sum() * K
    for epoch in range(EPOCHS):
        places = np.arange(epoch * order.positions, (epoch + 1) * order.positions)
        times = np.bincount(order.at(places), minlength=len(ids))
        assert times.min() >= 1
        for number, (size, count) in enumerate(zip(sizes, groups, strict=True)):
            mine = times[ids == number * 3 + 2]
            assert mine.sum() == count * K
            assert mine.max() <= -(-count * K // size)


@settings(max_examples=80, deadline=None)
@given(sizes_of_products, st.integers(1, 20), st.integers(1, 6))
def test_a_group_repeats_an_item_only_where_the_product_has_too_few(sizes, P, K) -> None:
    ids = catalogue(sizes)
    order = ProductOrder(ids, 1, P, K)
    for group in order.at(np.arange(2 * order.positions)).reshape(-1, K):
        assert len(np.unique(group)) == min(K, (ids == ids[group[0]]).sum())


def whole_batches(order: ProductOrder) -> int:
    return min(order._cut(epoch)[1] for epoch in range(EPOCHS))


@settings(max_examples=200, deadline=None)
@given(sizes_of_products, st.integers(1, 20), st.integers(1, 6), st.integers(0, 99))
def test_products_are_distinct_in_a_batch_as_promised(sizes, P, K, seed) -> None:
    ids = catalogue(sizes, seed)
    order = ProductOrder(ids, seed, P, K)
    if len(sizes) >= 2 * P and order.groups.max() <= whole_batches(order):
        assert repeats(batches(order, ids)) == 0


@pytest.mark.parametrize("P", [1, 2, 7, 16, 32])
@pytest.mark.parametrize("K", [2, 4])
def test_the_promise_holds_where_it_is_tight(P: int, K: int) -> None:
    # Some products have exactly as many groups as there are whole batches, others one.
    hits = 0
    for wide in range(1, 4 * P):
        sizes = [9 * K] * P + [1] * wide
        ids = catalogue(sizes, wide)
        order = ProductOrder(ids, wide, P, K)
        if len(sizes) >= 2 * P and whole_batches(order) >= 9:
            assert repeats(batches(order, ids)) == 0
            hits += 1
    assert hits


@pytest.mark.parametrize(
    ("big", "others", "P"), [(100, 40, 8), (57, 3, 4), (31, 0, 4), (500, 9, 7)]
)
def test_a_product_with_more_groups_than_batches_is_spread_evenly(big, others, P) -> None:
    ids = catalogue([big * 3, *[3] * others])
    order = ProductOrder(ids, 0, P, 3)
    groups = batches(order, ids, epochs=1)  # the first epoch begins with a batch
    held = (groups == 2).sum(1)
    assert held.max() - held.min() <= 1
    others_only = [batch[batch != 2] for batch in groups]
    assert all(len(np.unique(batch)) == len(batch) for batch in others_only)


def test_the_same_products_do_not_meet_again_and_again() -> None:
    ids = catalogue([6] * 300)
    order = ProductOrder(ids, 0, 10, 2)
    of_batches = batches(order, ids)
    assert len(of_batches) == 360
    met = np.zeros((300, 300), np.int64)
    for batch in of_batches // 3:
        met[np.ix_(batch, batch)] += 1
    # 360 x 90 ordered pairs over 300 x 299: a pair meets 0.36 times on average.
    times = met[~np.eye(300, dtype=bool)]
    assert times.max() <= 5
    assert (times > 0).mean() > 0.9 * (1 - np.exp(-times.mean()))


def test_photos_meet_other_photos_of_their_product_in_every_epoch() -> None:
    ids = catalogue([9] * 20)
    order = ProductOrder(ids, 0, 4, 3)
    taken = order.at(np.arange(30 * order.positions)).reshape(-1, 3)
    partners = {tuple(sorted(group)) for group in taken if ids[group[0]] == 2}
    assert len(partners) > 50  # of the 84 triples of nine, 90 groups


@settings(max_examples=60, deadline=None)
@given(sizes_of_products, st.integers(1, 9), st.integers(1, 4), st.data())
def test_a_new_process_at_any_position_goes_on_the_same(sizes, P, K, data) -> None:
    ids = catalogue(sizes)
    whole = ProductOrder(ids, 5, P, K)
    taken = whole.at(np.arange(3 * whole.positions))
    start = data.draw(st.integers(0, 3 * whole.positions - 1))
    end = min(start + P * K, 3 * whole.positions)
    again = ProductOrder(ids, 5, P, K)
    assert np.array_equal(again.at(np.arange(start, end)), taken[start:end])
    backwards = np.arange(3 * whole.positions)[::-1].reshape(-1, 1)
    assert np.array_equal(whole.at(backwards)[::-1, 0], taken)


def test_epochs_and_seeds_differ() -> None:
    ids = catalogue([5] * 400)
    first = ProductOrder(ids, 0, 16, 2)
    E = first.positions
    one, two = first.at(np.arange(E)), first.at(np.arange(E, 2 * E))
    other = ProductOrder(ids, 1, 16, 2).at(np.arange(E))
    assert (one == two).sum() < 15
    assert (one == other).sum() < 15


def test_no_more_than_two_epochs_are_held() -> None:
    order = ProductOrder(catalogue([3] * 50), 0, 7, 2)
    for position in range(0, 10 * order.positions, 14):
        order.at(np.arange(position, position + 14))
        assert len(order._epochs) <= 2


def test_the_state_says_what_the_batches_are() -> None:
    order = ProductOrder(catalogue([3] * 50), 0, 7, 2)
    state = OrderState(fingerprint="f" * 64, seed=0, mode=order.mode, batch=14)
    assert state.to_json()["mode"] == {
        "order": "products", "items": 150, "products": 7, "photos": 2
    }  # fmt: skip
    assert len(json.dumps(state.at(10**15).to_json())) < 300


def test_order_is_frozen() -> None:
    # A run is resumed by its position alone: this order may never change.
    order = ProductOrder(np.array([5, 5, 5, 7, 7, 9, 1, 1, 1, 1, 1]), 0, 2, 2)
    assert order.at(np.arange(28)).tolist() == FROZEN


@pytest.mark.parametrize(
    ("P", "K", "seed", "wanted"),
    [(7, 3, 5, "b378aab5a3cb5b43"), (16, 2, 1, "49f1a2fcf32567b3"), (60, 1, 2, "676e816b758c9145")],
)
def test_orders_of_other_shapes_and_seeds_are_frozen(
    P: int, K: int, seed: int, wanted: str
) -> None:
    """Four epochs over products of 1 to 30 items; as version 0.1 has them."""
    order = ProductOrder(catalogue([1, 2, 3, 4, 5, 9, 12, 30] * 5), seed, P, K)
    assert digest(order.at(np.arange(4 * order.positions))) == wanted


@pytest.mark.full
@pytest.mark.timeout(600)
def test_ten_million_items_take_seconds_and_little_memory() -> None:
    import resource
    import time

    sizes = np.random.default_rng(0).geometric(0.25, 2_600_000)
    ids = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[:10_000_000]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    order = ProductOrder(ids, 0, 64, 4)
    middle = order.positions // 512 * 256
    taken = order.at(np.arange(middle, middle + 256))
    took = time.monotonic() - start
    assert len(np.unique(ids[taken])) == 64
    assert took < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000  # kB
