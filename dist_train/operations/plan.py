"""What each stage will take, before anything runs: seconds, memory of a rank, bytes on disk, sent.

From the formulas of the head and of the join, a sample of the catalogue that is really packed, and
a short trial of each encoder on it.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory

import torch

from dist_train.config import Config, TrainingOptions, View
from dist_train.heads.estimate import HeadEstimate, megabytes
from dist_train.matching import cost
from dist_train.operations.machine import existing, free_memory
from dist_train.operations.sample import Counts, Packed, count, packed_sample
from dist_train.operations.trial import Trial, try_out
from dist_train.training.head_start import head_estimate
from shards.errors import BadInput

CHECKPOINT = 3
"""Times the weights: they and both of AdamW's moments."""
SHARE = 0.9
"""Of a memory that is counted on; the rest goes to fragments and to the driver."""


@dataclass(frozen=True)
class Need:
    """One stage: seconds by the clock, bytes of a rank's memory, bytes left on disk, bytes sent
    by a rank in all. None: not known without a trial.
    """

    stage: str
    ranks: int
    seconds: float | None
    memory_bytes: float | None
    disk_bytes: float
    sent_bytes: float = 0.0
    why: str = ""


@dataclass
class Plan:
    """All stages, and what will not fit."""

    device: str
    needs: list[Need] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    """What will not fit, each with the setting that would make it."""

    def to_json(self) -> str:
        """For programs."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        head = ("stage", "ranks", "time", "memory a rank", "disk", "sent a rank", "")
        rows = [head, *map(_cells, self.needs)]
        widths = [max(len(row[n]) for row in rows) for n in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
            for row in rows
        ]
        fits = [f"does not fit: {told}" for told in self.unfit] or ["everything fits"]
        return "\n".join(line.rstrip() for line in [*lines, f"on {self.device}", *fits])


def plan(config: Config, processes: int, measure: bool) -> Plan:
    """What `dist-train run` would take with these options on `processes` ranks of this machine.

    0 ranks: as many as there are GPUs, or one. Raises BadInput for what cannot be read.
    """
    world = processes or max(1, _gpus(config))
    counts = count(config)
    memory = _memory_of_a_rank(config, world)
    found = Plan(f"{_device(config)}, {world} ranks with {megabytes(memory)} each")
    with TemporaryDirectory(prefix="dist_train-plan-") as folder:
        packed = packed_sample(config, counts.postings, Path(folder))
        found.needs.append(_packing(config, counts, packed))
        trials: dict[View, Trial] = {}
        if measure:
            trials = {
                view: try_out(view, packed.shards, _options(config, view))
                for view in config.encoders
            }
    for view in config.encoders:
        _train(found, config, counts, view, trials.get(view), world, memory)
    if trials:
        found.needs.append(_embedding(config, counts, trials, world))
        _match(found, config, counts, trials, world)
    _disk(found, config)
    return found


def _packing(config: Config, counts: Counts, packed: Packed) -> Need:
    seconds = packed.seconds_each * counts.postings / config.pack.workers
    why = f"{counts.postings:,} postings, {packed.bytes_each / 1e3:.1f} kB each in a sample"
    return Need("pack", config.pack.workers, seconds, None, packed.bytes_each * counts.postings,
                why=why)  # fmt: skip


def _train(
    found: Plan, config: Config, counts: Counts, view: View, trial: Trial | None, world: int,
    memory: float,
) -> None:  # fmt: skip
    options, items = _options(config, view), counts.items["train", view]
    steps = math.ceil(options.epochs * items / options.batch_size)
    told = f"{items:,} items, {counts.classes:,} classes, {steps:,} steps"
    if trial is None:
        found.needs.append(Need(f"train {view}", world, None, None, 0, why=told))
        return
    head = head_estimate(options, counts.classes, trial.width, world)
    share = max(1, options.batch_size // (options.accumulation * world))
    needed = trial.bytes(share) + head.total
    step = options.accumulation * _pass_seconds(trial, head, options, share)
    validations = 1 + (options.epochs / options.validate_every if options.validate_every else 0)
    checks = validations * counts.items["val", view] * trial.embed_seconds / world
    weights = 4 * trial.parameters + 4 * head.classes * head.centres * head.width
    sent = steps * (_ring(world) * 4 * trial.parameters + head.communication)
    found.needs.append(Need(
        f"train {view}", world, steps * step + checks, needed,
        options.keep * CHECKPOINT * weights, sent,
        f"{told}, {share} items a pass and rank, {share * options.accumulation / step:.2g} "
        "items/s a rank",
    ))  # fmt: skip
    if needed > memory:
        found.unfit.append(_smaller(view, options, trial, head, needed, memory, world))


def _pass_seconds(trial: Trial, head: HeadEstimate, options: TrainingOptions, share: int) -> float:
    """A forward and backward pass, or the decoding that it waits for."""
    flops = 8 * head.batch * head.seen * head.width  # docs/head.md, What it costs
    flops *= options.head_passes / options.accumulation
    work = trial.seconds(share) + flops / trial.head_flops
    loading = trial.decode_seconds * share
    # Without workers a rank decodes by itself.
    return max(work, loading / options.workers) if options.workers else work + loading


def _smaller(
    view: View, options: TrainingOptions, trial: Trial, head: HeadEstimate, needed: float,
    memory: float, world: int,
) -> str:  # fmt: skip
    said = f"train {view} needs {megabytes(needed)} a rank of {megabytes(memory)}"
    advice = []
    fits = _accumulation(trial, options, head.classes, memory, world)
    if fits:
        rows = options.batch_size // (fits * world)
        advice.append(f"--{view}.accumulation {fits} ({rows} items a pass and rank)")
    if not options.gradient_checkpointing:
        advice.append(f"--{view}.gradient-checkpointing")
    more = head.total - head.buffers
    if more > memory / 4:
        advice.append(f"more ranks (the head's centres take {megabytes(more)} on each of {world})")
    if not fits:
        advice.append(f"a smaller --{view}.encoder.model")
    return f"{said}; {', or '.join(advice)}"


def _accumulation(
    trial: Trial, options: TrainingOptions, classes: int, memory: float, world: int
) -> int:
    """The fewest passes a step that fit into `memory`; 0 when not even the most do."""
    rows = options.batch_size // world
    for passes in (n for n in range(options.accumulation + 1, rows + 1) if rows % n == 0):
        parted = replace(options, accumulation=passes)
        head = head_estimate(parted, classes, trial.width, world)
        if trial.bytes(rows // passes) + head.total <= memory:
            return passes
    return 0


def _embedding(config: Config, counts: Counts, trials: dict[View, Trial], world: int) -> Need:
    seconds = sum(
        counts.all_with(view) * max(trial.embed_seconds, _decoding(config, trial)) / world
        for view, trial in trials.items()
    )
    size = 2 if config.embed.dtype == "float16" else 4
    disk = sum(counts.postings * trial.width * size for trial in trials.values())
    memory = max(trial.bytes(0) for trial in trials.values())
    return Need("embed", world, seconds, memory, disk, why="forward passes; memory as in a step")


def _decoding(config: Config, trial: Trial) -> float:
    return trial.decode_seconds / config.embed.workers if config.embed.workers else 0.0


def _match(
    found: Plan, config: Config, counts: Counts, trials: dict[View, Trial], world: int
) -> None:
    try:
        told = cost.plan(
            counts.postings, sum(trial.width for trial in trials.values()), config.embed.dtype,
            world, _device(config), parts=len(trials), index=config.index, match=config.join,
        )  # fmt: skip
    except BadInput as error:
        found.unfit.append(f"join: {error}; raise --join.memory")
        return
    for name, one, why in (
        ("index", told.index, f"kind {told.kind}"),
        ("join", told.join, f"{told.tiles:,} tiles, {told.pairs:,} pairs at most"),
    ):
        need = Need(name, world, one.seconds, one.memory_bytes, one.disk_bytes, why=why)
        found.needs.append(need)
    host = SHARE * free_memory()
    if world * told.memory_bytes > host:
        found.unfit.append(
            f"index and join hold {megabytes(told.memory_bytes)} on each of {world} ranks, this "
            f"machine has {megabytes(host)} free; a smaller --join.memory and --index.memory"
        )


def _disk(found: Plan, config: Config) -> None:
    needed = sum(need.disk_bytes for need in found.needs)
    free = disk_usage(existing(config.out)).free
    found.needs.append(Need("all", 0, _sum(n.seconds for n in found.needs), None, needed))
    if needed > free:
        found.unfit.append(
            f"{config.out} needs {megabytes(needed)}, {megabytes(free)} are free there; another "
            "--out, or smaller photos by --pack.size"
        )


def _memory_of_a_rank(config: Config, world: int) -> float:
    if _device(config) == "cuda":
        return SHARE * min(
            torch.cuda.get_device_properties(n).total_memory for n in range(_gpus(config))
        )
    return SHARE * free_memory() / world


def _options(config: Config, view: View) -> TrainingOptions:
    return config.image if view == "image" else config.text


def _device(config: Config) -> str:
    asked = {_options(config, view).device for view in config.encoders}
    return "cuda" if asked != {"cpu"} and torch.cuda.is_available() else "cpu"


def _gpus(config: Config) -> int:
    return torch.cuda.device_count() if _device(config) == "cuda" else 0


def _ring(world: int) -> float:
    """What a ring all-reduce sends from each rank, as a share of the tensor."""
    return 2 * (world - 1) / world


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value or 0.0 for value in known)


def _cells(need: Need) -> tuple[str, ...]:
    time = "?" if need.seconds is None else duration(need.seconds)
    memory = "" if need.memory_bytes is None else megabytes(need.memory_bytes)
    sent = megabytes(need.sent_bytes) if need.sent_bytes else ""
    ranks = str(need.ranks) if need.ranks else ""
    return need.stage, ranks, time, memory, megabytes(need.disk_bytes), sent, need.why


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
