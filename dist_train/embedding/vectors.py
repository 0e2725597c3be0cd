"""Items of a shard set through an encoder, batch by batch."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.encoders.batches import Batch, BatchPlan
from shards.reader import ItemReader


def plan_batches(reader: ItemReader, items: np.ndarray, size: int) -> list[BatchPlan]:
    """Batches of at most `size` over `items` (n,), numbers in `reader`: a function of these alone.

    Items of like title length share a batch, so that little padding is computed.
    """
    order = items[np.argsort(reader.records["txt_size"][items], kind="stable")]
    cuts = [order[start : start + size] for start in range(0, len(order), size)]
    return [BatchPlan(cut, np.zeros(len(cut), np.int64)) for cut in cuts]


def unit_vectors(
    encoder: nn.Module,
    batches: Iterator[Batch],
    count: int,
    device: torch.device,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(items (b,), unit vectors (b, D) float32) of the next `count` of `batches`.

    Broken items are not among them. `encoder` is in eval mode.
    """
    with torch.inference_mode():
        for batch in islice(batches, count):
            if len(batch.items):
                vectors = encoder(*batch.inputs_on(device))
                yield batch.items, F.normalize(vectors.float(), dim=1).cpu().numpy()
