"""Some items of a shard set through an encoder, in memory."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.encoders.batches import BatchPlan, Inputs, load
from dist_train.runtime import autocast
from shards.reader import ItemReader


def unit_vectors(
    encoder: nn.Module,
    inputs: Inputs,
    reader: ItemReader,
    items: np.ndarray,
    *,
    batch_size: int,
    precision: str,
    workers: int,
    device: torch.device,
) -> np.ndarray:
    """Unit vectors (n, D) float32 of `items` (n,), numbers in `reader`; encoder in eval mode.

    The batches are a function of `items` alone. Items of like length share a batch, so that
    little padding is computed.
    """
    order = np.argsort(_length(reader, items), kind="stable")
    plans = [
        BatchPlan(items[rows], np.zeros(len(rows), np.int64))
        for rows in _cut(order, batch_size)
    ]  # fmt: skip
    parts = []
    with torch.inference_mode():
        for batch in load(reader, inputs, plans, workers):
            with autocast(precision, device):
                vectors = encoder(*batch.inputs_on(device))
            parts.append(F.normalize(vectors.float(), dim=1).cpu().numpy())
    found = np.concatenate(parts)
    out = np.empty_like(found)
    out[order] = found
    return out


def _length(reader: ItemReader, items: np.ndarray) -> np.ndarray:
    return reader.records["txt_size"][items]


def _cut(order: np.ndarray, size: int) -> Sequence[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]
