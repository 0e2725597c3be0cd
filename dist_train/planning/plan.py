"""What each stage will need, by formula: seconds, memory of a rank, bytes on disk.

The formulas multiply counts of the catalogue with rates that acceptance/speed.py measures on a
sample of it. What no rate covers is a constant, fitted by benchmarks/planning.py.
"""

import logging
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from dist_train.acceptance.speed import EncoderRates, measure_encoder
from dist_train.acceptance.speed import join as product_rate
from dist_train.config.options import Config, bytes_of
from dist_train.config.training import Modality, TrainingOptions
from dist_train.decisions.threshold import check_same_score, given_threshold
from dist_train.distributed.memory import device_peak_bytes, free_memory, reset_peak
from dist_train.doctor.machine import existing
from dist_train.matching.blocks import CHUNK, PROGRAM, join_bounds, join_peak
from dist_train.planning.preflight import (
    Labels,
    check_batches,
    check_encoders,
    check_labels,
    check_match_files,
)
from dist_train.training.setup import head_estimate
from shards.catalogue.columns import COLUMNS, SPLIT
from shards.catalogue.rows import Carried, Catalogue
from shards.pack.pack import pack
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput
from shards.storage.files import format_bytes

SAMPLE = 200
"""Postings that are packed."""
SHARE, TABLES = 0.9, 3
"""Fraction of a memory that may be used; tables of all items while they are filtered and sorted."""
PACK_START, JOIN_START = 0.2, 0.75
"""Fractions of a training's start: of pack; of index, join and match, which import less."""
CHECKPOINT_RATE, HEAD_RATE = 300e6, {"cpu": 50e9, "cuda": 20e12}
"""Bytes a second written and hashed; float32 operations a second of the head."""
CONDITIONS = """\
measured here: packing of a sample; decoding, a forward pass and a training step of each encoder on
  it; the join's product; the start of the program
assumed: all ranks are on this machine and share its cores; nothing else runs; links cost nothing;
  each stage is a command on its own; cost of files, checkpoints and pairs that are found
not counted: --compile, training of inverted lists, memory of loader processes, evaluate, report"""


@dataclass(frozen=True)
class StageCost:
    """Seconds by the clock, bytes of a rank's memory at the peak, bytes left on disk."""

    stage: str
    ranks: int
    seconds: float
    memory_bytes: float
    disk_bytes: float
    note: str = ""


@dataclass
class Plan:
    """The stages on `ranks` that may use `memory` bytes each, and what does not fit, with the
    setting that makes it fit. Starting a program costs `start` seconds and `program` bytes."""

    device: str
    ranks: int
    memory: float
    cores: int = 1
    start: float = 0.0
    program: float = 0.0
    stages: list[StageCost] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def elapsed(self, compute: float, loading: float, workers: int) -> float:
        """Seconds of a rank that computes while `workers` processes (or, if 0, itself) decode."""
        cores = self.cores / self.ranks
        threads = torch.get_num_threads() if self.device == "cpu" else 1
        alone = max(compute, loading / min(workers, cores)) if workers else compute + loading
        # However the work is spread, all of it has to be done by the cores.
        return max(alone, (threads * compute + loading) / cores)

    def check(self, what: str, needed: float, available: float, setting: str) -> None:
        """Record a misfit if more is needed than available."""
        if needed > available:
            sizes = f"{format_bytes(needed)} of {format_bytes(available)}"
            self.misfits.append(f"{what} needs {sizes}: {setting}")

    def __str__(self) -> str:
        table = pd.DataFrame(self.stages)
        table["seconds"] = [str(timedelta(seconds=round(value))) for value in table.seconds]
        for name in ("memory_bytes", "disk_bytes"):
            table[name] = table[name].map(format_bytes)
        table.columns = ["stage", "ranks", "time", "memory a rank", "disk", ""]
        machine = f"{self.ranks} ranks on {self.device}, {self.cores} cores, "
        machine += f"{format_bytes(self.memory)} a rank"
        fits = [f"does not fit: {one}" for one in self.misfits] or ["everything fits"]
        return "\n".join([table.to_string(index=False), machine, CONDITIONS, *fits])


@dataclass(frozen=True)
class Survey:
    """Counts of the catalogue: items are by (split or "all", modality), val the postings of each
    label group of the val split; the last three are bytes on disk, bytes of its row in memory and
    seconds on one core of one posting that is packed."""

    postings: int
    classes: int
    val: Counter[str]
    items: Counter[tuple[str, Modality]]
    packed_bytes: float
    row_bytes: float
    pack_seconds: float


def plan(config: Config, processes: int) -> Plan:
    """What `dist-train run` needs with these options on `processes` ranks of this machine.

    0 ranks: one for each GPU, or one. Raises BadInput for a catalogue that cannot be read, and for
    labels, batches and encoders that a stage would fail for.
    """
    start, cores = time.process_time(), len(os.sched_getaffinity(0))
    wanted = {config.training(modality).device for modality in config.encoders}
    gpus = range(torch.cuda.device_count() if wanted != {"cpu"} else 0)
    device, ranks = torch.device("cuda" if gpus else "cpu"), processes or max(1, len(gpus))
    reset_peak(device)
    memory = free_memory() / ranks
    if gpus:
        memory = min(torch.cuda.get_device_properties(n).total_memory for n in gpus)
    program = device_peak_bytes(device)
    found = Plan(device.type, ranks, SHARE * memory, cores, start, program)
    check_batches(config, dict.fromkeys(config.encoders, ranks))
    given = given_threshold(config.match)
    check_same_score(given, config.match.threshold_from, config.score_weights)
    check_match_files(config)
    rates: dict[Modality, EncoderRates] = {}
    with TemporaryDirectory(prefix="dist_train-plan-") as folder:
        catalogue = survey(config, Path(folder))
        counts = (catalogue.postings, catalogue.classes, catalogue.val, catalogue.items)
        check_labels(config, Labels(config.catalogue, *counts))
        check_encoders(config, {m: config.training(m) for m in config.encoders}, catalogue.postings)
        for modality in config.encoders:
            options, shards = config.training(modality), Path(folder) / "shards"
            rows = options.batch_size // (options.accumulation * ranks)
            rates[modality] = measure_encoder(modality, options, shards, rows, device)
    width = sum(rate.width for rate in rates.values())
    product = 2 * width / (1e12 * product_rate(device, CHUNK // 2, width).value)
    N, workers = catalogue.postings, min(config.pack.workers, cores)
    seconds = PACK_START * start + N * catalogue.pack_seconds / workers
    memory, disk = 190e6 + 90 * min(N, 10**6), N * catalogue.packed_bytes
    found.stages.append(StageCost("pack", workers, seconds, memory, disk, f"{N:,} postings"))
    for modality, rate in rates.items():
        add_training(found, config.training(modality), modality, catalogue, rate)
    seconds, size, loaders = start, config.embed.batch_size, config.embed.workers
    for modality, rate in rates.items():
        item = found.elapsed(rate.forward_seconds(size) / size, rate.read_seconds, loaders)
        seconds += rate.load_seconds + catalogue.items["all", modality] * item / ranks
    memory = found.program + max(rate.forward_bytes(size) for rate in rates.values())
    memory += (not gpus) * TABLES * N * catalogue.row_bytes
    sets, number = 1 + len(config.compare), 2 if config.embed.dtype == "float16" else 4
    disk, note = sets * N * number * width, f"{sets} sets"
    found.stages.append(StageCost("embed", ranks, sets * seconds, memory, disk, note))
    found.check("embed", memory, found.memory, "a smaller --embed.batch-size")
    add_matching(found, config, catalogue, width, product)
    disk, free = sum(one.disk_bytes for one in found.stages), disk_usage(existing(config.out)).free
    found.check(str(config.out), disk, free, "another --out, or smaller photos by --pack.size")
    seconds = sum(one.seconds for one in found.stages)
    memory = max(one.memory_bytes for one in found.stages)
    found.stages.append(StageCost("all", ranks, seconds, memory, disk))
    return found


def add_training(
    found: Plan, options: TrainingOptions, modality: Modality, catalogue: Survey, rate: EncoderRates
) -> None:
    """Add the training of one encoder to the plan."""
    items, size, ranks = catalogue.items["train", modality], options.batch_size, found.ranks
    head = head_estimate(options, catalogue.classes, rate.width, ranks)
    rows, passes, steps = (
        head.batch // ranks,
        options.accumulation,
        math.ceil(options.epochs * items / size),
    )
    head_seconds = head.flops * options.head_passes / passes / HEAD_RATE[found.device]
    compute = rate.step_seconds(rows) + head_seconds
    step = passes * found.elapsed(compute, rate.augment_seconds * rows, options.workers)
    item = found.elapsed(rate.forward_seconds(size) / size, rate.read_seconds, options.workers)
    validations = 1 + math.ceil(options.epochs / (options.validate_every or options.epochs or 1))
    weights, centres = 4 * rate.parameters, 4 * head.classes * head.centres * head.width
    checkpoint = weights * (3 + options.keep_best + (options.ema > 0)) + 3 * centres
    seconds = found.start + rate.load_seconds + steps * step
    seconds += validations * catalogue.items["val", modality] * item / ranks
    seconds += (1 + steps // options.checkpoint_every) * checkpoint / CHECKPOINT_RATE
    memory, disk = training_bytes(found, options, catalogue, rate), options.keep * checkpoint
    note = f"{items:,} items, {catalogue.classes:,} classes, {steps:,} steps of {step:.2g} s"
    name = f"train {modality}"
    found.stages.append(StageCost(name, ranks, seconds, memory, disk + weights, note))
    setting = f"a smaller --{modality}.encoder.model or --{modality}.batch-size"
    for more in range(size // ranks, passes, -1):  # the fewest passes that fit come last
        if size // ranks % more == 0:
            smaller = replace(options, accumulation=more)
            if training_bytes(found, smaller, catalogue, rate) <= found.memory:
                setting = f"--{modality}.accumulation {more}"
    setting += f", or --{modality}.gradient-checkpointing" * (not options.gradient_checkpointing)
    setting += ", or more ranks for the head's centres" * (head.total > found.memory / 4)
    found.check(name, memory, found.memory, setting)


def training_bytes(
    found: Plan, options: TrainingOptions, catalogue: Survey, rate: EncoderRates
) -> float:
    """Bytes of a rank at the peak of a training."""
    head = head_estimate(options, catalogue.classes, rate.width, found.ranks)
    weights, host = 4 * rate.parameters, found.device == "cpu"
    kept = weights * ((options.ema > 0) + (found.ranks > 1) + (host and options.keep_best))
    kept += host * TABLES * catalogue.postings * catalogue.row_bytes
    step = rate.step_bytes(head.batch // found.ranks) + head.total
    # Between steps: weights and moments, with a validation or the moments' copy for a checkpoint.
    beside = max(rate.forward_bytes(options.batch_size) - weights, 2 * weights * host)
    return found.program + kept + max(step, 3 * weights + head.weights + head.moments + beside)


def add_matching(
    found: Plan, config: Config, catalogue: Survey, width: int, product: float
) -> None:
    """Add index, join and match; `product` is the seconds of the score of one pair."""
    N, ranks, index, join = catalogue.postings, found.ranks, config.index, config.join
    start, free, given = JOIN_START * found.start, SHARE * free_memory(), bytes_of(index.memory)
    # Rows are float32; if they exceed the memory given, auto chooses a kind with smaller ones.
    disk, recall = min(4 * width * N, given), index.recall_rows
    # Seconds of a shard, of a number of a row, of a row that is compared with one for the recall.
    seconds = start + 0.011 * min(64, N / 1024) + N * (31e-9 * width / ranks + 50e-9 * recall)
    memory = PROGRAM + min(disk, given / 2) + 20 * recall * min(N, 16_384)
    found.stages.append(StageCost("index", ranks, seconds, memory, disk + 8 * N))
    found.check("index on all ranks", ranks * memory, free, "a smaller --index.memory")
    # Items with both modalities are prepared once more for each modality that others lack.
    lacking = sum(catalogue.items["all", modality] < N for modality in config.encoders)
    row = 4 * width * (1 + lacking * (len(config.encoders) > 1))
    try:
        bounds = join_bounds(N, 4 * width, row, width, bytes_of(join.memory))
    except BadInput as error:
        found.misfits.append(f"join: {error}: raise --join.memory")
        return
    blocks, k = math.ceil(N / bounds.block), join.neighbours
    block_pairs, pairs = blocks * (blocks + 1) // 2, min(join.pairs_per_item * N, N * (N - 1) / 2)
    # Ten pairs are scored for each certain neighbour; every other product is searched for them too.
    scored = (0.9e-6 + 2e-9 * width) * (pairs + 10 * k * N) + 60e-6 * N * (k > 0)
    seconds = start + 0.7 + (0.75 * N**2 * product + scored) / ranks + 0.01 * block_pairs
    memory = join_peak(bounds, N, 4 * width + row, int(pairs), block_pairs)
    note = f"{block_pairs:,} block pairs, {pairs:,.0f} pairs at most"
    found.stages.append(StageCost("join", ranks, seconds, memory, 19 * pairs + 20 * k * N, note))
    found.check("join on all ranks", ranks * memory, free, "a smaller --join.memory")
    seconds, memory = start + 45e-6 * N + 0.4e-6 * pairs, 300 * min(pairs, 500_000) + 60 * N
    found.stages.append(StageCost("match", 1, seconds, PROGRAM + memory, 40 * N))


def survey(config: Config, folder: Path) -> Survey:
    """Read the catalogue once, and pack a sample of complete products into `folder`/shards.

    Raises BadInput for a catalogue that cannot be read.
    """
    items, groups, postings = Counter[tuple[str, Modality]](), set[str](), 0
    val = Counter[str]()
    columns: dict[Modality, str] = {"image": "image", "text": "title"}
    sample: Any = None
    catalogue, carried = Catalogue(config.catalogue, config.columns), Carried()
    for chunk in catalogue.postings(carried):
        postings, split = postings + len(chunk), chunk[SPLIT]
        groups |= set(chunk.label_group[split == "train"])
        val.update(chunk.label_group[(split == "val") & (chunk.label_group != "")])
        for modality, column in columns.items():
            counts = split[chunk[column] != ""].value_counts()
            items.update({(name, modality): int(number) for name, number in counts.items()})
            items["all", modality] += int(counts.sum())
        products = chunk.label_group.where(chunk.label_group != "", chunk.posting_id)
        hashed = chunk.assign(hash=pd.util.hash_array(products.to_numpy(object)))
        sample = pd.concat([sample, hashed]).nsmallest(SAMPLE, "hash", keep="all")
    sample.to_csv(folder / "sample.csv", index=False, columns=[*COLUMNS, SPLIT])
    catalogue.log_findings(carried)
    began, out = time.process_time(), folder / "shards"
    log = logging.getLogger("shards")
    log.disabled = True  # what it would find of the sample's products may not hold for all
    try:
        pack(folder / "sample.csv", config.images, out, replace(config.pack, workers=1))
    finally:
        log.disabled = False
    spent = time.process_time() - began
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    rows = ShardSet(out).items.memory_usage(deep=True).sum()
    return Survey(
        postings, len(groups), val, items, *(x / len(sample) for x in (size, rows, spent))
    )
