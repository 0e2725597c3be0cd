"""Seconds to the first batch, at the beginning and far in: python -m benchmarks.resume

A training set of ten million items (which lie in a small shard set) is gone on with at position 0
and at 99 % of its epoch: order, plan, loader, the photos read and decoded to 224 pixels. The
positions are measured in turn, each pair under a new seed since photos differ in cost; one
line of JSON with the medians goes to stdout.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from dist_train.config.training import ImageTraining
from dist_train.encoders.batches import ImageInputs, load
from dist_train.synthetic.catalogue import generate
from dist_train.training.data import TrainingItems
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ItemReader
from tests.support.many_items import many_items

ITEMS, BATCH, TIMES, ALLOWED = 10_000_000, 16, 41, 0.020
INPUTS = ImageInputs(224, [0.5] * 3, [0.5] * 3, augmentation=ImageTraining())


def first_batch(
    reader: ItemReader, numbers: np.ndarray, place: float, order: str, seed: int
) -> float:
    """Seconds from the saved position to the first batch of a new TrainingItems."""
    start = time.perf_counter()
    config = ImageTraining(batch_size=BATCH, order=order, seed=seed)
    items = TrainingItems(reader, numbers, 2, config, "f" * 64)
    saved = items.state.at(int(place * ITEMS) // BATCH * BATCH).to_json()
    position = items.state.check_goes_on(saved, "state.json")
    step = position // BATCH
    batch = next(iter(load(reader, INPUTS, items.plans(step, step + 1, 0, 1), 0)))
    assert batch.inputs[0].shape == (BATCH, 3, 224, 224)
    return time.perf_counter() - start


def state_bytes(order: str) -> int:
    """Bytes of the state of such a training."""
    config = ImageTraining(batch_size=BATCH, order=order)
    items = TrainingItems(None, np.arange(ITEMS), 2, config, "f" * 64)
    return len(json.dumps(items.state.at(ITEMS).to_json()))


def measured(reader: ItemReader, order: str) -> dict[str, float]:
    """Median seconds at both places, and the median of their differences."""
    numbers = np.arange(ITEMS)
    pairs = [
        [first_batch(reader, numbers, place, order, seed) for place in (0, 0.99)]
        for seed in range(TIMES)
    ]
    beginning, late = (median(column) for column in zip(*pairs, strict=True))
    difference = median(late - beginning for beginning, late in pairs)
    seconds = {"at_0_s": beginning, "at_99_percent_s": late, "difference_s": difference}
    return {name: round(value, 5) for name, value in seconds.items()} | {
        "state_bytes": state_bytes(order)
    }


def main() -> int:
    """Print the figures; 1 when the position costs more than allowed."""
    with TemporaryDirectory() as folder:
        catalogue, shards = Path(folder, "catalogue"), Path(folder, "shards")
        generate(catalogue, 300)
        pack(catalogue / "catalogue.csv", catalogue / "images", shards, PackOptions(workers=1))
        reader = many_items(shards, ITEMS)
        found = {order: measured(reader, order) for order in ("global", "window")}
    print(json.dumps({"items": ITEMS, "batch": BATCH, "allowed_s": ALLOWED} | found))
    return int(any(abs(one["difference_s"]) >= ALLOWED for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
