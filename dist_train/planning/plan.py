"""What each stage will take, by formula: seconds, memory of a rank, bytes on disk.

What no rate of rates.py covers is a constant, fitted by benchmarks/planning.py.
"""

import math
import os
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from dist_train.acceptance.speed import join as product_rate
from dist_train.config.options import Config, Modality, TrainingOptions, bytes_of
from dist_train.doctor.machine import existing, free_memory
from dist_train.matching.blocks import CHUNK, PROGRAM, join_bounds, join_peak
from dist_train.monitor.metrics import peak_memory, reset_peak
from dist_train.planning.rates import EncoderRates, Survey, measure_encoder, survey
from dist_train.training.head_setup import head_estimate
from shards.storage.errors import BadInput
from shards.storage.files import format_bytes

SHARE, TABLES = 0.9, 3
"""Share of a memory that is counted on; tables of all items while they are filtered and sorted."""
PACK_START, JOIN_START = 0.2, 0.75
"""Shares of a training's program start: of pack; of index, join and match, which import less."""
CHECKPOINT_RATE, HEAD_RATE = 300e6, {"cpu": 50e9, "cuda": 20e12}
"""Bytes a second written and hashed; float32 operations a second of the head."""
CONDITIONS = """\
measured here: packing of a sample; decoding, a forward pass and a training step of each encoder on
  it; the join's product; the start of the program
assumed: all ranks are on this machine and share its cores; nothing else runs; links cost nothing;
  each stage is a command of its own; what files, checkpoints and pairs that are found take
not counted: --compile, training of inverted lists, memory of loader processes, evaluate, report"""


@dataclass(frozen=True)
class Stage:
    """Seconds by the clock, bytes of a rank's memory at the peak, bytes left on disk."""

    stage: str
    ranks: int
    seconds: float
    memory_bytes: float
    disk_bytes: float
    note: str = ""


@dataclass
class Plan:
    """The stages on `ranks` that may take `memory` bytes each, and what does not fit, with the
    setting that makes it fit. A program takes `start` seconds and `program` bytes by itself."""

    device: str
    ranks: int
    memory: float
    cores: int = 1
    start: float = 0.0
    program: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def elapsed(self, compute: float, loading: float, workers: int) -> float:
        """Seconds of a rank that computes what `workers` processes decode; without any, itself."""
        cores = self.cores / self.ranks
        threads = torch.get_num_threads() if self.device == "cpu" else 1
        alone = max(compute, loading / min(workers, cores)) if workers else compute + loading
        # However it is spread, the cores do not finish before all the work is done.
        return max(alone, (threads * compute + loading) / cores)

    def check(self, what: str, needed: float, room: float, setting: str) -> None:
        """Note what needs more than there is room for."""
        if needed > room:
            sizes = f"{format_bytes(needed)} of {format_bytes(room)}"
            self.misfits.append(f"{what} needs {sizes}: {setting}")

    def __str__(self) -> str:
        table = pd.DataFrame(self.stages)
        table["seconds"] = [str(timedelta(seconds=round(value))) for value in table.seconds]
        for name in ("memory_bytes", "disk_bytes"):
            table[name] = table[name].map(format_bytes)
        table.columns = ["stage", "ranks", "time", "memory a rank", "disk", ""]
        room = f"{self.cores} cores, {format_bytes(self.memory)} a rank"
        fits = [f"does not fit: {one}" for one in self.misfits] or ["everything fits"]
        there = f"{self.ranks} ranks on {self.device}, {room}"
        return "\n".join([table.to_string(index=False), there, CONDITIONS, *fits])


def plan(config: Config, processes: int) -> Plan:
    """What `dist-train run` takes with these options on `processes` ranks of this machine.

    0 ranks: as many as there are GPUs, or one. Raises BadInput for what cannot be read.
    """
    found = _machine(config, processes)
    device, rates = torch.device(found.device), dict[Modality, EncoderRates]()
    with TemporaryDirectory(prefix="dist_train-plan-") as folder:
        catalogue = survey(config, Path(folder))
        for modality in config.encoders:
            options, shards = getattr(config, modality), Path(folder) / "shards"
            rows = options.batch_size // (options.accumulation * found.ranks)
            rates[modality] = measure_encoder(modality, options, shards, rows, device)
    width = sum(rate.width for rate in rates.values())
    product = 2 * width / (1e12 * product_rate(device, CHUNK, width).value)
    N, workers = catalogue.postings, min(config.pack.workers, found.cores)
    seconds, memory = N * catalogue.pack_seconds / workers, 190e6 + 90 * min(N, 10**6)
    seconds, disk = seconds + PACK_START * found.start, N * catalogue.packed_bytes
    found.stages.append(Stage("pack", workers, seconds, memory, disk, f"{N:,} postings"))
    for modality, rate in rates.items():
        _train(found, getattr(config, modality), modality, catalogue, rate)
    _embed(found, config, catalogue, rates)
    _index_join_match(found, config, catalogue, width, product)
    disk, free = sum(one.disk_bytes for one in found.stages), disk_usage(existing(config.out)).free
    found.check(str(config.out), disk, free, "another --out, or smaller photos by --pack.size")
    seconds = sum(one.seconds for one in found.stages)
    memory = max(one.memory_bytes for one in found.stages)
    found.stages.append(Stage("all", found.ranks, seconds, memory, disk))
    return found


def _machine(config: Config, processes: int) -> Plan:
    devices = {getattr(config, modality).device for modality in config.encoders}
    cuda, start = devices != {"cpu"} and torch.cuda.is_available(), time.process_time()
    gpus, cores = torch.cuda.device_count() if cuda else 0, len(os.sched_getaffinity(0))
    ranks = processes or max(1, gpus)
    if cuda:
        memory = min(torch.cuda.get_device_properties(n).total_memory for n in range(gpus))
        return Plan("cuda", ranks, SHARE * memory, cores, start)
    reset_peak(torch.device("cpu"))
    program = peak_memory(torch.device("cpu"))
    return Plan("cpu", ranks, SHARE * free_memory() / ranks, cores, start, program)


def _train(
    found: Plan, options: TrainingOptions, modality: Modality, catalogue: Survey, rate: EncoderRates
) -> None:
    items, passes, size = (
        catalogue.items["train", modality],
        options.accumulation,
        options.batch_size,
    )
    steps, name = math.ceil(options.epochs * items / size), f"train {modality}"
    head = head_estimate(options, catalogue.classes, rate.width, found.ranks)
    rows, most = head.batch // found.ranks, size // found.ranks
    head_seconds = head.flops * options.head_passes / passes / HEAD_RATE[found.device]
    compute = rate.step_seconds(rows) + head_seconds
    step = passes * found.elapsed(compute, rate.augment_seconds * rows, options.workers)
    item = found.elapsed(rate.forward_seconds(size) / size, rate.read_seconds, options.workers)
    validations = 1 + math.ceil(options.epochs / (options.validate_every or options.epochs or 1))
    weights, centres = 4 * rate.parameters, 4 * head.classes * head.centres * head.width
    checkpoint = weights * (3 + options.keep_best + (options.ema > 0)) + 3 * centres
    seconds = found.start + rate.load_seconds + steps * step
    seconds += validations * catalogue.items["val", modality] * item / found.ranks
    seconds += (1 + steps // options.checkpoint_every) * checkpoint / CHECKPOINT_RATE
    memory, disk = training_bytes(found, options, catalogue, rate), options.keep * checkpoint
    note = f"{items:,} items, {catalogue.classes:,} classes, {steps:,} steps of {step:.2g} s"
    found.stages.append(Stage(name, found.ranks, seconds, memory, disk + weights, note))
    setting = f"a smaller --{modality}.encoder.model or --{modality}.batch-size"
    for more in (n for n in range(passes + 1, most + 1) if most % n == 0):
        smaller = replace(options, accumulation=more)
        if training_bytes(found, smaller, catalogue, rate) <= found.memory:
            setting = f"--{modality}.accumulation {more}"
            break
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
    # Between steps: weights and moments, beside a validation or a copy of the moments on their way.
    beside = max(rate.forward_bytes(options.batch_size) - weights, 2 * weights * host)
    return found.program + kept + max(step, 3 * weights + head.weights + head.moments + beside)


def _embed(
    found: Plan, config: Config, catalogue: Survey, rates: dict[Modality, EncoderRates]
) -> None:
    size, workers, N = config.embed.batch_size, config.embed.workers, catalogue.postings
    seconds = found.start
    for modality, rate in rates.items():
        item = found.elapsed(rate.forward_seconds(size) / size, rate.read_seconds, workers)
        seconds += rate.load_seconds + catalogue.items["all", modality] * item / found.ranks
    memory = found.program + max(rate.forward_bytes(size) for rate in rates.values())
    memory += (found.device == "cpu") * TABLES * N * catalogue.row_bytes
    sets, number = 1 + len(config.compare), 2 if config.embed.dtype == "float16" else 4
    disk = sets * N * number * sum(rate.width for rate in rates.values())
    found.stages.append(Stage("embed", found.ranks, sets * seconds, memory, disk, f"{sets} sets"))
    found.check("embed", memory, found.memory, "a smaller --embed.batch-size")


def _index_join_match(
    found: Plan, config: Config, catalogue: Survey, width: int, product: float
) -> None:
    N, ranks, index, join = catalogue.postings, found.ranks, config.index, config.join
    start, room, given = JOIN_START * found.start, SHARE * free_memory(), bytes_of(index.memory)
    # Rows are float32; where they exceed the memory that is given the kind auto takes smaller ones.
    disk, recall = min(4 * width * N, given), index.recall_rows
    # Seconds of a shard, of a number of a row, of a row that is compared with one of the recall.
    seconds = start + 0.011 * min(64, N / 1024) + N * (31e-9 * width / ranks + 50e-9 * recall)
    memory = PROGRAM + min(disk, given / 2) + 20 * recall * min(N, 16_384)
    found.stages.append(Stage("index", ranks, seconds, memory, disk + 8 * N))
    found.check("index on all ranks", ranks * memory, room, "a smaller --index.memory")
    # Items with both modalities are prepared once more for each that others lack.
    lacking = sum(catalogue.items["all", modality] < N for modality in config.encoders)
    row = 4 * width * (1 + lacking * (len(config.encoders) > 1))
    try:
        bounds = join_bounds(N, 4 * width, row, width, bytes_of(join.memory))
    except BadInput as error:
        found.misfits.append(f"join: {error}: raise --join.memory")
        return
    blocks, k = math.ceil(N / bounds.block), join.neighbours
    tiles, pairs = blocks * (blocks + 1) // 2, min(join.pairs_per_item * N, N * (N - 1) / 2)
    # Ten pairs are scored until one neighbour is certain; every other product is looked at again.
    scored = (0.9e-6 + 2e-9 * width) * (pairs + 10 * k * N) + 60e-6 * N * (k > 0)
    seconds = start + 0.7 + (0.75 * N**2 * product + scored) / ranks + 0.01 * tiles
    memory = join_peak(bounds, N, 4 * width + row, int(pairs), tiles)
    note = f"{tiles:,} block pairs, {pairs:,.0f} pairs at most"
    found.stages.append(Stage("join", ranks, seconds, memory, 19 * pairs + 20 * k * N, note))
    found.check("join on all ranks", ranks * memory, room, "a smaller --join.memory")
    seconds, memory = start + 45e-6 * N + 0.4e-6 * pairs, 300 * min(pairs, 500_000) + 60 * N
    found.stages.append(Stage("match", 1, seconds, PROGRAM + memory, 40 * N))
