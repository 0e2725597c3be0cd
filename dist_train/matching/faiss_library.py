"""FAISS: the library, loaded with care, its copies on GPUs, and the kinds of index built with it.

The wheel brings an OpenBLAS of 2021 that does not know newer processors and multiplies on them at a
fifth of their speed. Its kernel is chosen when the library is loaded, so it must be named before:
NumPy's newer OpenBLAS, loaded already, has found the right one. A process that has imported FAISS
must not be forked (the library's threads hang in the child): workers are spawned.
"""

import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import AGAIN

CHOICE = "OPENBLAS_CORETYPE"
KNOWN = {"Cooperlake": "SkylakeX", "SapphireRapids": "SkylakeX"} | {
    name: name for name in ("SkylakeX", "Haswell", "Zen", "Sandybridge", "Nehalem")
}
"""NumPy's kernel to the nearest one that the old OpenBLAS has."""
EXACT = ("Flat", "SQfp16")
"""Kinds whose search compares all stored rows, in float32 or float16."""
OVERHEAD = 1.1
"""Factor for ids, lists and buffers beside the vectors."""
PQ_ROWS = 256
"""The fewest rows that FAISS trains eight-bit codes on."""
TRAIN_PER_LIST = 48
"""Vectors for k-means for each list; FAISS recommends at least 39."""
log = logging.getLogger(__name__)


def _load() -> Any:
    """Import FAISS with the OpenBLAS kernel named; a choice of the user's stays."""
    np.ones((2, 2)) @ np.ones((2, 2))
    ours = [lib.get("architecture") for lib in threadpool_info() if lib["user_api"] == "blas"]
    kernel = KNOWN.get(str(ours[0])) if ours else None
    if kernel is None or CHOICE in os.environ:
        return importlib.import_module("faiss")
    os.environ[CHOICE] = kernel
    try:
        return importlib.import_module("faiss")
    finally:
        del os.environ[CHOICE]  # child processes choose for themselves


faiss = _load()


def gpus() -> int:
    """GPUs that FAISS may use. To be called before any GPU call: without a driver those abort."""
    return getattr(faiss, "get_num_gpus", lambda: 0)()


def read_faiss(path: Path, width: int, items: int | None = None) -> Any:
    """The index in a file, of D = `width` and of so many `items`; Corrupt for anything else."""
    try:
        index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:  # FAISS believes the sizes that a file claims
        reason = " ".join(str(error).split())[-150:]
        raise Corrupt(f"{path}: FAISS cannot read it ({reason}); {AGAIN}") from None
    wanted = index.ntotal if items is None else items
    if (index.ntotal, index.d) != (wanted, width):
        raise Corrupt(
            f"{path}: holds {index.ntotal} rows of width {index.d}, wanted {wanted} of {width}; "
            f"{AGAIN}"
        )
    return index


def on_gpu(index: Any) -> Any:
    """A copy of an index on this process's GPU; the index itself if FAISS has none of its kind.

    To be called only where `gpus()` is not 0. If the index is an id map, its content is copied.
    """
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 << 20)
    number = int(os.environ.get("LOCAL_RANK", "0")) % gpus()
    try:
        return faiss.index_cpu_to_gpu(resources, number, index, faiss.GpuClonerOptions())
    except RuntimeError as error:  # a kind that FAISS has only for CPUs, or too large
        log.warning("%s stays on the CPU: %s", type(index).__name__, str(error).splitlines()[-1])
        return index


def on_cpu(index: Any) -> Any:
    """A copy in plain memory of an index that may be on a GPU; else the index itself."""
    return faiss.index_gpu_to_cpu(index) if gpus() else index


@dataclass(frozen=True)
class Kind:
    """An index to build: its name, its factory string for FAISS, and why it was chosen."""

    name: str
    factory: str
    reason: str


def choose_kind(wanted: str, items: int, width: int, memory: int) -> Kind:
    """The kind of index for N `items` of D = `width`.

    `auto` is the most exact kind of which `memory` bytes hold all shards at once. Raises BadInput
    for a factory string that FAISS does not know.
    """
    lists = number_of_lists(items)
    if wanted != "auto":
        factory = {"IVF": f"IVF{lists},SQfp16"}.get(wanted, wanted)
        try:
            faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise BadInput(
                f"--kind {wanted}: FAISS cannot make it for {width} columns "
                f"({str(error).splitlines()[-1]}); use auto, Flat, SQfp16 or IVF"
            ) from None
        return Kind(wanted, factory, "requested")
    choices = [
        (4 * width, Kind("Flat", "Flat", "exact")),
        (2 * width, Kind("SQfp16", "SQfp16", "exact to float16")),
        (width, Kind("IVF", f"IVF{lists},SQ8", "approximate, numbers as bytes")),
    ]
    if items >= PQ_ROWS:
        # A quarter of the columns, or the next lower number that divides them.
        codes = next((m for m in range(width // 4, 0, -1) if width % m == 0), 1)
        reason = f"approximate, rows as codes of {codes} bytes"
        choices.append((codes, Kind("IVF", f"IVF{lists},PQ{codes}x8", reason)))
    sizes = [(int(items * row_bytes * OVERHEAD), kind) for row_bytes, kind in choices]
    needed, kind = next((size for size in sizes if size[0] <= memory), sizes[-1])
    fits = "within" if needed <= memory else "more than"
    reason = f"{kind.reason}: {needed / 1e9:.2f} GB, {fits} the {memory / 1e9:.2f} GB given"
    return Kind(kind.name, kind.factory, reason)


def number_of_lists(items: int) -> int:
    """About 4 sqrt(N), as FAISS's guidelines recommend, with enough items to train each list."""
    return max(1, min(int(4 * items**0.5), items // TRAIN_PER_LIST))


def set_nprobe(index: Any, nprobe: int) -> None:
    """Set how many lists a search visits; 0 for an index without lists."""
    if nprobe:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
