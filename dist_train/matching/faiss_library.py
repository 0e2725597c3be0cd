"""FAISS, imported once and with care; everything else takes it from here.

The wheel brings an OpenBLAS of 2021 that does not know newer processors and then multiplies at a
fifth of their speed. The kernel is chosen when the library is loaded, so it must be named before:
NumPy's newer OpenBLAS, loaded already, has found the right one. After it was imported a process
must not be forked (its threads hang in the child): workers are spawned.
"""

import importlib
import os
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

CHOICE = "OPENBLAS_CORETYPE"
KNOWN = {
    "SkylakeX": "SkylakeX", "Cooperlake": "SkylakeX", "SapphireRapids": "SkylakeX",
    "Haswell": "Haswell", "Zen": "Zen", "Sandybridge": "Sandybridge", "Nehalem": "Nehalem",
}  # fmt: skip
"""NumPy's kernel to the one of that kind that the old OpenBLAS has."""


def kernel_for_faiss() -> str | None:
    """The OpenBLAS kernel to ask for; None to leave the choice to the library or the user."""
    if CHOICE in os.environ:
        return None
    np.ones((2, 2)) @ np.ones((2, 2))
    ours = [lib.get("architecture") for lib in threadpool_info() if lib["user_api"] == "blas"]
    return KNOWN.get(str(ours[0])) if ours else None


def _load() -> Any:
    kernel = kernel_for_faiss()
    if kernel is None:
        return importlib.import_module("faiss")
    os.environ[CHOICE] = kernel
    try:
        return importlib.import_module("faiss")
    finally:
        del os.environ[CHOICE]  # children choose for themselves


faiss = _load()


def gpus() -> int:
    """GPUs that FAISS may use. To be asked before any GPU call: without a driver those abort."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def use_threads() -> None:
    """As many threads as OMP_NUM_THREADS says, or this rank's share of the processors."""
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, cores // ranks))))


def on_gpu(index: Any) -> Any:
    """A copy of an index on this process's GPU; to be called only where `gpus()` are."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 << 20)
    number = int(os.environ.get("LOCAL_RANK", "0")) % gpus()
    return faiss.index_cpu_to_gpu(resources, number, index, faiss.GpuClonerOptions())
