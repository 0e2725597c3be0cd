"""Batches of items: planned, read and prepared in worker processes in exactly that order, encoded.

An unreadable item never changes the number of steps: in training another item of the same product
replaces it, elsewhere the item is left out; either way the batch says so.
"""

import logging
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from dist_train.config.training import ImageTraining
from shards.catalogue.titles import readable_title
from shards.photos.decode import PhotoRefused, Recipe, decode_photo
from shards.read.shard_set import Item, ItemReader
from shards.storage.errors import BadInput, Corrupt, Failed, Unreadable
from shards.storage.stops import stops_blocked
from shards.storage.workers import leave_stops_to_parent

STAND_INS = 100
"""Items that are tried in place of an unreadable one."""
FEW = 10
"""Unreadable items that are always tolerated: one of twenty says nothing about a million."""
INTACT = 0.01
"""Fraction of the items that may be unreadable although their bytes are those that were packed."""
BROKEN = (Unreadable, PhotoRefused)
"""What reading and decoding raise when only the one item is at fault."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageInputs:
    """From items that have a photo to pixels; a plain value, so that workers can receive it."""

    needs_photo: ClassVar[bool] = True
    image_size: int
    mean: list[float]
    std: list[float]
    decode: Recipe = "balanced"
    augmentation: ImageTraining | None = None
    """Options of the augmentation for training; without them the middle of a photo is taken."""

    def __call__(self, items: list[Item], seeds: list[int]) -> tuple[torch.Tensor, ...]:
        """Pixels (b, 3, S, S) float32; `seeds` (b,) make the augmentation a function of them."""
        side, options = self.image_size, self.augmentation
        if options is None:
            # The middle square, equal to the bit to timm's transform, in a third of the time.
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
            pixels = torch.empty(len(items), 3, side, side)
            for row, item in zip(pixels, items, strict=True):
                photo = np.array(decode_photo(item.photo or b"", side, self.decode))
                top, left = (round((length - side) / 2) for length in photo.shape[:2])
                square = torch.from_numpy(photo[top : top + side, left : left + side])
                row.copy_(square.permute(2, 0, 1)).div_(255).sub_(mean).div_(std)
            return (pixels,)
        transform: Any = create_transform(
            side, mean=self.mean, std=self.std, is_training=True,
            scale=(options.min_crop, 1.0), color_jitter=options.jitter, interpolation="bilinear",
            re_prob=options.erase, auto_augment=options.rand_augment or None,
        )  # fmt: skip
        for one in transform.transforms:
            for op in one.ops if isinstance(one, RandAugment) else []:
                if op.name.startswith("Posterize"):
                    # At the top of its scale timm keeps no bit at all, which Pillow refuses.
                    op.aug_fn = lambda photo, bits, **_: ImageOps.posterize(
                        photo, min(max(bits, 1), 8)
                    )
        rows = []
        for item, seed in zip(items, seeds, strict=True):
            # timm's transforms draw from the global generators, RandAugment from all three.
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            photo = decode_photo(item.photo or b"", round(side * 1.15), self.decode)
            rows.append(transform(photo))
        return (torch.stack(rows),)


@dataclass(frozen=True)
class TextInputs:
    """From items that have a title to tokens; a plain value, so that workers can receive it."""

    needs_photo: ClassVar[bool] = False
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    prefix: str = ""

    def __call__(self, items: list[Item], seeds: list[int]) -> tuple[torch.Tensor, ...]:
        """Tokens and mask (b, T), T the longest title of the batch, at most max_length.

        Padded on the right, whatever the tokenizer does: only so the first tokens of a title have
        the same positions in every batch. A title of which nothing is left is one padding token.
        """
        titles = [self.prefix + readable_title(item.title) for item in items]
        rows = self.tokenizer(titles, truncation=True, max_length=self.max_length)["input_ids"]
        padding: Any = self.tokenizer.pad_token_id
        tokens = [torch.tensor(row or [padding]) for row in rows]
        masks = [torch.ones_like(row) for row in tokens]
        return (
            pad_sequence(tokens, batch_first=True, padding_value=padding),
            pad_sequence(masks, batch_first=True),
        )


Inputs = ImageInputs | TextInputs


@dataclass(frozen=True)
class BatchPlan:
    """Which items (numbers in the reader, (b,)) form a batch, each with its augmentation seed."""

    items: np.ndarray
    seeds: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Prepared inputs of the items (b,), with their classes (b,) and posting ids.

    `unreadable` describes each planned item that cannot be read; `inputs` is empty when none is
    left.
    """

    items: np.ndarray
    inputs: tuple[torch.Tensor, ...]
    class_ids: torch.Tensor
    posting_ids: list[str]
    unreadable: list[str]

    def inputs_on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The inputs on `device`."""
        return tuple(x.to(device, non_blocking=True) for x in self.inputs)


class _Batches(Dataset):
    def __init__(
        self,
        reader: ItemReader,
        inputs: Inputs,
        stand_ins: np.ndarray | None,
        tolerated: tuple[type[Exception], ...],
    ) -> None:
        self.reader, self.inputs, self.stand_ins = reader, inputs, stand_ins
        self.tolerated = tolerated

    def __getitem__(self, index: BatchPlan) -> Batch | Exception:
        try:
            try:
                return self._prepared(index.items, index.seeds, [])
            except self.tolerated:
                return self._without_unreadable(index)
        except (BadInput, Failed) as error:
            return error  # raised, torch would wrap its message in a worker's traceback

    def _prepared(self, items: np.ndarray, seeds: np.ndarray, unreadable: list[str]) -> Batch:
        read = [self.reader.read(int(n), photo=self.inputs.needs_photo) for n in items]
        classes = torch.tensor([item.class_id for item in read], dtype=torch.int64)
        inputs = self.inputs(read, [int(seed) for seed in seeds]) if read else ()
        return Batch(items, inputs, classes, [item.posting_id for item in read], unreadable)

    def _without_unreadable(self, plan: BatchPlan) -> Batch:
        """The batch with every unreadable item replaced or, without `stand_ins`, left out.

        Raises Corrupt when no stand-in of STAND_INS can be read either.
        """
        numbers, seeds, unreadable = [], [], []
        for number, seed in zip(plan.items.tolist(), plan.seeds.tolist(), strict=True):
            found, fault = number, self._fault(number, seed)
            if fault is not None:
                unreadable.append(f"item {number}: {fault}")
                if self.stand_ins is None:
                    continue
                # Items of the same product after it, in a circle, then any.
                place = int(np.searchsorted(self.stand_ins, number, "right"))
                after = np.roll(self.stand_ins, -place)
                classes = self.reader.records["class_id"]
                same = classes[after] == classes[number]
                ordered = np.concatenate([after[same], after[~same]])
                others = ordered[ordered != number][:STAND_INS].tolist()
                found = next((other for other in others if self._fault(other, seed) is None), None)
                if found is None:
                    raise Corrupt(
                        f"{STAND_INS} items in a row cannot be read, the first: {unreadable[-1]}"
                    )
            numbers.append(found)
            seeds.append(seed)
        return self._prepared(np.array(numbers, np.int64), np.array(seeds, np.int64), unreadable)

    def _fault(self, number: int, seed: int) -> str | None:
        """Why the item cannot be prepared; None when it can."""
        try:
            self._prepared(np.array([number]), np.array([seed]), [])
        except self.tolerated as error:
            return str(error)
        return None


def load(
    reader: ItemReader,
    inputs: Inputs,
    plans: Iterable[BatchPlan],
    workers: int,
    stand_ins: np.ndarray | None = None,
    refuse_damaged: bool = False,
) -> Iterator[Batch]:
    """The batches of `plans` in their order, whatever the number of `workers`.

    No more of them are started than this process has cores for: they would take turns.

    `stand_ins` (n,), ascending item numbers: what may replace an unreadable item; without them it
    is left out of its batch. Every unreadable item is logged. With `refuse_damaged` an item whose
    bytes have changed since they were packed raises Corrupt instead.
    """
    workers = min(workers, own_cores())
    tolerated = (PhotoRefused,) if refuse_damaged else BROKEN
    loader = DataLoader(
        _Batches(reader, inputs, stand_ins, tolerated),
        sampler=plans,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_start_worker,
    )
    with stops_blocked():
        # Started here, not at the first batch: it draws a seed, which would shift a step's dropout.
        batches = iter(loader)
    return _checked(batches, "left out" if stand_ins is None else "another item stands in")


def own_cores() -> int:
    """Cores that this process may use, shared evenly with the other ranks of its machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _checked(batches: Iterator[Batch | Exception], consequence: str) -> Iterator[Batch]:
    """Raise the errors of workers, log what is unreadable."""
    for batch in batches:
        if isinstance(batch, Unreadable):
            raise Corrupt(
                f"{batch}; restore the file or pack again, or go on without such items: "
                "--max-unreadable 0.01"
            )
        if isinstance(batch, Exception):
            raise batch
        for fault in batch.unreadable:
            log.warning("%s; %s", fault, consequence)
        yield batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    leave_stops_to_parent()


def plan_batches(reader: ItemReader, items: np.ndarray, size: int) -> list[BatchPlan]:
    """Batches of at most `size` over `items` (n,), numbers in `reader`: a function of these alone.

    Items of similar title length share a batch, so that little padding is computed.
    """
    order = items[np.argsort(reader.records["txt_size"][items], kind="stable")]
    cuts = [order[start : start + size] for start in range(0, len(order), size)]
    return [BatchPlan(cut, np.zeros(len(cut), np.int64)) for cut in cuts]


def unit_vectors(
    encoder: nn.Module, batches: Iterator[Batch], count: int, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(items (b,), unit vectors (b, D) float32) of the next `count` of `batches`.

    Unreadable items are not among them. `encoder` is in eval mode.
    """
    with torch.inference_mode():
        for batch in islice(batches, count):
            if len(batch.items):
                vectors = encoder(*batch.inputs_on(device))
                yield batch.items, F.normalize(vectors.float(), dim=1).cpu().numpy()
