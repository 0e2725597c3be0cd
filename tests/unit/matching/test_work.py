"""Tiles, claims, the floor, memory and the proof: what keeps a join whole."""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from dist_train.config.options import bytes_of
from dist_train.distributed.runtime import Runtime
from dist_train.matching.blocks import CHUNK, area_apart, block_size, blocks_of, tiles_of
from dist_train.matching.engines import GemmEngine
from dist_train.matching.join import Wanted, join, read_pairs, settle_pairs
from dist_train.matching.kernels import FloatKernel, Prepared, kernels_for
from dist_train.matching.memory import join_bounds
from dist_train.matching.proof import prove
from dist_train.matching.vectors import views_of_array
from dist_train.matching.work_folder import Work, read_table
from shards.storage.errors import BadInput, Corrupt, Failed
from tests.support.planted import planted, true_pairs
from tests.unit.matching.test_join import gemm, indexed_like

PLAIN = kernels_for(torch.device("cpu"), bf16=False)[0]


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_tiles_hold_every_pair_once(size):
    views = indexed_like(planted(300, 8))
    blocks = blocks_of(views, size)
    tiles = tiles_of(blocks)
    seen = np.zeros((300, 300), np.int64)
    for tile in tiles:
        one, other = blocks[tile.asking].ids(), blocks[tile.asked].ids()
        held = np.ix_(one, other)
        seen[held] += 1
        if tile.asking != tile.asked:
            seen[held[1].T, held[0].T] += 1
    here = {n: p.present for n, p in views.parts.items()}
    common = np.outer(here["image"], here["image"]) | np.outer(here["text"], here["text"])
    np.testing.assert_array_equal(seen, common.astype(np.int64))
    assert sum(tile.area for tile in tiles) + area_apart(views) == 300 * 301 // 2


@pytest.mark.parametrize("items", [1, 1024, 30_000, 10**6, 10**8, 10**9])
def test_a_list_of_tiles_stays_short(items):
    blocks = -(-items // block_size(items))
    assert blocks <= 1024
    assert blocks >= min(7, -(-items // 1024))
    assert block_size(items) % CHUNK == 0 or block_size(items) < CHUNK


def test_one_block_changes_at_a_time():
    tiles = tiles_of(blocks_of(views_of_array(np.ones((1000, 2), np.float32)), 100))
    for n in range(2, len(tiles)):
        lately = {b for tile in tiles[n - 2 : n] for b in (tile.asking, tile.asked)}
        assert len({tiles[n].asking, tiles[n].asked} - lately) <= 1


@pytest.mark.parametrize("budget", [120, 400, 2000])
def test_the_floor_rises_to_the_budget_whatever_the_order(tmp_path, budget):
    vectors = {"image": planted(600, 16)["image"]}
    views, answers = indexed_like(vectors), []
    truth = np.sort(_scores(vectors))[::-1]
    for order in range(3):
        out, engine = tmp_path / str(order), gemm(views, 100)
        np.random.default_rng(order).shuffle(engine.tiles)
        wanted = Wanted(0.1, budget=budget)
        join(views, engine, wanted, out, Runtime("cpu"))
        floor = Work(out).floor(0.1, budget, 1.0)
        settle_pairs(out, floor)
        answers.append((floor, read_pairs(out)))
    floor, pairs = answers[0]
    assert floor > 0.1
    assert len(pairs) <= budget < (truth >= np.float32(floor - 0.001)).sum()
    assert len(pairs) == (truth >= np.float32(floor)).sum()
    for other_floor, other in answers[1:]:
        assert other_floor == floor
        pd.testing.assert_frame_equal(other, pairs)


@pytest.mark.parametrize("least", [0.5, 1.0])
def test_scores_on_the_grid_are_on_the_right_side_of_the_floor(tmp_path, least):
    """Every score is a multiple of a half: the budget has room for those from `least` on."""
    rows = np.random.default_rng(3).choice([-0.5, 0.5], (60, 4)).astype(np.float16)
    truth = _scores({"image": rows})
    assert set(truth.tolist()) == {-1.0, -0.5, 0.0, 0.5, 1.0}
    budget = int((truth >= least).sum())
    join(indexed_like({"image": rows}), gemm(indexed_like({"image": rows}), 20),
         Wanted(-0.5, budget=budget), tmp_path, Runtime("cpu"))  # fmt: skip
    floor = Work(tmp_path).floor(-0.5, budget, 1.0)
    assert least - 0.5 < floor <= least
    assert settle_pairs(tmp_path, floor) == budget
    assert sorted(read_pairs(tmp_path).score) == sorted(truth[truth >= least])


def test_a_worker_that_comes_when_all_is_finished_does_nothing(tmp_path):
    views = indexed_like({"image": planted(200, 16)["image"]})
    join(views, gemm(views, 50), Wanted(0.3), tmp_path, Runtime("cpu"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()}
    # As another worker leaves it that was the first to finish.
    shutil.rmtree(tmp_path / ".work")
    (tmp_path / "manifest.json").write_text("{}")
    join(views, gemm(views, 50), Wanted(0.3), tmp_path, Runtime("cpu"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()} == before
    assert not list((tmp_path / ".work").glob("tiles/*"))


def _scores(vectors: dict[str, np.ndarray]) -> np.ndarray:
    rows = vectors["image"][vectors["image"].any(1)].astype(np.float64)
    return (rows @ rows.T)[np.triu_indices(len(rows), 1)].astype(np.float32)


def test_the_floor_never_rises_above_a_given_threshold(tmp_path):
    views = indexed_like({"image": planted(300, 8)["image"]})
    join(views, gemm(views, 100), Wanted(0.1, budget=3), tmp_path, Runtime("cpu"))
    assert Work(tmp_path).floor(0.1, 3, highest=0.6) == 0.6


def test_tiles_that_overflow_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_train.matching.join.SPILL", 40)
    monkeypatch.setattr("dist_train.matching.engines.CHUNK", 10)
    monkeypatch.setattr("dist_train.matching.engines.TOGETHER", 10)
    vectors = {"image": planted(400, 16)["image"]}
    views = indexed_like(vectors)
    join(views, gemm(views, 30), Wanted(0.3), tmp_path, Runtime("cpu"))
    assert any("-" in path.stem for path in (tmp_path / "pairs").iterdir())
    pairs = read_pairs(tmp_path)
    i, j = true_pairs(vectors, 0.3)
    assert list(zip(pairs.i, pairs.j, strict=True)) == list(zip(i, j, strict=True))


def test_a_claim_is_held_by_one_and_freed_by_death(tmp_path):
    hold = (
        "import sys, time\nfrom pathlib import Path\n"
        "from dist_train.matching.work_folder import Work\n"
        "with Work(Path(sys.argv[1])).claim(3) as ours:\n"
        "    print(ours, flush=True)\n    time.sleep(100)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "True"
    work = Work(tmp_path)
    with work.claim(3) as ours, work.claim(4) as free:
        assert (ours, free) == (False, True)
    other.kill()
    other.wait()
    with work.claim(3) as ours:
        assert ours


def test_memory_bounds_the_blocks_and_is_refused_when_too_little():
    small = join_bounds(1_000_000, 512, 1024, 256, bytes_of("2GB"))
    large = join_bounds(10_000_000, 512, 1024, 256, bytes_of("2GB"))
    assert (small.block, small.bytes) == (large.block, large.bytes)
    assert small.bytes <= 2e9
    assert small.held >= 2
    tight = join_bounds(10_000_000, 8192, 16_384, 4096, bytes_of("2GB"))
    assert tight.block < small.block
    with pytest.raises(BadInput, match=r"--memory 0\.50GB is too little.*at least"):
        join_bounds(1_000_000, 512, 1024, 256, bytes_of("500MB"))


@pytest.mark.parametrize("text", ["", "8", "0GB", "GB", "-1GB", "8 TiB"])
def test_sizes(text):
    if text == "8":
        assert bytes_of(text) == 8
    else:
        with pytest.raises(BadInput, match="write a size as 8GB"):
            bytes_of(text)
    assert bytes_of("2.5 GB") == 2_500_000_000


@pytest.fixture
def finished(tmp_path):
    """The views of a join, its engine and its folder."""
    views = indexed_like(planted(300, 16))
    engine = gemm(views, 64)
    join(views, engine, Wanted(0.4), tmp_path, Runtime("cpu"))
    return views, engine, tmp_path


def test_a_whole_join_is_proven(finished):
    views, engine, out = finished
    settle_pairs(out, 0.4)
    proof = prove(views, engine, out, 0.4, 300)
    assert proof["pairs_covered"] == 300 * 301 // 2
    i, _ = true_pairs(planted(300, 16), 0.4)
    assert (proof["audit"]["true"], proof["audit"]["missed"]) == (len(i), 0)
    assert 0.98 < proof["audit"]["recall_low"] < 1
    assert 0 < proof["first_pass_error"] < proof["first_pass_margin"]
    assert proof["first_pass_checked"] == engine.seen.checked > 0
    assert len(read_pairs(out)) == len(i)


def test_old_parts_of_a_tile_that_was_done_again_are_taken_away(finished):
    """A killed worker's: the tile was then done in fewer parts, or by another list of tiles."""
    out = finished[2]
    before = read_pairs(out)
    written = {path.name for path in (out / "pairs").iterdir()}
    work, old = Work(out), pd.DataFrame({"i": [0], "j": [3], "score": [0.99]})
    for path in (work.pairs_path(0, 1), work.pairs_path(1, 12), work.pairs_path(99_998, 0)):
        old.assign(score_image=0.99, score_text=0.99).to_parquet(path, index=False)
    assert len(read_pairs(out)) == len(before) + 3
    assert settle_pairs(out, 0.4) == len(before)
    assert {path.name for path in (out / "pairs").iterdir()} == written
    pd.testing.assert_frame_equal(read_pairs(out), before)


@pytest.mark.parametrize("harm", ["lost pair", "strange pair", "lost tile"])
def test_a_join_that_is_not_whole_is_refused(finished, harm):
    views, engine, out = finished
    settle_pairs(out, 0.4)
    file = next(path for path in sorted((out / "pairs").iterdir()) if len(read_table(path)) > 3)
    table = read_table(file)
    if harm == "lost pair":
        table.iloc[1:].to_parquet(file, index=False)
    elif harm == "strange pair":
        table.loc[0, ["i", "j"]] = [0, 3]
        table.to_parquet(file, index=False)
    else:
        (out / ".work/tiles/00001.json").unlink()
    with pytest.raises(Failed, match=r"missed|below the floor|cover"):
        prove(views, engine, out, 0.4, 300)


class Wrong(FloatKernel):
    """A processor whose products are off by more than their margin, too little to miss a pair."""

    def __init__(self, by: float) -> None:
        super().__init__(torch.float32, torch.device("cpu"))
        self.by = by

    def product(self, left: Prepared, right: Prepared) -> torch.Tensor:
        return super().product(left, right) + self.by


@pytest.mark.parametrize("by", [0.0, 2e-5, -2e-5])
def test_arithmetic_beyond_its_margin_is_refused(tmp_path, by):
    views = indexed_like(planted(300, 16))
    engine = GemmEngine(views, blocks_of(views, 64), Wrong(by))
    join(views, engine, Wanted(0.4), tmp_path, Runtime("cpu"))
    settle_pairs(tmp_path, 0.4)
    if not by:
        proof = prove(views, engine, tmp_path, 0.4, 300)
        assert proof["first_pass_error"] <= proof["first_pass_margin"] < 1e-5
        return
    told = r"first pass was off by [12]\.\de-05, allowed were \d\.\de-06.*not as expected"
    with pytest.raises(Failed, match=told):
        prove(views, engine, tmp_path, 0.4, 300)
    engine.exact = False  # of one that promises nothing it is told
    proof = prove(views, engine, tmp_path, 0.4, 300)
    assert proof["first_pass_error"] == pytest.approx(2e-5, rel=0.1)
    assert proof["audit"]["missed"] == 0


def test_a_broken_table_is_named(finished):
    path = finished[2] / "pairs/00000.parquet"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(Corrupt, match=r"pairs/00000\.parquet"):
        read_pairs(finished[2])


def test_only_some_blocks_are_in_memory():
    views = views_of_array(planted(500, 8)["image"])
    engine = GemmEngine(views, blocks_of(views, 50), PLAIN, held=3)
    for tile in engine.tiles:
        list(engine.candidates(tile, 0.5))
        assert len(engine._loaded) <= 3
