"""The real loop beside the same steps on tensors in memory: python -m benchmarks.training

`dist-train train` (shards, one loader process, logging every 10 steps, all of it) against forward,
head, backward, both clips and both optimizer steps on the very batches that the loop was served,
held in memory: MobileNetV2 at 128 pixels on grocery photos and MiniLM on offers' titles, batches of
64, one compute thread on either side, in turn within one process. Both include the head and the
optimizers; the peer reads, decodes, tokenises, copies, logs, checks and waits for nothing. Steps
of either are timed after some that warm up. CPU seconds are those of the computing process alone:
on a busy machine they tell what the loop adds to it; wall also tells for whom it had to wait.
Exits 1 when the wall ratio is below 0.92. Options: [image|text ...] [ROUNDS].
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch.nn.utils import clip_grad_norm_

from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    Modality,
    TextEncoderOptions,
    TextTraining,
    TrainingOptions,
)
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import Batch
from dist_train.training import loop as training_loop
from dist_train.training.data import training_items
from dist_train.training.loop import train
from dist_train.training.setup import set_up
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet

WARM, STEPS, BATCH, WANTED = 4, 16, 64, 0.92
EACH = 3
"""One of so many grocery photos is packed: the products stay, the preparation is short."""
MODELS = "$DIST_TRAIN_WEIGHTS"
COMMON: dict[str, Any] = {
    "batch_size": BATCH, "lr": 1e-4, "device": "cpu", "workers": 1, "validate_every": 0.0,
    "checkpoint_every": 10_000,
}  # fmt: skip


@dataclass
class Served:
    """When the loop requested a batch and got it: seconds, wall and CPU. The first are kept."""

    keep: bool
    batches: list[Batch] = field(default_factory=list)
    requested: list[tuple[float, float]] = field(default_factory=list)
    got: list[float] = field(default_factory=list)

    def watch(self, found: Iterator[Batch]) -> Iterator[Batch]:
        """The batches `found`, watched."""
        while True:
            self.requested.append(now())
            if (batch := next(found, None)) is None:
                return
            self.got.append(time.perf_counter())
            if self.keep:
                inputs = tuple(tensor.clone() for tensor in batch.inputs)
                self.batches.append(replace(batch, inputs=inputs))
            yield batch

    def seconds(self) -> tuple[float, float, float]:
        """Wall, CPU and waiting seconds of the steps after the warm ones."""
        timed = slice(WARM, WARM + STEPS)
        begun, ended = self.requested[WARM], self.requested[WARM + STEPS]
        waits = (g - a[0] for a, g in zip(self.requested[timed], self.got[timed], strict=True))
        return ended[0] - begun[0], ended[1] - begun[1], sum(waits)


def now() -> tuple[float, float]:
    """Seconds, wall and CPU of this process."""
    return time.perf_counter(), time.process_time()


def loop(
    modality: Modality, shards: Path, out: Path, config: TrainingOptions, keep: bool
) -> Served:
    """The real training of WARM + STEPS steps and one more, which ends the last one's time."""
    served, load = Served(keep), training_loop.load
    training_loop.load = lambda *arguments, **options: served.watch(load(*arguments, **options))
    try:
        train(modality, shards, out, config)
    finally:
        training_loop.load = load
    return served


def in_memory(
    modality: Modality, shards: Path, config: TrainingOptions, found: list[Batch]
) -> Callable:
    """The same steps on `found`: gives their wall and CPU seconds, after the warm ones."""
    items = training_items(ShardSet(shards), modality, config, 1)
    parts = set_up(items, Runtime("cpu"))
    weights = [p for p in parts.encoder.parameters() if p.requires_grad]

    def step(batch: Batch) -> None:
        loss = parts.head(parts.encoder(*batch.inputs), batch.class_ids, config.head.margin)
        loss.backward()
        clip_grad_norm_(weights, config.clip)
        clip_grad_norm_([parts.head.weight], config.clip)
        for optimizer in (parts.optimizer, parts.head_optimizer):
            optimizer.step()
            optimizer.zero_grad()

    def steps() -> tuple[float, float]:
        for batch in found[:WARM]:
            step(batch)
        begun = now()
        for batch in found[WARM : WARM + STEPS]:
            step(batch)
        return tuple(b - a for a, b in zip(begun, now(), strict=True))

    return steps


def image_case(folder: Path) -> tuple[Path, TrainingOptions]:
    """Grocery photos and launch/recipes/grocery.yaml's encoder."""
    grocery = Path(os.environ["DIST_TRAIN_DATA"]) / "grocery"
    table = pd.read_csv(grocery / "catalogue.csv", dtype=str).iloc[::EACH]
    table.to_csv(folder / "grocery.csv", index=False)
    shards = folder / "grocery"
    pack(folder / "grocery.csv", grocery / "images", shards, PackOptions(size=192))
    encoder = ImageEncoderOptions(model=f"{MODELS}/mobilenetv2_100", image_size=128)
    head = HeadOptions(margin=0.3, lr=1e-2)
    return shards, ImageTraining(
        encoder=encoder, head=head, epochs=epochs(shards, "image"), **COMMON
    )


def text_case(folder: Path) -> tuple[Path, TrainingOptions]:
    """Titles of Abt-Buy and launch/recipes/offers.yaml's encoder."""
    shards = folder / "offers"
    offers = Path(os.environ["DIST_TRAIN_DATA"]) / "offers" / "abt_buy.csv"
    pack(offers, None, shards, PackOptions())
    encoder = TextEncoderOptions(model=f"{MODELS}/all-minilm-l6-v2", max_length=48)
    head = HeadOptions(margin=0.3, lr=5e-3)
    return shards, TextTraining(encoder=encoder, head=head, epochs=epochs(shards, "text"), **COMMON)


def epochs(shards: Path, modality: Modality) -> float:
    """So many that WARM + STEPS + 1 steps are made."""
    table = ShardSet(shards).packed
    return (WARM + STEPS + 1) * BATCH / ((table.split == "train") & table[f"has_{modality}"]).sum()


def measured(modality: Modality, folder: Path, rounds: int) -> dict[str, float]:
    """Medians over `rounds` rounds, each the loop and then the steps in memory."""
    shards, config = {"image": image_case, "text": text_case}[modality](folder)
    first = loop(modality, shards, folder / f"{modality}-first", config, keep=True)
    steps, rows = in_memory(modality, shards, config, first.batches), []
    for number in range(rounds):
        served = loop(modality, shards, folder / f"{modality}-{number}", config, keep=False)
        (wall, cpu, wait), (peer_wall, peer_cpu) = served.seconds(), steps()
        rows.append({
            "ratio": peer_wall / wall, "cpu_ratio": peer_cpu / cpu, "data_share": wait / wall,
            "per_second": STEPS * BATCH / wall, "peer_per_second": STEPS * BATCH / peer_wall,
            "cpu_of_wall": cpu / wall, "peer_cpu_of_wall": peer_cpu / peer_wall,
            "load": os.getloadavg()[0],
        })  # fmt: skip
        values = ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items())
        print(f"{modality}, round {number}: {values}", flush=True)
    return {name: median(row[name] for row in rows) for name in rows[0]}


def main(arguments: list[str]) -> int:
    """Print every round, then the medians, the last line as JSON."""
    torch.set_num_threads(1)
    rounds = int(arguments.pop()) if arguments and arguments[-1].isdigit() else 5
    with TemporaryDirectory() as folder:
        found = {
            modality: measured(modality, Path(folder), rounds)
            for modality in arguments or MODALITIES
        }
    for modality, row in found.items():
        ours, peer = row["per_second"], row["peer_per_second"]
        print(
            f"{modality}: {ours:.1f} samples/s, in memory {peer:.1f}: x {row['ratio']:.3f} "
            f"(wanted {WANTED}), CPU x {row['cpu_ratio']:.3f}, "
            f"waiting for data {row['data_share']:.1%}"
        )
    print(json.dumps({"benchmark": "training", "rounds": rounds, "wanted": WANTED} | found))
    return int(any(row["ratio"] < WANTED for row in found.values()))


MODALITIES: tuple[Modality, ...] = ("image", "text")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
