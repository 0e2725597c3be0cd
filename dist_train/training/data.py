"""The training items in their order: which make each forward pass of a step, and how photos mix.

Everything is a function of (seed, position or step), so the number of processes changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch

from dist_train.config.training import ImageTraining, Modality, TrainingOptions, check_batch
from dist_train.encoders.batches import BatchPlan
from shards.order.global_order import Order, OrderState, StoredOrder, WindowOrder
from shards.order.product_order import ProductOrder
from shards.read.shard_set import ItemReader, ShardSet
from shards.storage.errors import BadInput


@dataclass(frozen=True)
class TrainingItems:
    """Items of the train split that have the modality, and the order in which they are served."""

    reader: ItemReader
    numbers: np.ndarray
    """Item numbers in `reader`, ascending (n,)."""
    classes: int
    config: TrainingOptions
    fingerprint: str
    """Fingerprint of the shard set."""
    class_names: np.ndarray = field(default_factory=lambda: np.zeros(0, str))
    """Label group of each class (C,)."""

    @cached_property
    def order(self) -> Order:
        """Maps positions to indices into `numbers`."""
        config = self.config
        if (photos := config.photos_per_product) > 1:
            class_ids = self.reader.records["class_id"][self.numbers]
            return ProductOrder(class_ids, config.seed, config.batch_size // photos, photos)
        kind = {"global": Order, "window": WindowOrder, "none": StoredOrder}[config.order]
        return kind(len(self.numbers), config.seed)

    @property
    def state(self) -> OrderState:
        """Position in the order before the first step."""
        seed, batch = self.config.seed, self.config.batch_size
        return OrderState(
            fingerprint=self.fingerprint, seed=seed, mode=self.order.mode, batch=batch
        )

    @property
    def steps(self) -> int:
        """Steps of the complete training; the last epoch's tail runs on into the next order."""
        return -(-round(self.config.epochs * self.order.positions) // self.config.batch_size)

    def plans(self, first: int, last: int, rank: int, world: int) -> Iterator[BatchPlan]:
        """This rank's forward passes of the steps `first` to `last` - 1: `accumulation` a step.

        A pure function of (seed, position): rank r takes the r-th slice of each global pass.
        Planned one by one, so that starting costs the same at any position.
        """
        passes, seed = self.config.accumulation, self.config.seed
        share = self.config.batch_size // (passes * world)
        for number in range(first * passes, last * passes):
            start = (number * world + rank) * share
            positions = np.arange(start, start + share, dtype=np.int64)
            keys = [blake2b(f"{seed}:{p}".encode(), digest_size=4) for p in positions]
            seeds = np.array([int.from_bytes(key.digest(), "big") for key in keys], np.int64)
            yield BatchPlan(self.numbers[self.order.at(positions)], seeds)


def training_items(
    shards: ShardSet, modality: Modality, config: TrainingOptions, world: int
) -> TrainingItems:
    """The training items of `shards`.

    Raises BadInput when there are too few, or when a batch does not divide among `world` ranks; an
    encoder that is not trained needs neither.
    """
    trains = config.epochs > 0
    if trains:
        check_batch(config, world)
    table = shards.packed
    train = table[(table.split == "train") & table[f"has_{modality}"]]
    classes = int(shards.manifest["counts"]["classes"])
    if trains and classes < 2:
        raise BadInput(
            f"{shards.location}: {classes} label groups to train on; there must be two (--epochs 0 "
            "needs none: it exports the encoder as it is)"
        )
    if trains and not len(train):
        missing = {"image": "an image", "text": "a title"}[modality]
        raise BadInput(
            f"{shards.location}: no training item has {missing}; train the other encoder"
        )
    labelled = table[table.class_id >= 0]
    names = np.full(classes, "", object)
    names[labelled.class_id.to_numpy()] = labelled.label_group.to_numpy()
    numbers = train.index.to_numpy()
    items = TrainingItems(
        shards.reader(), numbers, classes, config, shards.fingerprint, names.astype(str)
    )
    if trains and not items.steps:
        raise BadInput(
            f"epochs {config.epochs} of {len(numbers)} training items are no step; give more, or 0 "
            "to export the encoder as it is"
        )
    return items


@dataclass(frozen=True)
class Mix:
    """How the photos of one step are mixed in pairs: each keeps its own `share`.

    The margin belongs to the angle between an item and one class, so a mixed photo goes to the head
    twice: share x loss with its own class + (1 - share) x loss with its partner's. Zhang et al.,
    mixup (ICLR 2018); Yun et al., CutMix (ICCV 2019).
    """

    share: float
    box: tuple[slice, slice] | None
    """Rows and columns that show the partner; None: both photos everywhere, weighted."""
    stride: int
    """Distance between partners in a batch: items of one product are no partners."""

    def photos(self, photos: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W), each mixed with its partner."""
        others = self.partners(photos)
        if self.box is None:
            return self.share * photos + (1 - self.share) * others
        mixed = photos.clone()
        mixed[..., *self.box] = others[..., *self.box]
        return mixed

    def partners(self, values: torch.Tensor) -> torch.Tensor:
        """The values (b, ...) of each item's partner, a neighbour in the global order."""
        return values.unflatten(0, (-1, 2, self.stride)).flip(1).flatten(0, 2)


def mix_of_step(config: TrainingOptions, side: int, step: int) -> Mix | None:
    """The mix of `step` for photos of `side` pixels; None if no mixing is requested."""
    if not isinstance(config, ImageTraining) or not config.mixes:
        return None
    rng = np.random.default_rng([config.seed, step])
    cuts = config.cutmix > 0 and (config.mixup == 0 or rng.random() < 0.5)
    alpha = config.cutmix if cuts else config.mixup
    share, stride = float(rng.beta(alpha, alpha)), config.photos_per_product
    if not cuts:
        return Mix(share, None, stride)
    box = []
    for _ in ("rows", "columns"):
        # A stretch about any middle, as far as it lies inside the photo.
        middle, half = rng.integers(side), round(side * np.sqrt(1 - share)) // 2
        box.append(slice(int(max(0, middle - half)), int(min(side, middle + half))))
    rows, columns = box
    hidden = (rows.stop - rows.start) * (columns.stop - columns.start) / side**2
    return Mix(1 - hidden, (rows, columns), stride)
