"""Batches of items, read and prepared in worker processes, in exactly the order of a plan.

A batch that holds a broken item never changes the number of steps: in training another item of the
same product stands in, elsewhere the item is left out; either way the batch says so.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shards.errors import BadInput, Corrupt, Failed, Unreadable
from shards.reader import Item, ItemReader
from shards.srgb import PhotoRefused
from shards.workers import leave_stops_to_parent, stops_blocked

STAND_INS = 100
"""Items that are tried in the place of a broken one."""
FEW = 10
"""Broken items that no budget counts: one of twenty says nothing of a million."""
BROKEN = (Unreadable, PhotoRefused)
"""What reading and decoding raise when nothing but the one item is at fault."""
log = logging.getLogger(__name__)


class Inputs(Protocol):
    """What makes a model's inputs of items (ImageInputs, TextInputs)."""

    needs_photo: ClassVar[bool]

    def __call__(self, items: list[Item], seeds: list[int]) -> tuple[torch.Tensor, ...]:
        """Tensors of b items; `seeds` (b,) decide the augmentation."""
        ...


@dataclass(frozen=True)
class BatchPlan:
    """Which items (numbers in the reader, (b,)) make a batch, each with its augmentation seed."""

    items: np.ndarray
    seeds: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Prepared inputs of the items (b,), with their classes (b,) and posting ids.

    `unreadable` tells of each planned item that is broken; `inputs` is empty when none is left.
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
    def __init__(self, reader: ItemReader, inputs: Inputs, stand_ins: np.ndarray | None) -> None:
        self.reader, self.inputs, self.stand_ins = reader, inputs, stand_ins

    def __getitem__(self, index: BatchPlan) -> Batch | Exception:
        try:
            return self._batch(index)
        except (BadInput, Failed) as error:
            return error  # raised, torch would wrap what it says in a worker's traceback

    def _batch(self, plan: BatchPlan) -> Batch:
        try:
            return self._prepared(plan, [])
        except BROKEN:
            return self._without_broken(plan)

    def _prepared(self, plan: BatchPlan, unreadable: list[str]) -> Batch:
        items = [self._read(int(number)) for number in plan.items]
        classes = torch.tensor([item.class_id for item in items], dtype=torch.int64)
        inputs = self.inputs(items, [int(seed) for seed in plan.seeds]) if items else ()
        return Batch(plan.items, inputs, classes, [item.posting_id for item in items], unreadable)

    def _without_broken(self, plan: BatchPlan) -> Batch:
        unreadable: list[str] = []
        found = [self._readable(n, seed, unreadable) for n, seed in _rows(plan)]
        kept = np.array([number is not None for number in found])
        numbers = np.array([number for number in found if number is not None], np.int64)
        return self._prepared(BatchPlan(numbers, plan.seeds[kept]), unreadable)

    def _readable(self, number: int, seed: int, unreadable: list[str]) -> int | None:
        """`number`, or what stands in for it when it is broken; None where nothing may."""
        if (fault := self._fault(number, seed)) is None:
            return number
        unreadable.append(f"item {number}: {fault}")
        if self.stand_ins is None:
            return None
        for other in self._others(number):
            if self._fault(other, seed) is None:
                return other
        raise Corrupt(f"{STAND_INS} items in a row are broken, the first: {unreadable[-1]}")

    def _read(self, number: int) -> Item:
        return self.reader.read(number, photo=self.inputs.needs_photo)

    def _fault(self, number: int, seed: int) -> str | None:
        try:
            self.inputs([self._read(number)], [seed])
        except BROKEN as error:
            return str(error)
        return None

    def _others(self, number: int) -> list[int]:
        """Items to try instead: those of the same product after it, in a circle, then any."""
        assert self.stand_ins is not None
        after = np.roll(self.stand_ins, -int(np.searchsorted(self.stand_ins, number, "right")))
        classes = self.reader.records["class_id"]
        same = classes[after] == classes[number]
        ordered = np.concatenate([after[same], after[~same]])
        return ordered[ordered != number][:STAND_INS].tolist()


def _rows(plan: BatchPlan) -> Iterator[tuple[int, int]]:
    """(item, seed) of each row of a plan."""
    return zip(plan.items.tolist(), plan.seeds.tolist(), strict=True)


def load(
    reader: ItemReader, inputs: Inputs, plans: Iterable[BatchPlan], workers: int,
    stand_ins: np.ndarray | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """The batches of `plans` in their order, whatever the number of `workers`.

    `stand_ins` (n,), ascending item numbers: what may take the place of a broken item; without
    them it is left out of its batch. Every broken item is logged.
    """
    loader = DataLoader(
        _Batches(reader, inputs, stand_ins), sampler=plans, batch_size=None, num_workers=workers,
        prefetch_factor=2 if workers else None, worker_init_fn=_begin_worker,
    )  # fmt: skip
    with stops_blocked():
        # Begun here, not at the first batch: it draws a seed, which would shift a step's dropout.
        batches = iter(loader)
    return _told(batches, "left out" if stand_ins is None else "another item stands in")


def _told(batches: Iterator[Batch | Exception], what: str) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        for told in batch.unreadable:
            log.warning("%s; %s", told, what)
        yield batch


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    leave_stops_to_parent()
