"""The order of training items, and learning rates and margin as functions of the step."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config.training import HeadOptions, ImageTraining, TextTraining
from dist_train.heads.class_parallel import MarginHead
from dist_train.training.data import TrainingItems, training_items
from dist_train.training.optimisation import (
    Schedule,
    clip_head,
    encoder_optimizer,
    head_optimizer,
)
from dist_train.training.setup import Progress
from dist_train.training.validation import Validator
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput
from tests.support.many_items import many_items

WORLDS = (1, 2, 4)


def items_of(N: int, batch: int, accumulation: int = 1, seed: int = 0, **options):
    """Items numbered with gaps, as where some postings lack the part."""
    config = ImageTraining(batch_size=batch, accumulation=accumulation, seed=seed, **options)
    numbers = np.arange(N) * 3 + 1
    return TrainingItems(None, numbers, 5, config, "f" * 64)  # these plans need no reader


def products_of(shard_set, sizes, batch: int, photos: int, accumulation: int = 1, **options):
    """Items of products of these sizes, in random places."""
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    config = ImageTraining(
        batch_size=batch, photos_per_product=photos, accumulation=accumulation, **options
    )
    reader = many_items(shard_set, len(ids), ids)
    return TrainingItems(reader, np.arange(len(ids)), len(sizes), config, "f" * 64)


def global_passes(items: TrainingItems, first: int, last: int, world: int):
    """Each forward pass over all ranks, in rank order: item numbers and seeds."""
    ranks = [items.plans(first, last, rank, world) for rank in range(world)]
    return [
        tuple(np.concatenate([getattr(p, what) for p in passes]) for what in ("items", "seeds"))
        for passes in zip(*ranks, strict=True)
    ]


def flat(passes, what: int = 0) -> np.ndarray:
    return np.concatenate([one[what] for one in passes])


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 200), st.integers(0, 99), st.integers(0, 5))
def test_every_pass_is_the_same_for_any_world(N, seed, first):
    for accumulation in (1, 2):
        items = items_of(N, 16, accumulation, seed)
        one, two, four = (global_passes(items, first, first + 4, world) for world in WORLDS)
        assert len(one) == 4 * accumulation
        for a, b, c in zip(one, two, four, strict=True):
            for what in (0, 1):
                np.testing.assert_array_equal(a[what], b[what])
                np.testing.assert_array_equal(a[what], c[what])


@given(st.integers(3, 100), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_accumulation_only_cuts_a_step(N, seed):
    whole = global_passes(items_of(N, 16, 1, seed), 0, 5, 1)
    halves = global_passes(items_of(N, 16, 2, seed), 0, 5, 1)
    for what in (0, 1):
        np.testing.assert_array_equal(flat(whole, what), flat(halves, what))
    assert {len(p[0]) for p in halves} == {8}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 120), st.integers(0, 99), st.sampled_from(WORLDS))
def test_every_item_once_an_epoch_and_the_tail_carried(N, seed, world):
    items = items_of(N, 8, 1, seed)
    steps = -(-3 * N // 8)
    taken = flat(global_passes(items, 0, steps, world))
    for epoch in range(3):
        assert sorted(taken[epoch * N : (epoch + 1) * N]) == items.numbers.tolist()
    assert set(taken) <= set(items.numbers)


def test_epochs_are_shuffled_apart_and_by_the_seed():
    first = flat(global_passes(items_of(64, 8), 0, 16, 1))
    assert first[:64].tolist() != first[64:].tolist()
    assert first[:64].tolist() != sorted(first[:64])
    assert first.tolist() != flat(global_passes(items_of(64, 8, seed=1), 0, 16, 1)).tolist()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_plans_of_some_steps_are_a_slice_of_all(data):
    accumulation = data.draw(st.sampled_from([1, 2]))
    items = items_of(data.draw(st.integers(2, 90)), 8, accumulation)
    first = data.draw(st.integers(0, 20))
    last = data.draw(st.integers(first, 20))
    for rank in range(2):
        whole = list(items.plans(0, 20, rank, 2))[first * accumulation : last * accumulation]
        some = list(items.plans(first, last, rank, 2))
        assert len(some) == len(whole)
        for a, b in zip(some, whole, strict=True):
            np.testing.assert_array_equal(a.items, b.items)
            np.testing.assert_array_equal(a.seeds, b.seeds)


def test_augmentation_seeds_belong_to_the_position():
    seeds = flat(global_passes(items_of(50, 10), 0, 50, 1), 1)
    assert len(np.unique(seeds)) == len(seeds)
    assert seeds.min() >= 0
    assert seeds.max() < 2**32


@given(st.integers(1, 500), st.floats(0, 20), st.sampled_from([1, 7, 64]))
def test_steps_cover_the_epochs(N, epochs, batch):
    items = items_of(N, batch, epochs=epochs)
    wanted = round(epochs * N)
    assert items.steps * batch >= wanted > (items.steps - 1) * batch or items.steps == wanted == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(0, 99), st.sampled_from(WORLDS))
def test_windows_take_every_item_once_an_epoch_for_any_world(N, seed, world):
    items = items_of(N, 8, 1, seed, order="window")
    assert items.state.mode["order"] == "window"
    passes = global_passes(items, 0, -(-2 * N // 8), world)
    np.testing.assert_array_equal(flat(passes), flat(global_passes(items, 0, len(passes), 1)))
    for epoch in range(2):
        assert sorted(flat(passes)[epoch * N : (epoch + 1) * N]) == items.numbers.tolist()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_hold_whole_groups_of_a_product(shard_set, accumulation):
    items = products_of(shard_set, [5, 1, 2, 9, 3, 3] * 8, 24, 3, accumulation)
    classes = items.reader.records["class_id"]
    for world in (1, 2, 4):
        for rank in range(world):
            for plan in items.plans(0, 12, rank, world):
                groups = classes[plan.items].reshape(-1, 3)
                assert (groups == groups[:, :1]).all()
        one, many = (flat(global_passes(items, 0, 12, w)) for w in (1, world))
        np.testing.assert_array_equal(one, many)


def test_epochs_of_products_count_the_positions_that_they_have(shard_set):
    sizes = [1, 2, 3, 4, 5, 6]  # groups of three: 1 1 1 2 2 2
    items = products_of(shard_set, sizes, 6, 3, epochs=4.0)
    assert items.order.positions == 9 * 3
    assert items.steps == 4 * 27 // 6
    training = SimpleNamespace(items=items, progress=Progress())
    validator = Validator(training, None, None, None)
    due = [step for step in range(items.steps + 1) if validator.is_due(step)]
    assert due == [0, 5, 9, 14, 18]  # after every 27 / 6 steps
    taken = flat(global_passes(items, 0, items.steps, 1))
    for epoch in range(4):
        assert set(taken[epoch * 27 : (epoch + 1) * 27]) == set(range(21))


def test_windows_of_products_are_refused():
    with pytest.raises(BadInput, match="choose one of them"):
        ImageTraining(order="window", photos_per_product=2)
    with pytest.raises(BadInput, match="photos_per_product"):
        ImageTraining(photos_per_product=0)


class _Counting:
    """An order that notes the positions requested."""

    def __init__(self, order):
        self.order, self.requested = order, []

    def at(self, positions):
        self.requested.append(positions.copy())
        return self.order.at(positions)


@pytest.mark.parametrize("order", ["global", "window", "none"])
def test_the_first_batch_asks_for_as_many_positions_wherever_it_is(order):
    N, requested = 10_000_000, []
    for step in (0, int(0.99 * N) // 256):
        items = items_of(N, 256, order=order)
        counting = _Counting(items.order)
        items.__dict__["order"] = counting
        list(items.plans(step, step + 1, 1, 2))
        requested.append(counting.requested)
    first, late = requested
    assert (
        [len(positions) for positions in first] == [len(positions) for positions in late] == [128]
    )
    assert late[0][0] == int(0.99 * N) // 256 * 256 + 128


@pytest.mark.parametrize("options", [{"order": o} for o in ("global", "window", "none")])
def test_the_state_of_a_huge_training_is_small(options):
    state = items_of(10_000_000, 4096, **options).state
    assert len(json.dumps(state.at(10**13).to_json())) < 1000


def test_the_same_crops_come_at_the_same_position_in_any_order_and_batch(shard_set):
    batches = (
        items_of(50, 12), items_of(50, 24, 2), items_of(50, 12, order="window"),
        products_of(shard_set, [3] * 20, 12, 3),
    )  # fmt: skip
    seeds = [flat(global_passes(items, 0, 10, 2), 1)[:120] for items in batches]
    for other in seeds[1:]:
        np.testing.assert_array_equal(seeds[0], other)
    later = flat(global_passes(batches[0], 3, 4, 4), 1)
    np.testing.assert_array_equal(later, seeds[0][36:48])
    assert (flat(global_passes(items_of(50, 12, seed=1), 0, 10, 2), 1) != seeds[0]).all()


def test_a_batch_that_does_not_divide_is_refused(shard_set):
    shards = ShardSet(shard_set)
    for world, accumulation, batch in ((3, 1, 16), (4, 2, 12)):
        config = ImageTraining(batch_size=batch, accumulation=accumulation)
        unit = world * accumulation
        message = f"batch_size {batch} does not divide .* multiple of {unit}, the nearest is "
        with pytest.raises(BadInput, match=message + str(16 if batch == 12 else 15)):
            training_items(shards, "image", config, world)
    with pytest.raises(BadInput, match="no multiple of accumulation"):
        ImageTraining(batch_size=10, accumulation=4)


@pytest.mark.parametrize(
    ("modality", "config"), [("image", ImageTraining()), ("text", TextTraining())]
)
def test_training_items_are_those_of_the_train_split(shard_set, modality, config):
    shards = ShardSet(shard_set)
    items = training_items(shards, modality, config, 1)
    table = shards.packed
    assert items.numbers.tolist() == np.flatnonzero(table.split == "train").tolist()
    assert items.classes == table.label_group[table.split == "train"].nunique()
    some = items.reader[int(items.numbers[3])]
    assert some.posting_id == table.posting_id[items.numbers[3]]
    assert some.class_id == table.class_id[items.numbers[3]] >= 0


# Schedule


def schedule_of(steps: int, **options):
    head = {name: options.pop(name) for name in ("ramp", "head_warmup") if name in options}
    of_head = HeadOptions(ramp=head.get("ramp", 0.3), warmup=head.get("head_warmup"))
    config = ImageTraining(head=of_head, **options)
    linear = torch.nn.Linear(3, 3)
    head = MarginHead(classes=4, width=3, loss="arcface", scale=8, chunk=4, seed=0)
    optimizers = encoder_optimizer(linear, config), head_optimizer(head, config)
    return Schedule(*optimizers, config, steps), optimizers, config


def rates(optimizers) -> list[float]:
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def betas(optimizers) -> list[tuple[float, float]]:
    return [group["betas"] for optimizer in optimizers for group in optimizer.param_groups]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1),
    st.sampled_from(["cosine", "one-cycle"]),
)  # fmt: skip
def test_a_step_needs_no_steps_before_it(steps, warmup, ramp, freeze, kind):
    options = {"warmup": warmup, "ramp": ramp, "freeze": freeze, "schedule": kind}
    walked, walked_optimizers, _ = schedule_of(steps, **options)
    for step in range(steps):
        margin = walked.apply(step)
        jumped, jumped_optimizers, _ = schedule_of(steps, **options)
        assert jumped.apply(step) == margin
        assert rates(jumped_optimizers) == rates(walked_optimizers)
        assert betas(jumped_optimizers) == betas(walked_optimizers)


@pytest.mark.parametrize(("steps", "rising"), [(200, 0.3), (37, 0.1), (11, 0.5)])
def test_one_cycle_is_that_of_torch(steps, rising):
    schedule, optimizers, config = schedule_of(steps, schedule="one-cycle", warmup=rising)
    theirs = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=config.lr)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=config.lr, total_steps=steps, pct_start=rising
    )
    for step in range(steps):
        schedule.apply(step)
        assert rates(optimizers)[0] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        wanted = theirs.param_groups[0]["betas"]
        assert betas(optimizers)[0] == pytest.approx(wanted, rel=1e-9)
        theirs.step()
        if step + 1 < steps:
            torchs.step()


def test_a_frozen_encoder_stands_still_while_the_head_learns():
    schedule, optimizers, _ = schedule_of(50, freeze=0.2, warmup=0.0)
    thawed, others, _ = schedule_of(40, warmup=0.0)
    for step in range(50):
        schedule.apply(step)
        assert optimizers[1].param_groups[0]["lr"] > 0
        if step < 10:
            assert rates(optimizers[:1]) == [0, 0]
        else:
            thawed.apply(step - 10)
            assert rates(optimizers[:1]) == rates(others[:1])


def test_the_head_has_a_warm_up_of_its_own():
    schedule, optimizers, _ = schedule_of(100, warmup=0.5, head_warmup=0.1)
    seen = []
    for step in range(100):
        schedule.apply(step)
        seen.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    assert np.argmax(seen, axis=0).tolist() == [50, 10]


def test_rates_rise_to_the_peak_and_fall_in_a_cosine():
    schedule, optimizers, config = schedule_of(100, warmup=0.1)
    seen = []
    for step in range(100):
        schedule.apply(step)
        seen.append(optimizers[0].param_groups[0]["lr"])
        head_lr = optimizers[1].param_groups[0]["lr"]
        assert head_lr == pytest.approx(seen[-1] * config.head.lr / config.lr)
    assert max(seen) == pytest.approx(config.lr) == seen[10]
    assert seen[:10] == pytest.approx([config.lr * (step + 1) / 11 for step in range(10)])
    assert (np.diff(seen[10:]) < 0).all()
    for step in range(10, 100):
        expected = config.lr * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert seen[step] == pytest.approx(expected)


def test_every_group_of_weights_follows():
    schedule, optimizers, config = schedule_of(10, warmup=0.0)
    assert {group["weight_decay"] for group in optimizers[0].param_groups} == {0, 0.01}
    schedule.apply(0)
    assert rates(optimizers) == [config.lr, config.lr, config.head.lr]


def test_the_margin_grows_over_its_ramp_and_stays():
    schedule, _, config = schedule_of(100, ramp=0.3)
    margins = [schedule.apply(step) for step in range(100)]
    np.testing.assert_allclose(margins[:30], config.head.margin * np.arange(1, 31) / 30)
    assert margins[30:] == [config.head.margin] * 70
    at_once, _, _ = schedule_of(100, ramp=0.0)
    assert at_once.apply(0) == config.head.margin
    to_the_end, _, _ = schedule_of(100, ramp=1.0)
    margins = [to_the_end.apply(step) for step in range(100)]
    np.testing.assert_allclose(margins, config.head.margin * np.arange(1, 101) / 100)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_the_head_gradient_is_cut_to_the_limit(limit):
    head = MarginHead(classes=6, width=3, loss="arcface", scale=8, chunk=4, seed=0)
    grad = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 10
    head.weight.grad = grad.clone()
    assert clip_head(head, limit).item() == pytest.approx(grad.norm().item())
    wanted = grad * min(1.0, limit / grad.norm().item())
    torch.testing.assert_close(head.weight.grad, wanted)
