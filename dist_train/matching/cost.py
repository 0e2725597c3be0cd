"""What an index and a join will take, told before they begin: seconds, memory, bytes, pairs.

A few real tiles, files and searches over a sample are timed (trial.py) and carried to all rows: the
products and the tiles grow with the square of the items, all else with the items and the pairs.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dist_train.config import IndexConfig, JoinConfig, bytes_of
from dist_train.matching import trial
from dist_train.matching.blocks import CHUNK, Block, Tile, tiles_of
from dist_train.matching.engines import GemmEngine
from dist_train.matching.find import Search
from dist_train.matching.index import ADDED, shard_rows
from dist_train.matching.join import Wanted
from dist_train.matching.kernel_choice import Choice, choose_kernel
from dist_train.matching.kernels import kernels_for
from dist_train.matching.kinds import Kind, bytes_of_row, choose_kind
from dist_train.matching.memory import PROGRAM, Bounds, join_bounds, join_peak, row_bytes
from dist_train.matching.threads import use_huge_pages
from dist_train.matching.trial import Rates
from dist_train.matching.views import Views
from dist_train.runtime import Runtime, bf16_pays

PLANNED_FROM = 100_000
"""Items; a join of fewer takes little longer than the trial that a plan is made from."""
PAIR_BYTES = 19
"""On disk of a kept pair with its scores, compressed; of a match in the lists, both ways."""
NEAREST_BYTES, ITEM_BYTES = 20, 40
"""Of a neighbour; of an item in the lists, the groups and the submission."""
TRUTH_BYTES, TRUTH_ROWS = 20, 16_384
"""The recall compares its rows with so many at a time, in so many bytes each."""
GROWTH = 2
"""FAISS's array of a shard beside the one that it grew from."""
SEARCHED = 32_768
"""Rows of the index that is tried: some shards of the real size."""
SEEN = (0.125, 0.375, 0.625, 0.875)
"""Shares of the rows that an item has met, at which a tile is tried."""
LISTS = 7.0
"""What settling, the audit and the match lists cost of a kept pair, in writings and readings."""
READINGS = 6
"""Of each tile's files when the join ends."""


@dataclass(frozen=True)
class Cost:
    """Of one stage: seconds on the clock, and of the processors of all ranks together; bytes in
    memory of each rank; bytes on disk."""

    seconds: float
    processor_seconds: float
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """The stages index and match; `pairs` that are kept, `tiles` that are worked on."""

    items: int
    width: int
    ranks: int
    kind: str
    reason: str
    kernel: str
    tiles: int
    pairs: int
    index: Cost
    join: Cost

    @property
    def seconds(self) -> float:
        """Both stages, one after the other; not the start of the programs."""
        return self.index.seconds + self.join.seconds

    @property
    def memory_bytes(self) -> int:
        """The most that a rank holds in either."""
        return max(self.index.memory_bytes, self.join.memory_bytes)

    @property
    def disk_bytes(self) -> int:
        """What both leave on disk."""
        return self.index.disk_bytes + self.join.disk_bytes

    def __str__(self) -> str:
        return (f"plan: index {self.kind} ({self.reason}): {told(self.index)}; join of "
                f"{self.tiles} tiles, {self.kernel}, {self.pairs} pairs: "
                f"{told(self.join)}")  # fmt: skip


def told(cost: Cost) -> str:
    """In words."""
    return (f"{cost.seconds:.0f} s, {cost.memory_bytes / 1e9:.2f} GB a rank, "
            f"{cost.disk_bytes / 1e6:.0f} MB on disk")  # fmt: skip


def plan(
    items: int,
    width: int,
    dtype: str = "float16",
    ranks: int = 1,
    device: str = "cpu",
    *,
    parts: int = 1,
    index: IndexConfig | None = None,
    match: JoinConfig | None = None,
) -> Plan:
    """What N `items` of D = `width` columns take on `ranks` processes, after some seconds' trial.

    `width` is that of a whole row, `parts` are laid side by side in it (2: image and text),
    `dtype` is the stored one, float16 or float32. The trial is made on random rows.
    Raises BadInput when the memory that the options give is too little.
    """
    use_huge_pages()
    index, match = index or IndexConfig(), match or JoinConfig()
    names = ("image", "text")[:parts]
    weights = {"image": index.image_weight, "text": 1 - index.image_weight}
    widths = {name: width // parts for name in names}
    random = partial(trial.random_views, items, widths, dtype,
                     weights if parts > 1 else {"image": 1.0})  # fmt: skip
    kind = choose_kind(index.kind, items, width, bytes_of(index.memory))
    # Before all else, as in a process of its own: the first search takes longer.
    with tempfile.TemporaryDirectory() as folder:
        built = _index_cost(random(SEARCHED), items, kind, index, ranks, Path(folder))
    views = random()
    runtime = Runtime(device)
    k, pairs = match.neighbours, int(min(match.pairs_per_item * items, items * (items - 1) / 2))
    found: list[Choice] = []
    kernels = kernels_for(runtime.device, bf16_pays(runtime.device))
    floor = max(0.05, trial.score_of_share(views, 2 * pairs / max(1, items * (items - 1))))
    chosen = trial.timed(lambda: found.extend(choose_kernel(views, floor, k, kernels)))
    kernel = found[0].kernel
    per_row = row_bytes(width, kernel.name, 1)
    bounds = join_bounds(items, *per_row, width, bytes_of(match.memory))
    blocks = [Block(n, names, range(start, min(start + bounds.block, items)))
              for n, start in enumerate(range(0, items, bounds.block))]  # fmt: skip
    near = _near(views, k, items, bounds)
    views = random(trial.rows_of(bounds.block))
    with tempfile.TemporaryDirectory() as folder:
        wanted = Wanted(floor, k)
        begin = trial.now()
        rates = trial.measured(
            views, kernel, wanted, near, bounds.block, match.audit_rows, Path(folder)
        )
        tried = trial.now() - begin if items >= PLANNED_FROM else 0.0
    rates = replace(rates, start=rates.start + chosen + tried)
    row = sum(per_row)
    joined = join_cost(blocks, tiles_of(blocks), bounds, row, rates, items, pairs, k, ranks)
    return Plan(items, width, ranks, kind.factory, kind.reason, str(found[0]),
                len(blocks) * (len(blocks) + 1) // 2, pairs, built, joined)  # fmt: skip


def plan_of(
    search: Search, pairs_per_item: float, audit_rows: int, ranks: int, folder: Path
) -> Cost | None:
    """What a join that is set up will take, tried on a sample of its own rows below `folder`.

    None where that cannot be told: for the engine faiss, and where few items have all parts.
    """
    engine, items, k = search.engine, len(search.views), search.wanted.k
    pairs = int(pairs_per_item * items)
    if not isinstance(engine, GemmEngine):
        return None
    block = search.bounds.block
    views = trial.sample_views(search.views, trial.rows_of(block))
    if len(views) < trial.SAMPLE:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        near = _near(views, k, items, search.bounds)
        rates = trial.measured(
            views, engine.kernel, search.wanted, near, block, audit_rows, Path(room)
        )
    row = sum(row_bytes(search.views.width, engine.kernel.name, len(search.views.kinds)))
    return join_cost(engine.blocks, engine.tiles, search.bounds, row, rates, items, pairs, k, ranks)


def _near(views: Views, k: int, items: int, bounds: Bounds) -> list[float]:
    """Scores that a neighbour must reach, after SEEN shares of the rows, each as often as another.

    After a share f of the rows k / (f N) of the others reach what is known.
    """
    first = min(1.0, bounds.block / max(1, items))
    shares = [k / (max(f, first) * max(1, items)) for f in SEEN]
    return [trial.score_of_share(views, share) if k else 0.0 for share in shares]


def join_cost(
    blocks: list[Block], tiles: list[Tile], bounds: Bounds, row: int, rates: Rates, items: int,
    pairs: int, k: int, ranks: int,
) -> Cost:  # fmt: skip
    multiplied = sum(
        tile.area if tile.asking != tile.asked
        else (len(blocks[tile.asking]) + min(len(blocks[tile.asking]), CHUNK))
        * len(blocks[tile.asking]) / 2
        for tile in tiles
    )  # fmt: skip
    visits = sum(len(blocks[n]) for tile in tiles for n in {tile.asking, tile.asked})
    size = items / max(1, len(blocks))
    read = len(blocks) * ranks if bounds.held >= len(blocks) else len(tiles)
    shared = multiplied * rates.pair + visits * rates.visit + len(tiles) * rates.tile
    shared = shared + min(read, len(tiles) + ranks) * size * rates.row + items * rates.fresh
    alone = rates.start + items * rates.item + LISTS * pairs * rates.kept
    alone = alone + READINGS * len(tiles) * rates.file
    # The last tile of a rank ends, on the average, half a tile after the others'.
    late = shared / max(1, len(tiles)) / 2 if ranks > 1 else 0 * shared
    clock, processor = shared / ranks + late + alone, shared + alone
    disk = pairs * PAIR_BYTES + items * (k * NEAREST_BYTES + ITEM_BYTES)
    memory = join_peak(bounds, items, row, pairs, len(tiles))
    return Cost(float(clock[0]), float(processor[1]), memory, int(disk))


def _index_cost(
    views: Views, items: int, kind: Kind, config: IndexConfig, ranks: int, folder: Path
) -> Cost:
    """Of an exact kind; of lists and codes the training and the assignment are left out."""
    memory = bytes_of(config.memory)
    shards = shard_rows(items, views.width, memory)
    rates = trial.index_rates(views, kind, len(shards[0]), config.recall_rows, folder)
    alone = rates.start + len(shards) * rates.shard + items * rates.found
    clock, processor = alone + items * rates.row / ranks, alone + items * rates.row
    rows = max(map(len, shards))
    each_row = bytes_of_row(kind, views.width)
    held = max(GROWTH * rows * each_row, min(memory // 2, items * each_row))
    truth = TRUTH_BYTES * config.recall_rows * min(items, TRUTH_ROWS)
    peak = PROGRAM + 3 * 4 * views.width * min(rows, ADDED) + held + truth
    return Cost(float(clock[0]), float(processor[1]), int(peak), int(items * (each_row + 8)))
