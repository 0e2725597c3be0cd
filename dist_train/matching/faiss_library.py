"""FAISS, imported once and with care; everything else takes it from here.

The wheel brings an OpenBLAS of 2021 that does not know newer processors and then multiplies at a
fifth of their speed. The kernel is chosen when the library is loaded, so it must be named before:
NumPy's newer OpenBLAS, loaded already, has found the right one. After it was imported a process
must not be forked (its threads hang in the child): workers are spawned.
"""

import importlib
import logging
import os
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

log = logging.getLogger(__name__)
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


def on_gpu(index: Any) -> Any:
    """A copy of an index on this process's GPU; the index itself where FAISS has none of its kind.

    To be called only where `gpus()` are. Of an index in an id map the inside is copied.
    """
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 << 20)
    number = int(os.environ.get("LOCAL_RANK", "0")) % gpus()
    try:
        return faiss.index_cpu_to_gpu(resources, number, index, faiss.GpuClonerOptions())
    except RuntimeError as error:  # of a kind that only CPUs have, or too large
        log.warning("%s stays on the CPU: %s", type(index).__name__, str(error).splitlines()[-1])
        return index


def on_cpu(index: Any) -> Any:
    """A copy of an index that may be on a GPU, in plain memory; one that is there already."""
    return faiss.index_gpu_to_cpu(index) if gpus() else index
