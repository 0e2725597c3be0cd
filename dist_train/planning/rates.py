"""What the formulas multiply: counts of the catalogue, and rates measured on a sample of it."""

import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dist_train.acceptance.speed import seconds
from dist_train.config.options import Config, Modality, TrainingOptions
from dist_train.encoders.batches import Batch, BatchPlan, Inputs, load
from dist_train.encoders.folder import new_encoder
from dist_train.heads.class_parallel import MarginHead
from dist_train.monitor.metrics import peak_memory, reset_peak
from dist_train.training.optimisation import encoder_optimizer, head_optimizer
from shards.catalogue.carried_columns import Carried
from shards.catalogue.rows import COLUMNS, Catalogue
from shards.catalogue.split import split_of
from shards.pack.pack import pack
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput

SAMPLE, LARGEST, FORWARD_SECONDS = 200, 64, 0.3
"""Postings that are packed; items of the larger batch, of which a forward pass takes so long."""


@dataclass(frozen=True)
class Survey:
    """The catalogue: postings, training classes, items by (split or "all", modality); of a posting
    of the sample the packed bytes, those of its row in memory, the seconds on one core."""

    postings: int
    classes: int
    items: Counter[tuple[str, Modality]]
    packed_bytes: float
    row_bytes: float
    pack_seconds: float


@dataclass(frozen=True)
class EncoderRates:
    """Seconds to load an encoder, and to decode an item on one core without and with augmentation;
    as lines over the batch seconds, and bytes at the peak beside those of the program."""

    width: int
    parameters: int
    load_seconds: float
    read_seconds: float
    augment_seconds: float
    forward_seconds: np.poly1d
    forward_bytes: np.poly1d
    step_seconds: np.poly1d
    step_bytes: np.poly1d


def survey(config: Config, folder: Path) -> Survey:
    """Read the catalogue once, and pack a sample of whole products into `folder`/shards.

    Raises BadInput for a catalogue that cannot be read.
    """
    items, groups, postings, one_of = Counter[tuple[str, Modality]](), set(), 0, 1
    columns: dict[Modality, str] = {"image": "image", "text": "title"}
    sample = pd.DataFrame(columns=list(COLUMNS))
    for chunk in Catalogue(config.catalogue, config.columns).postings(Carried()):
        postings, split = postings + len(chunk), chunk.label_group.map(split_of)
        groups |= set(chunk.label_group[split == "train"])
        for modality, column in columns.items():
            here = split[chunk[column] != ""]
            items.update(
                (name, modality) for names in (here, ["all"] * len(here)) for name in names
            )
        sample = pd.concat([sample, chunk[list(COLUMNS)]])
        products = sample.label_group.where(sample.label_group != "", sample.posting_id)
        hashes = pd.util.hash_array(products.to_numpy(object))
        while (hashes % (2 * one_of) == 0).sum() > SAMPLE:
            one_of *= 2
        sample = sample[hashes % one_of == 0]
    sample.to_csv(folder / "sample.csv", index=False)
    begin, out = time.process_time(), folder / "shards"
    pack(folder / "sample.csv", config.images, out, replace(config.pack, workers=1))
    spent = time.process_time() - begin
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    rows = ShardSet(out).items.memory_usage(deep=True).sum()
    return Survey(postings, len(groups), items, *(x / len(sample) for x in (size, rows, spent)))


def measure_encoder(
    modality: Modality, options: TrainingOptions, shards: Path, rows: int, device: torch.device
) -> EncoderRates:
    """Run the encoder on items of a packed sample, in batches of 2 and of at most `rows` items.

    Raises what the training would raise.
    """
    shard_set = ShardSet(shards)
    numbers = np.flatnonzero(shard_set.packed[f"has_{modality}"])
    if not len(numbers):
        raise BadInput(f"no posting of a sample has {modality}: leave {modality} out of encoders")
    reset_peak(device)
    before, begin = peak_memory(device), time.process_time()
    encoder = new_encoder(modality, options.encoder, options.seed).to(device).eval()
    loading = time.process_time() - begin
    encoder.precision = options.precision
    if modality == "image":
        encoder.to(memory_format=torch.channels_last)
    if options.gradient_checkpointing:
        encoder.recompute_activations()
    head = MarginHead(classes=2, width=encoder.width, loss="arcface", scale=32, chunk=2, seed=0)
    optimizers = [encoder_optimizer(encoder, options), head_optimizer(head.to(device), options)]
    small, large = 2, max(3, min(rows, LARGEST))
    plan, lines = BatchPlan(np.resize(numbers, large), np.zeros(large, np.int64)), []

    def decode(prepare: Inputs) -> Batch:
        return next(load(shard_set.reader(), prepare, [plan], 0))

    ways = encoder.inputs(), encoder.training_inputs(options)
    cpu = torch.device("cpu")
    read, augment = (seconds(partial(decode, way), cpu, 0.2, 2) / large for way in ways)
    inputs = decode(ways[1]).inputs_on(device)

    def forward(batch: int) -> None:
        with torch.inference_mode():
            encoder(*(x[:batch] for x in inputs))

    def step(batch: int) -> None:
        vectors = encoder(*(x[:batch] for x in inputs))
        head(vectors, torch.zeros(batch, dtype=torch.int64, device=device), 0.1).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    item = seconds(partial(forward, small), device, 0.2, 2) / small
    large = max(3, min(large, int(FORWARD_SECONDS / item)))
    for work in (forward, step):
        encoder.train(work is step)
        found = []
        for batch in (small, large):
            reset_peak(device)
            found.append(
                (seconds(partial(work, batch), device, 0.2, 2), peak_memory(device) - before)
            )
        for low, high in zip(*found, strict=True):
            slope = max(0.0, (high - low) / (large - small))
            lines.append(np.poly1d([slope, max(0.0, low - small * slope)]))
    parameters = sum(weight.numel() for weight in encoder.parameters())
    return EncoderRates(encoder.width, parameters, loading, read, augment, *lines)
