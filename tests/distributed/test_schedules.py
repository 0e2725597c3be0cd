"""Random schedules of kills and world sizes: what all attempts took together is the one order.

The processes of an attempt are played one after the other, each with its own plan and its own
DataLoader with real workers, and cut off with batches still in flight.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from dist_train.config.training import ImageTraining
from dist_train.encoders.batches import Batch, load
from dist_train.training.data import TrainingItems, training_items
from shards.read.shard_set import Item, ShardSet
from shards.storage.errors import BadInput
from tests.support.many_items import many_items

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
WORLDS = (1, 2, 3, 4, 6, 8, 12)
BATCHES = {10007: (240, 360, 250), 1009: (24, 120, 96), 101: (12, 16, 48), 7: (24, 12, 8)}
MODES = ({"order": "global"}, {"order": "window"}, {"photos_per_product": 2})
SCHEDULES = [*range(3), *(pytest.param(n, marks=pytest.mark.full) for n in range(3, 60))]


class Seeds:
    """In the place of a model's inputs: the augmentation seeds that they would be made with."""

    needs_photo: ClassVar[bool] = False

    def __call__(self, items: list[Item], seeds: list[int]) -> tuple[torch.Tensor, ...]:
        assert all(item.title for item in items)
        return (torch.tensor(seeds),)


def drawn_items(shards: Path, draw: random.Random, number: int) -> TrainingItems:
    """A training of three epochs on a prime number of items, in each of the orders in turn."""
    N = draw.choice([10007, 10007, 1009, 101, 7])
    mode = MODES[number % len(MODES)]
    config = ImageTraining(batch_size=draw.choice(BATCHES[N]), seed=number, epochs=3, **mode)
    classes = np.random.default_rng(number).integers(0, max(2, N // 5), N)
    reader = many_items(shards, N, classes)
    return TrainingItems(reader, np.arange(N), int(classes.max()) + 1, config, "f" * 64)


def rank_batches(
    items: TrainingItems, position: int, rank: int, world: int, workers: int
) -> Iterator[Batch]:
    """What one process reads from `position` on until it is killed."""
    size = items.config.batch_size
    plans = items.plans(position // size, items.steps, rank, world)
    return load(items.reader, Seeds(), plans, workers)


def attempt(
    items: TrainingItems, position: int, steps: int, world: int, draw: random.Random
) -> tuple[list[int], list[int]]:
    """Items and seeds of `steps` steps, in the order of the global batches; then it is killed."""
    per_rank = []
    for rank in range(world):
        batches = rank_batches(items, position, rank, world, draw.randint(0, 5))
        per_rank.append(list(islice(batches, steps)))
        for _ in islice(batches, draw.randint(0, 2)):
            pass  # a step that nobody finished
        del batches  # its workers end
    whole = [batch for step in zip(*per_rank, strict=True) for batch in step]
    return (
        [int(n) for batch in whole for n in batch.items],
        [int(n) for batch in whole for n in batch.inputs[0]],
    )


@pytest.mark.parametrize("number", SCHEDULES)
def test_killed_and_resized_it_takes_every_item_in_the_one_order(
    number: int, shard_set: Path
) -> None:
    draw = random.Random(number)
    items = drawn_items(shard_set, draw, number)
    size, photos = items.config.batch_size, items.config.photos_per_product
    worlds = [world for world in WORLDS if size % (world * photos) == 0]
    taken, seeds, saved = [], [], items.state.to_json()
    while (position := items.state.check_goes_on(saved, "state.json")) < items.steps * size:
        left = items.steps - position // size
        steps = min(left, draw.choice([0, 1, *(draw.randint(1, items.steps) for _ in range(4))]))
        items_taken, seeds_taken = attempt(items, position, steps, draw.choice(worlds), draw)
        taken += items_taken
        seeds += seeds_taken
        saved = items.state.at(position + steps * size).to_json()
    undisturbed = list(items.plans(0, items.steps, 0, 1))
    assert taken == np.concatenate([plan.items for plan in undisturbed]).tolist()
    assert seeds == np.concatenate([plan.seeds for plan in undisturbed]).tolist()
    length = items.order.positions
    for epoch in range(3):
        times = np.bincount(taken[epoch * length : (epoch + 1) * length])
        assert len(times) == len(items.numbers)
        assert times.min() == 1
        assert photos > 1 or times.max() == 1


@pytest.mark.parametrize("photos", [1, 2])
def test_every_world_that_cuts_the_batch_is_taken_and_every_other_refused(
    photos: int, shard_set: Path
) -> None:
    shards = ShardSet(shard_set)
    for size in (250, *range(2, 50, 2)):
        config = ImageTraining(batch_size=size, photos_per_product=photos)
        for world in range(1, 14):
            if size % (world * photos) == 0:
                items = training_items(shards, "image", config, world)
                (plan,) = items.plans(0, 1, world - 1, world)
                assert len(plan.items) == size // world
                continue
            unit = world * photos
            with pytest.raises(BadInput, match=f"multiple of {unit}, the nearest is") as refused:
                training_items(shards, "image", config, world)
            nearest = int(str(refused.value).rpartition(" ")[2])
            assert nearest % unit == 0 < nearest
            assert abs(nearest - size) <= unit / 2 or nearest == unit > size


def test_another_batch_size_goes_on_in_the_same_order(shard_set: Path) -> None:
    reader, numbers = many_items(shard_set, 1009), np.arange(1009)

    def items(size: int) -> TrainingItems:
        config = ImageTraining(batch_size=size, seed=4)
        return TrainingItems(reader, numbers, 2, config, "f" * 64)

    taken, position = [], 0
    # Each size divides the position that it begins at; the last ones reach into further epochs.
    for size in (24, 8, 16, 48, 32, 64, 96, 36, 27, 117, 52, 260, 195, 39, 507, 1521):
        step, rest = divmod(position, size)
        assert rest == 0
        saved = items(24).state.at(position).to_json()
        assert items(size).state.check_goes_on(saved, "state.json") == position
        taken += [int(n) for plan in items(size).plans(step, step + 1, 0, 1) for n in plan.items]
        position += size
    assert taken == items(1).order.at(np.arange(position)).tolist()
