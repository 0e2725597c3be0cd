"""Kinds of FAISS index: exact ones, one with inverted lists, and any other by its factory string.

The choice is a function of the number of items, the width and the memory of a process that holds
all shards at once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_train.matching.faiss_library import faiss, gpus, on_gpu
from shards.errors import BadInput

EXACT = ("Flat", "SQfp16")
OVERHEAD = 1.1
"""Ids, lists and buffers beside the vectors."""
TRAIN_PER_LIST = 48
"""Vectors a list for k-means; FAISS wants 39."""


@dataclass(frozen=True)
class Kind:
    """An index to build: its name, what FAISS's factory is asked for, and why."""

    name: str
    factory: str
    reason: str

    @property
    def exact(self) -> bool:
        """All stored rows are compared, in float32 or float16."""
        return self.name in EXACT


def choose_kind(wanted: str, items: int, width: int, memory: int) -> Kind:
    """The index for N `items` of D = `width` within `memory` bytes.

    Raises BadInput for a kind that FAISS does not know.
    """
    if wanted == "auto":
        return _by_memory(items, width, memory)
    lists = number_of_lists(items)
    factory = {"IVF": f"IVF{lists},SQfp16"}.get(wanted, wanted)
    try:
        faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        told = str(error).splitlines()[-1]
        raise BadInput(f"--kind {wanted}: FAISS cannot make it for {width} columns ({told}); "
                       "take auto, Flat, SQfp16 or IVF") from None  # fmt: skip
    return Kind(wanted, factory, "asked for")


def _by_memory(items: int, width: int, memory: int) -> Kind:
    for name, size in (("Flat", 4), ("SQfp16", 2)):
        needed = int(items * width * size * OVERHEAD)
        if needed <= memory:
            return Kind(name, name, f"{needed / 1e9:.2f} GB of {memory / 1e9:.2f} GB, exact")
    lists = number_of_lists(items)
    needed = int(items * width * OVERHEAD)
    if needed <= memory:
        return Kind("IVF", f"IVF{lists},SQ8", f"{needed / 1e9:.2f} GB in bytes, approximate")
    codes = max(1, next(m for m in range(width // 4, 0, -1) if width % m == 0))
    needed = int(items * (codes + 8) * OVERHEAD)
    told = f"{needed / 1e9:.2f} GB in codes of {codes} bytes, approximate"
    return Kind("IVF", f"IVF{lists},PQ{codes}x8", told)


def number_of_lists(items: int) -> int:
    """About 4 sqrt(N), as FAISS's guidelines say, with enough items to train each."""
    return max(1, min(int(4 * items**0.5), items // TRAIN_PER_LIST))


def empty_index(kind: Kind, width: int, sample: np.ndarray) -> Any:
    """An index without rows, trained on `sample` float32 (n, D) where the kind wants it."""
    index = faiss.index_factory(width, kind.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        if gpus():
            copy = on_gpu(index)
            copy.train(sample)
            index = faiss.index_gpu_to_cpu(copy)
        else:
            index.train(sample)
    return index


def with_ids(index: Any) -> Any:
    """The index itself where it takes ids, else wrapped so that it does."""
    return index if isinstance(index, faiss.IndexIVF) else faiss.IndexIDMap2(index)


def set_nprobe(index: Any, nprobe: int) -> None:
    """How many lists a search looks into; without lists there is nothing to set."""
    if nprobe:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
