"""Memory of this process and its GPU: the peak, what is still free, and what can be returned."""

import ctypes
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import torch


def peak_bytes() -> int:
    """The most memory that this process has held (ru_maxrss may be that of its parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def device_peak_bytes(device: torch.device) -> int:
    """Bytes at the peak: of the GPU if `device` is one, else of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


def reset_peak(device: torch.device) -> None:
    """Restart `device_peak_bytes` from what is in use now; free memory goes back to the system."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim_allocators()
    with suppress(OSError):  # a kernel without clear_refs keeps the earlier peak
        Path("/proc/self/clear_refs").write_text("5")


def trim_allocators() -> None:
    """Return what is free in the allocators to the system.

    Between blocks of changing sizes glibc keeps gaps: after some minutes as much again as is held.
    """
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)


def free_memory() -> int:
    """Bytes that this process may still allocate: of the machine and of its control group (v2)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" if there is no limit
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free
