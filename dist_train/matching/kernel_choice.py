"""Which kernel multiplies the rows: all that work on this machine are timed on a sample."""

import time
from dataclasses import dataclass

import numpy as np

from dist_train.matching.coarse_pass import FirstPass, Side, candidates_of
from dist_train.matching.faiss_library import faiss
from dist_train.matching.kernels import Kernel
from dist_train.matching.sampling import sample_rows
from dist_train.matching.threads import use_threads
from dist_train.matching.vectors import ItemVectors

MEASURED_FROM = 8_192
"""Items; with fewer the plain kernel is done before others are measured."""
ROWS = 1_024
"""Rows, and twice as many others, of the product that a kernel is timed on."""
QUERIES = 512
"""Rows that FAISS is timed on, and whose neighbours tell the floor that a kernel is timed at."""
TRIES = 3


@dataclass(frozen=True)
class Choice:
    """A kernel, and what the sample says of it."""

    kernel: Kernel
    nanoseconds: float
    """Processor time for a pair of rows: product, comparison and second look; 0 if not measured."""

    def __str__(self) -> str:
        took = f"{self.nanoseconds:.2f} ns a pair" if self.nanoseconds else "no other was measured"
        return f"{self.kernel.name}, {took}"


def choose_kernel(views: ItemVectors, floor: float, k: int, kernels: list[Kernel]) -> list[Choice]:
    """The kernels by their time on a sample of the items, the fastest first.

    With few items, or with one kernel, nothing is measured and the first kernel is taken. A
    neighbour may score below the floor of pairs: with `k` of them the sample's floor is lower.
    """
    if len(kernels) == 1 or views.some.sum() < MEASURED_FROM:
        return [Choice(kernels[0], 0.0)]
    rows = sample_rows(views)
    if k:
        scores = rows[:QUERIES] @ rows[len(rows) // 2 :].T
        floor = min(floor, float(np.quantile(scores, max(0.0, 1 - k / len(views)))))
    return sorted(measured(kernels, rows, floor), key=lambda choice: choice.nanoseconds)


def measured(kernels: list[Kernel], rows: np.ndarray, floor: float) -> list[Choice]:
    """Time every kernel on a product of sample rows float32 (n, D), in turns, the best of TRIES."""
    some, others = rows[:ROWS], rows[ROWS : 3 * ROWS]
    ids = np.arange(len(rows))
    sides = [
        (
            Side(ids[: len(some)], kernel.left(some), [(1.0, some)]),
            Side(ids[: len(others)], kernel.right(others), [(1.0, others)]),
        )
        for kernel in kernels
    ]
    best = [float("inf")] * len(kernels)
    for _ in range(TRIES):
        for n, (kernel, (one, other)) in enumerate(zip(kernels, sides, strict=True)):
            # The processor's time: others on the machine must not decide.
            begin = time.process_time()
            candidates_of(kernel, one, other, False, floor, None, FirstPass())
            best[n] = min(best[n], time.process_time() - begin)
    each = 1e9 / (len(some) * len(others))
    return [Choice(kernel, each * spent) for kernel, spent in zip(kernels, best, strict=True)]


def faiss_nanoseconds(rows: np.ndarray, kind: str, floor: float) -> float:
    """What FAISS's range search takes for an unordered pair of the sample, which it finds twice."""
    use_threads()
    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.add(rows)
    queries, best = rows[:QUERIES], float("inf")
    for _ in range(TRIES):
        begin = time.process_time()
        index.range_search(queries, floor)
        best = min(best, (time.process_time() - begin) / (len(queries) * len(rows)))
    return 2e9 * best
