"""The training items in their order: which items make each forward pass of each step."""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
import pandas as pd

from dist_train.config import TrainingOptions, View
from dist_train.encoders.batches import BatchPlan
from shards.errors import BadInput
from shards.order import Order, StoredOrder, WindowOrder
from shards.order_state import OrderState
from shards.product_order import ProductOrder
from shards.reader import ItemReader, ShardSet


@dataclass(frozen=True)
class TrainingItems:
    """Train-split items that have the part, and the order they come in."""

    reader: ItemReader
    numbers: np.ndarray
    classes: int
    config: TrainingOptions
    fingerprint: str
    """Of the shard set."""
    class_names: np.ndarray = field(default_factory=lambda: np.zeros(0, str))
    """Label group of each class (C,)."""

    @cached_property
    def order(self) -> Order | ProductOrder:
        """Position to place in `numbers`."""
        config = self.config
        if (photos := config.photos_per_product) > 1:
            class_ids = self.reader.records["class_id"][self.numbers]
            return ProductOrder(class_ids, config.seed, config.batch_size // photos, photos)
        kind = {"global": Order, "window": WindowOrder, "none": StoredOrder}[config.order]
        return kind(len(self.numbers), config.seed)

    @property
    def state(self) -> OrderState:
        """Where the training stands before its first step."""
        return OrderState(
            fingerprint=self.fingerprint, seed=self.config.seed, mode=self.order.mode,
            batch=self.config.batch_size,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Steps of the whole training; the last epoch's tail runs on into the next order."""
        return -(-round(self.config.epochs * self.order.positions) // self.config.batch_size)

    @property
    def epoch_steps(self) -> float:
        """Steps an epoch."""
        return self.order.positions / self.config.batch_size

    def plans(self, first: int, last: int, rank: int, world: int) -> list[BatchPlan]:
        """This rank's forward passes of the steps `first` to `last`: accumulation a step.

        A pure function of (seed, step): rank r takes the r-th slice of each global pass.
        """
        size = self.config.batch_size
        return [p for t in range(first, last) for p in self.plans_at(t * size, rank, world)]

    def plans_at(self, position: int, rank: int, world: int) -> list[BatchPlan]:
        """This rank's forward passes of the one step that begins at `position`."""
        passes = self.config.accumulation
        share = self.config.batch_size // (passes * world)
        starts = [position + (number * world + rank) * share for number in range(passes)]
        return [self._plan(np.arange(start, start + share, dtype=np.int64)) for start in starts]

    def _plan(self, positions: np.ndarray) -> BatchPlan:
        return BatchPlan(self.numbers[self.order.at(positions)], self._seeds(positions))

    def _seeds(self, positions: np.ndarray) -> np.ndarray:
        keys = [blake2b(f"{self.config.seed}:{p}".encode(), digest_size=4) for p in positions]
        return np.array([int.from_bytes(key.digest(), "big") for key in keys], np.int64)


def training_items(
    shards: ShardSet, view: View, config: TrainingOptions, world: int
) -> TrainingItems:
    """The training items of `shards`; BadInput when there are too few or no equal batches."""
    _check_batch(config, world)
    table = shards.packed
    train = table[(table.split == "train") & table[f"has_{view}"]]
    classes = int(shards.manifest["counts"]["classes"])
    if classes < 2:
        raise BadInput(f"{shards.location}: {classes} label groups to train on; there must be two")
    if not len(train):
        part = {"image": "an image", "text": "a title"}[view]
        raise BadInput(f"{shards.location}: no training item has {part}; train the other encoder")
    return TrainingItems(
        shards.reader(), train.index.to_numpy(), classes, config, shards.fingerprint,
        _class_names(table, classes),
    )  # fmt: skip


def _class_names(packed: pd.DataFrame, classes: int) -> np.ndarray:
    """Label group of each class (C,)."""
    train = packed[packed.class_id >= 0]
    names = np.full(classes, "", object)
    names[train.class_id.to_numpy()] = train.label_group.to_numpy()
    return names.astype(str)


def _check_batch(config: TrainingOptions, world: int) -> None:
    size, photos = config.batch_size, config.photos_per_product
    unit = photos * config.accumulation * world
    if size % unit:
        together = f" x {photos} photos of a product" if photos > 1 else ""
        raise BadInput(
            f"batch_size {size} does not divide among {world} processes x accumulation "
            f"{config.accumulation}{together}; choose a multiple of {unit}, the nearest is "
            f"{max(1, round(size / unit)) * unit}"
        )
    rows = size // (config.accumulation * world)
    if config.head_passes > config.accumulation and rows % (2 * photos):
        raise BadInput(
            f"mixup and cutmix pair neighbours: {rows} items a pass and process are no multiple of "
            f"{2 * photos}; choose a batch_size that is one of {2 * unit}"
        )
