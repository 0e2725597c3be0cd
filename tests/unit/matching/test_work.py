"""Block pairs, claims, the score floor, memory and the proof: what keeps a join whole."""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from dist_train.config.options import bytes_of
from dist_train.distributed.runtime import Runtime
from dist_train.matching.blocks import CHUNK, block_size, blocks_of, disjoint_area, join_bounds
from dist_train.matching.engines import GemmEngine
from dist_train.matching.join import JoinLimits, apply_score_floor, join
from dist_train.matching.kernels import Kernel, Prepared, kernels_for
from dist_train.matching.proof import prove
from dist_train.matching.vectors import vectors_of_array
from dist_train.matching.work_folder import WorkFolder, read_table
from shards.storage.errors import BadInput, Corrupt, Failed
from tests.support.planted import planted, read_pairs, true_pairs
from tests.unit.matching.test_join import gemm, indexed_like

PLAIN = kernels_for(torch.device("cpu"), bf16=False)[0]


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_block_pairs_hold_every_pair_once(size):
    item_vectors = indexed_like(planted(300, 8))
    blocks = blocks_of(item_vectors, size)
    pairs = GemmEngine(item_vectors, blocks, PLAIN).block_pairs
    seen = np.zeros((300, 300), np.int64)
    for pair in pairs:
        one, other = blocks[pair.query].ids(), blocks[pair.database].ids()
        held = np.ix_(one, other)
        seen[held] += 1
        if pair.query != pair.database:
            seen[held[1].T, held[0].T] += 1
    here = {n: p.present for n, p in item_vectors.modalities.items()}
    common = np.outer(here["image"], here["image"]) | np.outer(here["text"], here["text"])
    np.testing.assert_array_equal(seen, common.astype(np.int64))
    assert sum(pair.area for pair in pairs) + disjoint_area(item_vectors) == 300 * 301 // 2


@pytest.mark.parametrize("items", [1, 1024, 30_000, 10**6, 10**8, 10**9])
def test_a_list_of_block_pairs_stays_short(items):
    blocks = -(-items // block_size(items))
    assert blocks <= 1024
    assert blocks >= min(7, -(-items // 1024))
    assert block_size(items) % CHUNK == 0 or block_size(items) < CHUNK


def test_one_block_changes_at_a_time():
    pairs = gemm(vectors_of_array(np.ones((1000, 2), np.float32)), 100).block_pairs
    for n in range(2, len(pairs)):
        lately = {b for pair in pairs[n - 2 : n] for b in (pair.query, pair.database)}
        assert len({pairs[n].query, pairs[n].database} - lately) <= 1


@pytest.mark.parametrize("budget", [120, 400, 2000])
def test_the_floor_rises_to_the_budget_whatever_the_order(tmp_path, budget):
    vectors = {"image": planted(600, 16)["image"]}
    item_vectors, answers = indexed_like(vectors), []
    truth = np.sort(_scores(vectors))[::-1]
    for order in range(3):
        out, engine = tmp_path / str(order), gemm(item_vectors, 100)
        np.random.default_rng(order).shuffle(engine.block_pairs)
        wanted = JoinLimits(0.1, budget=budget)
        join(engine, wanted, out, Runtime("cpu"))
        floor = WorkFolder(out).score_floor(0.1, budget, 1.0)
        apply_score_floor(out, floor)
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
    engine = gemm(indexed_like({"image": rows}), 20)
    join(engine, JoinLimits(-0.5, budget=budget), tmp_path, Runtime("cpu"))
    floor = WorkFolder(tmp_path).score_floor(-0.5, budget, 1.0)
    assert least - 0.5 < floor <= least
    assert apply_score_floor(tmp_path, floor) == budget
    assert sorted(read_pairs(tmp_path).score) == sorted(truth[truth >= least])


def test_a_worker_that_comes_when_all_is_finished_does_nothing(tmp_path):
    item_vectors = indexed_like({"image": planted(200, 16)["image"]})
    join(gemm(item_vectors, 50), JoinLimits(0.3), tmp_path, Runtime("cpu"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()}
    # As another worker leaves it that was the first to finish.
    shutil.rmtree(tmp_path / ".work")
    (tmp_path / "manifest.json").write_text("{}")
    join(gemm(item_vectors, 50), JoinLimits(0.3), tmp_path, Runtime("cpu"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pairs").iterdir()} == before
    assert not list((tmp_path / ".work").glob("block_pairs/*"))


def _scores(vectors: dict[str, np.ndarray]) -> np.ndarray:
    rows = vectors["image"][vectors["image"].any(1)].astype(np.float64)
    return (rows @ rows.T)[np.triu_indices(len(rows), 1)].astype(np.float32)


def test_the_floor_never_rises_above_a_given_threshold(tmp_path):
    item_vectors = indexed_like({"image": planted(300, 8)["image"]})
    join(gemm(item_vectors, 100), JoinLimits(0.1, budget=3), tmp_path, Runtime("cpu"))
    assert WorkFolder(tmp_path).score_floor(0.1, 3, highest=0.6) == 0.6


def test_block_pairs_that_overflow_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_train.matching.join.PAIRS_IN_MEMORY", 40)
    monkeypatch.setattr("dist_train.matching.engines.CHUNK", 10)
    monkeypatch.setattr("dist_train.matching.engines.BATCH", 10)
    vectors = {"image": planted(400, 16)["image"]}
    item_vectors = indexed_like(vectors)
    join(gemm(item_vectors, 30), JoinLimits(0.3), tmp_path, Runtime("cpu"))
    assert any("-" in path.stem for path in (tmp_path / "pairs").iterdir())
    pairs = read_pairs(tmp_path)
    i, j = true_pairs(vectors, 0.3)
    assert list(zip(pairs.i, pairs.j, strict=True)) == list(zip(i, j, strict=True))


def test_a_claim_is_held_by_one_and_freed_by_death(tmp_path):
    hold = (
        "import sys, time\nfrom pathlib import Path\n"
        "from dist_train.matching.work_folder import WorkFolder\n"
        "with WorkFolder(Path(sys.argv[1])).claim(3) as ours:\n"
        "    print(ours, flush=True)\n    time.sleep(100)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "True"
    work = WorkFolder(tmp_path)
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
    """The engine of a join and its folder."""
    item_vectors = indexed_like(planted(300, 16))
    engine = gemm(item_vectors, 64)
    join(engine, JoinLimits(0.4), tmp_path, Runtime("cpu"))
    return engine, tmp_path


def test_a_whole_join_is_proven(finished):
    engine, out = finished
    apply_score_floor(out, 0.4)
    proof = prove(engine, out, 0.4, 300)
    assert proof["pairs_covered"] == 300 * 301 // 2
    i, _ = true_pairs(planted(300, 16), 0.4)
    assert (proof["audit"]["true"], proof["audit"]["missed"]) == (len(i), 0)
    assert 0.98 < proof["audit"]["recall_low"] < 1
    assert 0 < proof["coarse_pass_error"] < proof["coarse_pass_margin"]
    assert proof["coarse_pass_checked"] == engine.stats.checked > 0
    assert len(read_pairs(out)) == len(i)


def test_old_files_of_a_block_pair_that_was_done_again_are_taken_away(finished):
    """A killed worker's: the block pair was then done in fewer files, or by another list."""
    out = finished[1]
    before = read_pairs(out)
    written = {path.name for path in (out / "pairs").iterdir()}
    work, old = WorkFolder(out), pd.DataFrame({"i": [0], "j": [3], "score": [0.99]})
    for path in (work.pairs_path(0, 1), work.pairs_path(1, 12), work.pairs_path(99_998, 0)):
        old.assign(score_image=0.99, score_text=0.99).to_parquet(path, index=False)
    assert len(read_pairs(out)) == len(before) + 3
    assert apply_score_floor(out, 0.4) == len(before)
    assert {path.name for path in (out / "pairs").iterdir()} == written
    pd.testing.assert_frame_equal(read_pairs(out), before)


@pytest.mark.parametrize("harm", ["lost pair", "strange pair", "lost block pair"])
def test_a_join_that_is_not_whole_is_refused(finished, harm):
    engine, out = finished
    apply_score_floor(out, 0.4)
    file = next(path for path in sorted((out / "pairs").iterdir()) if len(read_table(path)) > 3)
    table = read_table(file)
    if harm == "lost pair":
        table.iloc[1:].to_parquet(file, index=False)
    elif harm == "strange pair":
        table.loc[0, ["i", "j"]] = [0, 3]
        table.to_parquet(file, index=False)
    else:
        (out / ".work/block_pairs/00001.json").unlink()
    with pytest.raises(Failed, match=r"missed|below the score floor|cover"):
        prove(engine, out, 0.4, 300)


class Wrong(Kernel):
    """A processor whose products are off by more than their margin, too little to miss a pair."""

    def __init__(self, by: float) -> None:
        super().__init__(torch.float32, torch.device("cpu"))
        self.by = by

    def product(self, left: Prepared, right: Prepared) -> torch.Tensor:
        return super().product(left, right) + self.by


@pytest.mark.parametrize("by", [0.0, 2e-5, -2e-5])
def test_arithmetic_beyond_its_margin_is_refused(tmp_path, by):
    item_vectors = indexed_like(planted(300, 16))
    engine = GemmEngine(item_vectors, blocks_of(item_vectors, 64), Wrong(by))
    join(engine, JoinLimits(0.4), tmp_path, Runtime("cpu"))
    apply_score_floor(tmp_path, 0.4)
    if not by:
        proof = prove(engine, tmp_path, 0.4, 300)
        assert proof["coarse_pass_error"] <= proof["coarse_pass_margin"] < 1e-5
        return
    told = r"coarse pass was off by [12]\.\de-05, allowed were \d\.\de-06.*not as expected"
    with pytest.raises(Failed, match=told):
        prove(engine, tmp_path, 0.4, 300)
    engine.exact = False  # of one that promises nothing it is told
    proof = prove(engine, tmp_path, 0.4, 300)
    assert proof["coarse_pass_error"] == pytest.approx(2e-5, rel=0.1)
    assert proof["audit"]["missed"] == 0


def test_a_broken_table_is_named(finished):
    path = finished[1] / "pairs/00000.parquet"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(Corrupt, match=r"pairs/00000\.parquet"):
        read_pairs(finished[1])


def test_only_some_blocks_are_in_memory():
    item_vectors = vectors_of_array(planted(500, 8)["image"])
    engine = GemmEngine(item_vectors, blocks_of(item_vectors, 50), PLAIN, held=3)
    for pair in engine.block_pairs:
        list(engine.candidates(pair, 0.5))
        assert len(engine.loaded) <= 3
