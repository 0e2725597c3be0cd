"""A short trial of an encoder on real items: seconds and memory of a training step, by its batch.

Two batches of different size in a process of its own give a line each for seconds and for memory;
the plan reads both at the batch that is wanted. The head is left small here: it has a formula.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_train.config import TrainingOptions, View
from dist_train.encoders.batches import BatchPlan, load, plan_batches, unit_vectors
from dist_train.runtime import Clock, Runtime, peak_bytes
from dist_train.training.data import training_items
from dist_train.training.setup import Training, set_up
from shards.reader import ShardSet

SIZES = {"cpu": (2, 6), "cuda": (8, 32)}
STEPS = 3
"""The first warms up; the fastest of the others counts."""
HEAD_ROWS, HEAD_BATCH = 8192, 512


@dataclass(frozen=True)
class Trial:
    """Of one encoder: what a step on b items takes, as (at none, each item more)."""

    device: str
    width: int
    parameters: int
    step_seconds: tuple[float, float]
    step_bytes: tuple[float, float]
    embed_seconds: float
    """An item, forward only."""
    decode_seconds: float
    """An item, on one core."""
    head_flops: float
    """A second, in the products of the head."""

    def seconds(self, batch: int) -> float:
        """Of a step on `batch` items."""
        return self.step_seconds[0] + self.step_seconds[1] * batch

    def bytes(self, batch: int) -> float:
        """At the peak of a step on `batch` items, without the head."""
        return self.step_bytes[0] + self.step_bytes[1] * batch


def try_out(view: View, shards: Path, config: TrainingOptions) -> Trial:
    """Train `view` for a few steps on the sample. Raises what the training would raise."""
    # Not a Pool: it ends its processes by SIGTERM, which ours take for a wish to stop in order.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return Trial(**pool.submit(_trial, view, shards, config).result())


def _trial(view: View, shards: Path, config: TrainingOptions) -> dict[str, Any]:
    runtime, shard_set = Runtime(config.device), ShardSet(shards)
    small, large = SIZES[runtime.device.type]
    plain = replace(config, batch_size=large, accumulation=1, photos_per_product=1, workers=0)
    items = training_items(shard_set, view, plain, 1)
    training = set_up(view, plain, items, runtime)
    inputs = training.encoder.training_inputs(plain)
    numbers = items.numbers.repeat(-(-large // len(items.numbers)))[:large]
    plan = BatchPlan(numbers, items.numbers[:1].repeat(large) * 0)
    clock = Clock()
    (batch,) = load(items.reader, inputs, [plan], 0, stand_ins=items.numbers)
    decode = clock.seconds() / large
    seconds, memory = {}, {}
    for size in (small, large):
        seconds[size], memory[size] = _steps(training, batch, size, runtime.device)
    told = Trial(
        runtime.device.type, training.encoder.width,
        sum(p.numel() for p in training.encoder.parameters() if p.requires_grad),
        _line(seconds), _line(memory), _embedding(training, items, runtime), decode,
        head_flops(runtime.device),
    )  # fmt: skip
    return asdict(told)


def _steps(training: Training, batch: Any, size: int, device: torch.device) -> tuple[float, float]:
    """Least seconds of a step on the first `size` of the batch, and the peak so far."""
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(STEPS):
        inputs = tuple(x[:size].to(device) for x in batch.inputs)
        start = _now(device)
        vectors = training.prepared(*inputs)
        loss = training.head(vectors, batch.class_ids[:size].to(device), 0.1, step)
        training.accelerator.backward(loss)
        for optimizer in (training.optimizer, training.head_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        times.append(_now(device) - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
    return min(times[1:]), float(peak)


def _embedding(training: Training, items: Any, runtime: Runtime) -> float:
    encoder = training.encoder.eval()
    some = items.numbers[: SIZES[runtime.device.type][1]]
    plans = plan_batches(items.reader, some, len(some))
    batches = list(load(items.reader, encoder.inputs(), plans * 2, 0))
    times = []
    for batch in batches:
        start = _now(runtime.device)
        list(unit_vectors(encoder, iter([batch]), 1, runtime.device))
        times.append(_now(runtime.device) - start)
    return min(times) / len(some)


def head_flops(device: torch.device) -> float:
    """Operations a second of a float32 product such as the head's."""
    a = torch.randn(HEAD_ROWS, 256, device=device)
    b = torch.randn(256, HEAD_BATCH, device=device)
    times = []
    for _ in range(4):
        start = _now(device)
        torch.mm(a, b)
        times.append(_now(device) - start)
    return 2 * HEAD_ROWS * 256 * HEAD_BATCH / min(times)


def _line(values: dict[int, float]) -> tuple[float, float]:
    """Through the values at two sizes, falling nowhere."""
    (small, low), (large, high) = values.items()
    each = max(0.0, (high - low) / (large - small))
    return max(0.0, low - each * small), each


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
