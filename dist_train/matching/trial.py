"""What the work of an index and of a join costs on this machine: real tiles and files, timed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from dist_train.embedding.store import Rows
from dist_train.matching.blocks import CHUNK, Block, Tile
from dist_train.matching.engines import GemmEngine
from dist_train.matching.faiss_library import faiss
from dist_train.matching.index import build_shard
from dist_train.matching.join import SCORES, Wanted, do_tile, in_order
from dist_train.matching.kernels import Kernel
from dist_train.matching.kinds import Kind, empty_index
from dist_train.matching.nearest import KnownFloors, merged_nearest
from dist_train.matching.proof import audit
from dist_train.matching.recall import ShardedIndex, measured_recall
from dist_train.matching.rows import take_rows
from dist_train.matching.sampling import floor_of_sample
from dist_train.matching.views import ViewPart, Views, weighted_rows
from dist_train.matching.work import Work, read_table
from shards.files import sha256_file, write_parquet

SAMPLE, LEAST = 8_192, 512
"""Rows of a trial. At least so many, else as many as there are items, so that it never takes longer
than what it is a trial of."""
ASKING, LARGEST = 2 * CHUNK, 65_536
"""Rows that ask a whole block, as large as the join's but for the largest: what its products and
its neighbours take depends on whether it lies near the processor."""
PAIRS = 200_000
"""Pairs in a file that is written and read."""
TRIES = 3
Seconds = np.ndarray
"""On the clock, and of the processor."""


@dataclass(frozen=True)
class Rates:
    """Seconds of each piece of a join's work."""

    pair: Seconds
    """A pair of rows multiplied, with what is found among such pairs."""
    visit: Seconds
    """A row of a tile, for what is kept of its neighbours."""
    fresh: Seconds
    """A row's first tile, over what others take: nothing is known of its neighbours yet."""
    tile: Seconds
    """A tile's claim, record and files."""
    row: Seconds
    """A row read and prepared."""
    item: Seconds
    """An item, for the floor before and the proof and the neighbours after."""
    start: Seconds
    """Of these, what does not depend on the number of items."""
    kept: Seconds
    """A kept pair written, read and sorted once."""
    file: Seconds
    """A tile's file read, whatever it holds."""


@dataclass(frozen=True)
class IndexRates:
    """Seconds of each piece of an index's work."""

    start: Seconds
    shard: Seconds
    """A shard's file written, hashed, read and asked, whatever it holds."""
    row: Seconds
    """A row put into a shard."""
    found: Seconds
    """A row that the recall's rows are compared with, by the index and beside it."""


def rows_of(block: int) -> int:
    """Rows of a sample that holds ASKING rows and a block of `block` rows that they ask."""
    return max(SAMPLE, ASKING + min(block, LARGEST))


def sample_views(views: Views, size: int = SAMPLE) -> Views:
    """Up to `size` evenly spread complete items, in memory, in the stored dtype."""
    rows = np.flatnonzero(views.complete)
    rows = rows[np.linspace(0, len(rows) - 1, min(size, len(rows))).astype(np.int64)]
    # In another order, so that neighbours in the catalogue do not all fall into one tile.
    rows = np.random.default_rng(0).permutation(rows)
    return Views({
        name: ViewPart(
            Rows([take_rows(part.rows, rows).astype(part.rows.parts[0].dtype)]),
            part.present[rows], part.weight,
        )
        for name, part in views.parts.items()
    })  # fmt: skip


def random_views(
    items: int, widths: Mapping[str, int], dtype: str, weights: Mapping[str, float],
    size: int = SAMPLE,
) -> Views:  # fmt: skip
    """Unit rows without any structure."""
    rng, parts, count = np.random.default_rng(0), {}, min(size, max(LEAST, items))
    for name, width in widths.items():
        rows = rng.standard_normal((count, width), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        parts[name] = ViewPart(Rows([rows.astype(dtype)]), np.ones(count, bool), weights[name])
    return Views(parts)


def score_of_share(views: Views, share: float) -> float:
    """The score that this share of the pairs of a sample reaches."""
    names = tuple(views.parts)
    stored = {name: part.rows.parts[0] for name, part in views.parts.items()}
    rows = weighted_rows(views, names, stored)
    few = min(2_048, len(rows) // 2)
    return float(np.quantile(rows[:few] @ rows[few : 2 * few].T, max(0.0, 1 - share)))


def measured(
    views: Views, kernel: Kernel, wanted: Wanted, near: list[float], block: int, audit_rows: int,
    folder: Path,
) -> Rates:  # fmt: skip
    """The rates over a sample of items (`sample_views`), with what `wanted` looks for.

    `block` are the rows of the join's blocks. `near` are scores that neighbours must reach, each
    in as many tiles as another. Files are written below `folder`.
    """
    pair, visit, tile, row, fresh = _tiles(views, kernel, wanted, near, block, folder)
    first, start, item = _items(views, wanted, audit_rows, folder)
    return Rates(pair, visit, fresh, tile, row, item, first + start, *_kept(folder))


def _tiles(
    views: Views, kernel: Kernel, wanted: Wanted, near: list[float], block: int, folder: Path
) -> list[Seconds]:  # fmt: skip
    asking = min(ASKING, len(views) // 2)
    asked = min(block, len(views) - asking)
    half, chunk = asking // 2, min(asking // 2, asked)
    ranges = [range(asking), range(asking, asking + asked),
              range(half), range(asking, asking + chunk)]  # fmt: skip
    blocks = [Block(n, tuple(views.parts), rows) for n, rows in enumerate(ranges)]
    engine = GemmEngine(views, blocks, kernel, held=len(blocks))
    wanted = replace(wanted, budget=float("inf"))

    def floors(score: float, first: int = 0) -> KnownFloors | None:
        path = folder / "floors.f32"
        path.unlink(missing_ok=True)
        known = KnownFloors(path, len(views)) if wanted.k else None
        if known is not None:
            rows = np.arange(first, len(views))
            known.raise_to(rows, np.full(len(rows), score, np.float32))
        return known

    def work(number: int, one: int, other: int, known: KnownFloors | None) -> Seconds:
        tile = Tile(number, one, other, len(blocks[one]) * len(blocks[other]))
        return timed(lambda: do_tile(views, engine, wanted, tile, Work(folder), known))

    def mean(number: int, one: int, other: int) -> Seconds:
        """Over what may be known."""
        return np.mean([
            usual(lambda score=score: work(number, one, other, floors(score))) for score in near
        ], axis=0)  # fmt: skip

    work(0, 0, 1, floors(near[-1]))  # a process's first product takes longer
    engine.release()
    first = work(0, 0, 1, floors(near[-1]))
    # Products of whole chunks, as the join's are: how much there is of them, and for how many rows.
    shapes = [(0, 0, 1), (1, 2, 1), (2, 2, 3)]
    for shape in shapes[1:]:
        work(*shape, floors(near[-1]))
    found = np.array([mean(*shape) for shape in shapes])
    sizes = np.array([(1, len(blocks[a]) + len(blocks[b]), len(blocks[a]) * len(blocks[b]))
                      for _, a, b in shapes], float)  # fmt: skip
    # Weighted by their seconds, so that the small tile counts as much as the large one.
    solved = np.array([nnls(sizes / side[:, None], np.ones(3))[0] for side in found.T]).T
    # Beside it the first time, and a tile of whose asking rows nothing is known.
    plain, fresh = (
        usual(lambda rows=rows: work(0, 0, 1, floors(near[-1], rows))) for rows in (0, asking)
    )
    rests = (first, asking + asked), (fresh, asking)
    row, first_tile = (np.maximum(spent - plain, 0) / rows for spent, rows in rests)
    return [solved[2], solved[1], solved[0], row, first_tile]


def _items(
    views: Views, wanted: Wanted, rows: int, folder: Path
) -> tuple[Seconds, Seconds, Seconds]:
    """See `line`: of the work that grows with the items."""

    def work(size: int) -> Seconds:
        some = sample_views(views, size)
        spent = timed(lambda: floor_of_sample(some, 1.0))
        spent = spent + timed(lambda: audit(some, folder, wanted.floor, rows))
        if wanted.k:
            files, out = [], folder / "nearest.parquet"
            for path in sorted(Work(folder).nearest.glob("*.parquet")):
                files.append(folder / f"nearest-{path.name}")
                here = [("i", "<", size), ("j", "<", size)]
                write_parquet(files[-1], pd.read_parquet(path, filters=here))
            spent = spent + timed(lambda: merged_nearest(files, some, wanted.k, out))
        return spent

    return line(work, len(views) // 4, len(views))


def line(work: Callable[[int], Seconds], few: int, many: int) -> tuple[Seconds, Seconds, Seconds]:
    """(first, start, each) of work that takes start + each x size seconds, and `first` more once.

    What it takes a process the first time is `first`.
    """
    first, low, high = work(few), usual(lambda: work(few)), usual(lambda: work(many))
    each = np.maximum(high - low, 0) / (many - few)
    return np.maximum(first - low, 0), np.maximum(low - few * each, 0), each


def index_rates(
    views: Views, kind: Kind, shard_rows: int, recall_rows: int, folder: Path
) -> IndexRates:
    """Of an index of this kind over a sample of items, in shards of so many rows."""
    trained = folder / "trained.faiss"
    plain = kind if kind.exact else Kind("Flat", "Flat", "")  # a copy of rows, whatever the code
    empty = empty_index(plain, views.width, lambda: views.database(range(len(views))))
    faiss.write_index(empty, str(trained))

    def recall(size: int, shards: int = 1) -> Seconds:
        some, paths = sample_views(views, size), []
        for number, rows in enumerate(np.array_split(np.arange(len(some)), shards)):
            paths.append(folder / f"shard-{number:05d}.faiss")
            build_shard(some, range(int(rows[0]), int(rows[-1]) + 1), trained, paths[-1])
        index = ShardedIndex(paths, plain.name)
        return timed(lambda: measured_recall(some, index, recall_rows, 0))

    def build(size: int) -> Seconds:
        path = folder / "shard.faiss"
        return timed(lambda: (build_shard(views, range(size), trained, path), sha256_file(path)))

    few, many = len(views) // 4, len(views)
    first, file, row = line(build, few, many)
    if not recall_rows:
        return IndexRates(first, file, row, np.zeros(2))
    again, begin, found = line(recall, few, many)
    shards = max(2, len(views) // shard_rows)
    parted, whole = (usual(lambda n=n: recall(many, n)) for n in (shards, 1))
    shard = np.maximum(parted - whole, 0) / (shards - 1)
    return IndexRates(first + again + begin, file + shard, row, found)


def _kept(folder: Path) -> tuple[Seconds, Seconds]:
    """A pair, and a file."""
    rng, path = np.random.default_rng(0), folder / "kept.parquet"

    def table(pairs: int) -> pd.DataFrame:
        return pd.DataFrame(
            {name: np.sort(rng.integers(0, 1 << 20, pairs)) for name in ("i", "j")}
            | {name: rng.random(pairs, np.float32) for name in SCORES}
        )

    def work() -> None:
        write_parquet(path, in_order([many]))
        read_table(path)

    many = table(PAIRS)
    kept = usual(lambda: timed(work)) / PAIRS
    write_parquet(path, table(1))
    return kept, usual(lambda: timed(lambda: read_table(path)))


def usual(work: Callable[[], Seconds]) -> Seconds:
    """The median of some tries, as others use the machine."""
    return np.median([work() for _ in range(TRIES)], axis=0)


def timed(work: Callable[[], Any]) -> Seconds:
    """Seconds that it takes."""
    begin = now()
    work()
    return now() - begin


def now() -> Seconds:
    """The clock, and the processor's."""
    return np.array([time.perf_counter(), time.process_time()])
