"""What a run records while it trains: metrics.jsonl, TensorBoard, speed and memory."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.tensorboard import SummaryWriter

from dist_train.distributed.memory import device_peak_bytes
from shards.storage.files import write_atomic

Batch = TypeVar("Batch")


class Metrics:
    """Scalars by step, written by rank 0 to `run/metrics.jsonl` and `run/tensorboard`."""

    def __init__(self, run: Path, step: int, enabled: bool = True) -> None:
        """Continue at `step`: rows of later steps, which an interrupted attempt left, are dropped.

        Ranks that are not `enabled` write nothing.
        """
        self._enabled = enabled
        if not enabled:
            return
        path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, group: str, values: dict[str, float]) -> None:
        """Record scalars `group/name` at `step`.

        NaN and Inf, which a skipped step may have, are left out: JSON cannot express them, and
        other readers would refuse the file.
        """
        if not self._enabled:
            return
        named = {f"{group}/{k}": value for k, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step} | named) + "\n")
        self._file.flush()
        for name, value in named.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        if self._enabled:
            self._file.close()
            self._board.close()


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a last line that a kill cut short is left out."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Meter:
    """Speed and memory of one rank over the steps since it was last read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps, self._working, self._waiting = 0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a step; what happens between steps (validation, checkpoints) does not count."""
        began = time.monotonic()
        yield
        self._steps += 1
        self._working += time.monotonic() - began

    def timed_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time spent waiting for each is added up."""
        began = time.monotonic()
        for batch in batches:
            self._waiting += time.monotonic() - began
            yield batch
            began = time.monotonic()

    def read(self, batch_size: int) -> dict[str, float]:
        """Samples per second, seconds of a step, fraction of it spent waiting for data, peak GB.

        The peak is of the GPU's memory if there is one, else of this process since it began.
        """
        seconds = max(self._working, 1e-9)
        values = {
            "samples_per_second": self._steps * batch_size / seconds,
            "step_seconds": seconds / max(self._steps, 1),
            "data_wait": self._waiting / seconds,
            "memory_gb": device_peak_bytes(self._device) / 1e9,
        }
        self._steps, self._working, self._waiting = 0, 0.0, 0.0
        return values
