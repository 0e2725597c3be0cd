"""The plan: its sums, by hand; its trial, beside a tile of another size; what it refuses."""

import numpy as np
import pytest

from dist_train.config import IndexConfig, JoinConfig
from dist_train.matching import trial
from dist_train.matching.blocks import CHUNK, Block, tiles_of
from dist_train.matching.cost import LISTS, READINGS, join_cost, plan
from dist_train.matching.engines import GemmEngine
from dist_train.matching.join import Wanted, do_tile
from dist_train.matching.kernels import kernels_for
from dist_train.matching.kinds import Kind, bytes_of_row, choose_kind
from dist_train.matching.memory import Bounds, row_bytes
from dist_train.matching.nearest import KnownFloors
from dist_train.matching.work import Work
from dist_train.runtime import Runtime
from shards.errors import BadInput

ONE, ZERO = np.ones(2), np.zeros(2)
FIELDS = ("pair", "visit", "fresh", "tile", "row", "item", "start", "kept", "file")


def rates(**some: np.ndarray) -> trial.Rates:
    return trial.Rates(**{name: some.get(name, ZERO) for name in FIELDS})


def seconds(rate: trial.Rates, ranks: int = 1, held: int = 9, items: int = 4 * CHUNK) -> float:
    """Processor seconds of a join of blocks of one chunk."""
    blocks = [Block(n, ("image",), range(start, min(start + CHUNK, items)))
              for n, start in enumerate(range(0, items, CHUNK))]  # fmt: skip
    bounds = Bounds(CHUNK, held, 10**9)
    found = join_cost(blocks, tiles_of(blocks), bounds, 100, rate, items, 1000, 5, ranks)
    return found.processor_seconds


def test_each_rate_counts_what_it_is_of():
    items = 4 * CHUNK
    # Ten tiles of four blocks; those on the diagonal multiply their one chunk whole.
    assert seconds(rates(pair=ONE)) == 10 * CHUNK**2
    assert seconds(rates(visit=ONE)) == (6 * 2 + 4) * CHUNK
    assert seconds(rates(fresh=ONE)) == items
    assert seconds(rates(tile=ONE)) == 10
    assert seconds(rates(row=ONE)) == items
    assert seconds(rates(row=ONE), ranks=2) == 2 * items  # each rank reads all blocks
    assert seconds(rates(row=ONE), held=2) == 10 * CHUNK  # a tile changes one block
    assert seconds(rates(item=ONE)) == items
    assert seconds(rates(start=ONE)) == 1
    assert seconds(rates(kept=ONE)) == pytest.approx(LISTS * 1000)
    assert seconds(rates(file=ONE)) == READINGS * 10


def test_ranks_share_the_tiles_and_not_the_end():
    blocks = [Block(n, ("image",), range(n * CHUNK, (n + 1) * CHUNK)) for n in range(8)]
    args = (blocks, tiles_of(blocks), Bounds(CHUNK, 9, 10**9), 100)
    rest = (8 * CHUNK, 0, 0)
    alone, four = (join_cost(*args, rates(pair=ONE), *rest, n).seconds for n in (1, 4))
    assert 0.25 < four / alone < 0.28
    alone, four = (join_cost(*args, rates(item=ONE), *rest, n).seconds for n in (1, 4))
    assert alone == four


@pytest.mark.parametrize("k", [0, 5])
def test_a_tile_of_another_size_takes_what_the_trial_says(tmp_path, k):
    """Six thousand rows by two thousand, where four thousand were asked by one and two chunks."""
    views = trial.random_views(10**5, {"image": 96}, "float16", {"image": 1.0})
    plain = kernels_for(Runtime("cpu").device, bf16=False)[0]
    wanted, near = Wanted(0.35, k), 0.4
    (tmp_path / "trial").mkdir()
    found = trial.measured(views, plain, wanted, [near], 4096, 50, tmp_path / "trial")
    blocks = [Block(0, ("image",), range(6144)), Block(1, ("image",), range(6144, 8192))]
    engine = GemmEngine(views, blocks, plain)
    known = KnownFloors(tmp_path / "floors", len(views)) if k else None
    if known:
        known.raise_to(np.arange(len(views)), np.full(len(views), near, np.float32))
    spent = []
    for _ in range(4):
        spent.append(trial.timed(
            lambda: do_tile(views, engine, wanted, engine.tiles[1], Work(tmp_path), known)
        )[1])  # fmt: skip
    told = found.pair * 6144 * 2048 + found.visit * 8192 + found.tile
    # Wide, for others use the machine: tests/benchmarks/planning.py says how exact it is.
    assert 0.4 < told[1] / min(spent[1:]) < 2.5


def test_a_plan_of_both_stages():
    few = plan(20_000, 64, match=JoinConfig(pairs_per_item=3), index=IndexConfig(kind="SQfp16"))
    assert few.kind == "SQfp16"
    assert few.pairs == 60_000
    assert few.tiles == 55  # ten blocks of a chunk
    assert few.index.disk_bytes == 20_000 * (2 * 64 + 8)
    assert few.seconds == few.index.seconds + few.join.seconds > 0
    assert few.memory_bytes == max(few.index.memory_bytes, few.join.memory_bytes) < 2e9
    assert "join of 55 tiles" in str(few)
    assert "60000 pairs" in str(few)
    with pytest.raises(BadInput, match=r"--memory 0\.30GB is too little"):
        plan(20_000, 64, match=JoinConfig(memory="300MB"))


def test_bytes_of_a_row():
    assert row_bytes(256, "float32", 1) == (1024, 1024)
    assert row_bytes(256, "bfloat16", 3) == (1024, 3 * 512)
    for kind, size in (("Flat", 400), ("SQfp16", 200), ("IVF9,SQ8", 100), ("IVF9,PQ25x8", 25)):
        assert bytes_of_row(Kind(kind, kind, ""), 100) == size
    assert "more than" in choose_kind("auto", 10**9, 1024, 10**9).reason
