"""Kinds of FAISS index: exact ones, one with inverted lists, and any other by its factory string.

The choice is a function of the number of items, the width and the memory of a process that holds
all shards at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_train.matching.faiss_library import faiss, gpus, on_cpu, on_gpu
from shards.storage.errors import BadInput

EXACT = ("Flat", "SQfp16")
OVERHEAD = 1.1
"""Ids, lists and buffers beside the vectors."""
PQ_ROWS = 256
"""What FAISS trains codes of eight bits on, at the least."""
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
    lists, codes = number_of_lists(items), _codes(width)
    choices = [
        Kind("Flat", "Flat", "exact"),
        Kind("SQfp16", "SQfp16", "exact to float16"),
        Kind("IVF", f"IVF{lists},SQ8", "approximate, numbers as bytes"),
    ]
    if items >= PQ_ROWS:
        name = f"IVF{lists},PQ{codes}x8"
        choices.append(Kind("IVF", name, f"approximate, rows as codes of {codes} bytes"))
    for kind in choices:
        needed = int(items * bytes_of_row(kind, width) * OVERHEAD)
        if needed <= memory or kind is choices[-1]:
            break
    told = "within" if needed <= memory else "more than"
    reason = f"{kind.reason}: {needed / 1e9:.2f} GB, {told} the {memory / 1e9:.2f} GB given"
    return Kind(kind.name, kind.factory, reason)


def bytes_of_row(kind: Kind, width: int) -> int:
    """In memory and on disk, ids aside; of a factory string of the user's, that of Flat."""
    code = kind.factory.rpartition(",")[2]
    sizes = {"SQfp16": 2 * width, "SQ8": width, f"PQ{_codes(width)}x8": _codes(width)}
    return sizes.get(code, 4 * width)


def _codes(width: int) -> int:
    """Bytes of a row in product quantisation: a quarter of its columns, or what divides them."""
    return max(1, next((m for m in range(width // 4, 0, -1) if width % m == 0), 1))


def number_of_lists(items: int) -> int:
    """About 4 sqrt(N), as FAISS's guidelines say, with enough items to train each."""
    return max(1, min(int(4 * items**0.5), items // TRAIN_PER_LIST))


def empty_index(kind: Kind, width: int, sample: Callable[[], np.ndarray]) -> Any:
    """An index without rows, trained on a `sample` float32 (n, D) where the kind wants it."""
    index = faiss.index_factory(width, kind.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        # Only of lists does FAISS train a copy on a GPU and give back the same kind.
        copy = on_gpu(index) if gpus() and has_lists(index) else index
        copy.train(sample())
        index = on_cpu(copy) if copy is not index else index
    return index


def has_lists(index: Any) -> bool:
    """It takes ids by itself, and FAISS builds it on a GPU; a copied Flat or SQfp16 gains nothing.

    An IVF behind a transform (OPQ, PCA) is wrapped and built on a CPU.
    """
    return isinstance(index, faiss.IndexIVF)


def set_nprobe(index: Any, nprobe: int) -> None:
    """How many lists a search looks into; without lists there is nothing to set."""
    if nprobe:
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)
