"""What steps cost: their time, the share of it spent waiting for data, memory."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from dist_train.runtime import Clock, give_back, peak_bytes

Thing = TypeVar("Thing")


class Meter:
    """Of one rank, over the steps since it was last read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps, self._working, self._waiting = 0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times a step; what happens between steps (validation, checkpoints) does not count."""
        clock = Clock()
        yield
        self._steps += 1
        self._working += clock.seconds()

    def waited_for(self, batches: Iterator[Thing]) -> Iterator[Thing]:
        """The batches, with the time that each is waited for."""
        while True:
            clock = Clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waiting += clock.seconds()
            yield batch

    def read(self, batch_size: int) -> dict[str, float]:
        """samples_per_second, step_seconds, data_wait (share of the time) and peak memory_gb.

        The memory is the GPU's where there is one, else the largest this process ever had.
        """
        seconds = max(self._working, 1e-9)
        told = {
            "samples_per_second": self._steps * batch_size / seconds,
            "step_seconds": seconds / max(self._steps, 1),
            "data_wait": self._waiting / seconds,
            "memory_gb": peak_memory(self._device) / 1e9,
        }
        self._steps, self._working, self._waiting = 0, 0.0, 0.0
        return told


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew from what is in use; what is free goes back to the system."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back()
    with suppress(OSError):  # a kernel without it: the peak stays that of all before
        Path("/proc/self/clear_refs").write_text("5")
