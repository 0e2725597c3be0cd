"""Batches of items, read and prepared in worker processes, in exactly the order of a plan."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shards.reader import Item, ItemReader


class Inputs(Protocol):
    """What makes a model's inputs of items (ImageInputs, TextInputs)."""

    def __call__(self, items: list[Item], seeds: list[int]) -> tuple[torch.Tensor, ...]:
        """Tensors of b items; `seeds` (b,) decide the augmentation."""
        ...


@dataclass(frozen=True)
class Batch:
    """Prepared inputs of b items with their classes (b,) and posting ids."""

    inputs: tuple[torch.Tensor, ...]
    class_ids: torch.Tensor
    posting_ids: list[str]

    def inputs_on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The inputs on `device`."""
        return tuple(x.to(device, non_blocking=True) for x in self.inputs)


@dataclass(frozen=True)
class BatchPlan:
    """Which items (numbers in the reader, (b,)) make a batch, each with its augmentation seed."""

    items: np.ndarray
    seeds: np.ndarray


class _Batches(Dataset):
    def __init__(self, reader: ItemReader, inputs: Inputs) -> None:
        self.reader, self.inputs = reader, inputs

    def __getitem__(self, index: BatchPlan) -> Batch:
        plan = index
        items = [self.reader[int(number)] for number in plan.items]
        classes = torch.tensor([item.class_id for item in items], dtype=torch.int64)
        inputs = self.inputs(items, [int(seed) for seed in plan.seeds])
        return Batch(inputs, classes, [item.posting_id for item in items])


def load(
    reader: ItemReader, inputs: Inputs, plans: Iterable[BatchPlan], workers: int
) -> Iterator[Batch]:
    """The batches of `plans` in their order, whatever the number of `workers`."""
    loader = DataLoader(
        _Batches(reader, inputs), sampler=plans, batch_size=None, num_workers=workers,
        prefetch_factor=2 if workers else None, worker_init_fn=_one_thread,
    )  # fmt: skip
    return iter(loader)


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
