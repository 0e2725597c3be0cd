"""The training items in their order: which items make each forward pass of each step."""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from dist_train.config import TrainingOptions, View
from dist_train.encoders.batches import BatchPlan
from shards.errors import BadInput
from shards.order import Order
from shards.reader import ItemReader, ShardSet


@dataclass(frozen=True)
class TrainingItems:
    """Train-split items that have the part, and the order they come in."""

    reader: ItemReader
    numbers: np.ndarray
    classes: int
    config: TrainingOptions

    @property
    def steps(self) -> int:
        """Steps of the whole training; the last epoch's tail runs on into the next order."""
        return -(-round(self.config.epochs * len(self.numbers)) // self.config.batch_size)

    @property
    def epoch_steps(self) -> float:
        """Steps an epoch."""
        return len(self.numbers) / self.config.batch_size

    def plans(self, first: int, last: int, rank: int, world: int) -> list[BatchPlan]:
        """This rank's forward passes of the steps `first` to `last`: accumulation a step.

        A pure function of (seed, step): rank r takes the r-th slice of each global pass.
        """
        order = Order(len(self.numbers), self.config.seed)
        passes = self.config.accumulation
        share = self.config.batch_size // (passes * world)
        plans = []
        for number in range(first * passes, last * passes):
            start = (number * world + rank) * share
            positions = np.arange(start, start + share, dtype=np.int64)
            plans.append(BatchPlan(self.numbers[order.at(positions)], self._seeds(positions)))
        return plans

    def _seeds(self, positions: np.ndarray) -> np.ndarray:
        keys = [blake2b(f"{self.config.seed}:{p}".encode(), digest_size=4) for p in positions]
        return np.array([int.from_bytes(key.digest(), "big") for key in keys], np.int64)


def training_items(
    shards: ShardSet, view: View, config: TrainingOptions, world: int
) -> TrainingItems:
    """The training items of `shards`; BadInput when there are too few or no equal batches."""
    if config.batch_size % (config.accumulation * world):
        raise BadInput(
            f"batch_size {config.batch_size} does not divide among {world} processes x "
            f"accumulation {config.accumulation}; choose a multiple of "
            f"{config.accumulation * world}"
        )
    table = shards.packed
    train = table[(table.split == "train") & table[f"has_{view}"]]
    classes = int(shards.manifest["counts"]["classes"])
    if classes < 2:
        raise BadInput(f"{shards.path}: {classes} label groups to train on; there must be two")
    if not len(train):
        part = {"image": "an image", "text": "a title"}[view]
        raise BadInput(f"{shards.path}: no training item has {part}; train the other encoder")
    return TrainingItems(shards.reader(), train.index.to_numpy(), classes, config)
