"""What a sample of the items decides before the join: score floor, fastest kernel, engine."""

from dataclasses import dataclass
from functools import partial
from time import process_time
from timeit import Timer

import numpy as np

from dist_train.matching.blocks import CHUNK
from dist_train.matching.kernels import Chunk, CoarsePassStats, Kernel, candidates_of, use_threads
from dist_train.matching.vectors import ItemVectors, read_rows, subset, weighted_rows

SAMPLE, QUERIES = 4_096, 256
"""Items that the kernels are timed on; items that the score floor is estimated from."""
HIGHEST_SCORE_FLOOR = 0.999
"""No budget raises the floor above it: copies of one photo must not be dropped, however many, and
two float16 rows of the same numbers score 0.9996 to 1.0004."""
MEASURED_FROM = 8_192
"""Items; with fewer the first kernel is done before others are measured."""
TIMED_QUERIES, TIMED_ROWS, TRIES = 1_024, 2_048, 3
"""Rows on both sides of the product that a kernel is timed on, and how often."""
FAISS_QUERIES = 512
"""Rows that FAISS is timed on, and whose neighbours give the floor that a kernel is timed at."""


def sample_rows(vectors: ItemVectors) -> np.ndarray:
    """Weighted rows float32 (n, D) of SAMPLE items of the most frequent kind, evenly spread.

    They are shuffled: otherwise neighbours in the catalogue would all fall into one half.
    """
    kind, mask = max(vectors.kinds.items(), key=lambda item: item[1].sum())
    rows = np.flatnonzero(mask)
    rows = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64)]
    rows = np.random.default_rng(0).permutation(rows)
    names = tuple(vectors.modalities) if kind == "complete" else (kind,)
    return weighted_rows(vectors, names, {name: vectors.stored_rows(name, rows) for name in names})


def sampled_score_floor(vectors: ItemVectors, pairs_per_item: float) -> float:
    """The score that about `pairs_per_item` N pairs reach, estimated from a sample of the items.

    Rounded up to 1/1000, so that it is the same on every machine; from 0.05 to HIGHEST_SCORE_FLOOR.
    """
    N = len(vectors)
    rows = np.unique(np.linspace(0, N - 1, min(N, QUERIES)).astype(np.int64))
    sample = subset(vectors, rows)
    # Each pair is seen from both its items, and each item sees itself.
    keep = max(1, int((2 * pairs_per_item + 1) * len(rows)))
    best, lowest = np.zeros(0, np.float32), -np.inf
    # In blocks of fixed size: memory must not grow with the items.
    for start in range(0, N, CHUNK):
        scores = coarse_scores(sample, vectors, range(start, min(start + CHUNK, N)))
        best = np.concatenate([best, scores[scores > lowest]])
        if len(best) >= keep:
            best = np.partition(best, len(best) - keep)[len(best) - keep :]
            lowest = best[0]
    rounded = float(np.ceil(max(float(lowest), -1.0) * 1000) / 1000)
    return min(max(0.05, rounded), HIGHEST_SCORE_FLOOR)


def coarse_scores(sample: ItemVectors, vectors: ItemVectors, rows: range) -> np.ndarray:
    """Scores float32 (n, len(rows)) of n items against rows; -inf without a common modality."""
    total = np.zeros((len(sample), len(rows)), np.float32)
    weights = np.zeros_like(total)
    for name, one in vectors.modalities.items():
        few = sample.modalities[name]
        both = np.outer(few.present, one.present[rows.start : rows.stop])
        database = read_rows(one.rows, rows).astype(np.float32)
        queries = read_rows(few.rows, range(len(sample))).astype(np.float32)
        total += np.float32(one.weight) * (queries @ database.T) * both
        weights += np.float32(one.weight) * both
    return np.where(weights > 0, total / np.maximum(weights, 1e-9), -np.inf).astype(np.float32)


@dataclass(frozen=True)
class KernelTime:
    """A kernel, and the processor time of its coarse pass in ns a pair of rows; 0: not measured."""

    kernel: Kernel
    nanoseconds: float

    def __str__(self) -> str:
        took = f"{self.nanoseconds:.2f} ns a pair" if self.nanoseconds else "no other was measured"
        return f"{self.kernel.name}, {took}"


def time_kernels(
    vectors: ItemVectors, score_floor: float, k: int, kernels: list[Kernel]
) -> list[KernelTime]:
    """The kernels by their time on a sample of the items, the fastest first.

    With few items or one kernel nothing is measured and the first kernel is returned. Neighbours
    may score below the floor of pairs: with `k` of them the sample's floor is lower. The kernels
    take turns; the best of TRIES counts, in processor time, so that other programs on the machine
    do not decide.
    """
    if len(kernels) == 1 or vectors.any_modality.sum() < MEASURED_FROM:
        return [KernelTime(kernels[0], 0.0)]
    rows = sample_rows(vectors)
    if k:
        scores = rows[:FAISS_QUERIES] @ rows[len(rows) // 2 :].T
        score_floor = min(score_floor, float(np.quantile(scores, max(0.0, 1 - k / len(vectors)))))
    some, others = rows[:TIMED_QUERIES], rows[TIMED_QUERIES : TIMED_QUERIES + TIMED_ROWS]
    ids, timers = np.arange(len(rows)), []
    for kernel in kernels:
        queries = Chunk(ids[: len(some)], kernel.prepare(some, "query"), [(1.0, some)])
        database = Chunk(ids[: len(others)], kernel.prepare(others, "database"), [(1.0, others)])
        arguments = kernel, queries, database, False, score_floor, None, CoarsePassStats()
        timers.append(Timer(partial(candidates_of, *arguments), timer=process_time))
    rounds = [[timer.timeit(1) for timer in timers] for _ in range(TRIES)]
    each = 1e9 / (len(some) * len(others))
    times = [KernelTime(kernel, each * min(t)) for kernel, *t in zip(kernels, *rounds, strict=True)]
    return sorted(times, key=lambda timed: timed.nanoseconds)


def faiss_nanoseconds(rows: np.ndarray, kind: str, score_floor: float) -> float:
    """Processor time of FAISS's range search for an unordered pair of the sample `rows` (n, D)."""
    # Imported only here: a training's validation never comes here, and its loaders fork.
    from dist_train.matching.faiss_library import faiss

    use_threads()
    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.add(rows)
    queries = rows[:FAISS_QUERIES]
    timer = Timer(lambda: index.range_search(queries, score_floor), timer=process_time)
    # It finds each pair twice, once from each side.
    return 2e9 * min(timer.repeat(TRIES, 1)) / (len(queries) * len(rows))
