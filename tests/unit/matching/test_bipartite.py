"""New rows against old ones: what a join of all finds, less what the old ones had already."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_train.config.options import JoinConfig
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import Rows
from dist_train.matching.bipartite import DEGREES, concatenated, join_new
from dist_train.matching.blocks import block_pairs_of, blocks_of, disjoint_area, required_area
from dist_train.matching.build_pairs import set_up
from dist_train.matching.join import apply_score_floor, join
from dist_train.matching.proof import prove
from dist_train.matching.vectors import ItemVectors, ModalityVectors
from shards.storage.errors import BadInput, Failed
from tests.support.planted import planted, read_pairs, true_pairs

OLD, NEW, FLOOR = 700, 260, 0.45
CONFIG = JoinConfig(neighbours=0, device="cpu", audit_rows=60)


def vectors_over(vectors: dict[str, np.ndarray], weight: float = 0.5) -> ItemVectors:
    weights = (
        {"image": weight, "text": 1 - weight} if len(vectors) > 1 else dict.fromkeys(vectors, 1.0)
    )
    return ItemVectors(
        {n: ModalityVectors(Rows([r]), r.any(1), weights[n]) for n, r in vectors.items()}
    )


def halves(vectors: dict[str, np.ndarray], old: int = OLD) -> tuple[ItemVectors, ItemVectors]:
    return (vectors_over({n: r[:old] for n, r in vectors.items()}),
            vectors_over({n: r[old:] for n, r in vectors.items()}))  # fmt: skip


def wanted_pairs(vectors, floor: float = FLOOR, old: int = OLD) -> set[tuple[int, int]]:
    """By float64 over all, less the pairs of two old rows."""
    i, j = true_pairs(vectors, floor)
    return {(int(a), int(b)) for a, b in zip(i, j, strict=True) if b >= old}


def found_in(out) -> set[tuple[int, int]]:
    pairs = read_pairs(out)
    assert (pairs.i < pairs.j).all()
    assert not pairs.duplicated(["i", "j"]).any()
    assert (pairs.score >= np.float32(FLOOR)).all()
    return set(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("parts", [1, 2])
def test_pairs_are_those_of_float64(tmp_path, dtype, parts):
    vectors = planted(OLD + NEW, 24, dtype)
    vectors = dict(list(vectors.items())[:parts])
    old, new = halves(vectors)
    proof = join_new(old, new, tmp_path, FLOOR, CONFIG, Runtime("cpu"))
    truth = wanted_pairs(vectors)
    assert len(truth) > 500
    assert {j >= OLD and i >= OLD for i, j in truth} == {True, False}
    assert found_in(tmp_path) == truth
    assert proof["pairs_covered"] == NEW * OLD + NEW * (NEW + 1) // 2
    assert proof["audit"]["true"] > 100
    degree = pd.read_parquet(tmp_path / DEGREES)
    count = np.bincount(np.array(sorted(truth)).ravel(), minlength=OLD + NEW)
    assert degree.row.tolist() == np.flatnonzero(count).tolist()
    assert degree.degree.tolist() == count[count > 0].tolist()


@pytest.mark.parametrize("size", [7, 64, 5000])
@pytest.mark.parametrize("old", [0, 1, 200, 299])
def test_block_pairs_hold_each_pair_with_a_new_row_once(size, old):
    item_vectors = vectors_over(planted(300, 8))
    blocks = blocks_of(item_vectors, size, old)
    seen, across, within = np.zeros((300, 300), np.int64), 0, 0
    for pair in block_pairs_of(blocks, old):
        one, other = blocks[pair.query].ids(), blocks[pair.database].ids()
        assert (one < old).all() or (one >= old).all()
        assert other[0] >= old
        across, within = (
            (across + pair.area, within) if one[0] < old else (across, within + pair.area)
        )
        seen[np.ix_(one, other)] += 1
        if pair.query != pair.database:
            seen[np.ix_(other, one)] += 1
    here = {n: p.present for n, p in item_vectors.modalities.items()}
    common = np.outer(here["image"], here["image"]) | np.outer(here["text"], here["text"])
    common[:old, :old] = False
    np.testing.assert_array_equal(seen, common.astype(np.int64))
    assert across + within + disjoint_area(item_vectors, old) == required_area(300, old)
    assert required_area(300, old) == (300 - old) * old + (300 - old) * (301 - old) // 2
    assert across == common[:old].sum()


def test_old_and_new_together_are_the_whole_join(tmp_path):
    """The old join and two updates one after the other give the join of all."""
    vectors = planted(900, 20)
    ends, found = [0, 400, 650, 900], set()
    for start, end in pairwise(ends):
        some = {n: r[:end] for n, r in vectors.items()}
        old, new = halves(some, start)
        join_new(old, new, tmp_path / str(end), FLOOR, CONFIG, Runtime("cpu"))
        part = found_in(tmp_path / str(end))
        assert not part & found
        found |= part
    i, j = true_pairs(vectors, FLOOR)
    assert found == set(zip(i.tolist(), j.tolist(), strict=True))


def test_nearest_of_new_rows_are_among_all_and_of_old_rows_among_the_new(tmp_path):
    vectors = {"image": planted(500, 16)["image"]}
    old, new = halves(vectors, 380)
    config = JoinConfig(neighbours=3, device="cpu", audit_rows=20)
    join_new(old, new, tmp_path, FLOOR, config, Runtime("cpu"))
    rows = vectors["image"].astype(np.float64)
    score = (rows @ rows.T).astype(np.float32)
    here = rows.any(1)
    score[~here], score[:, ~here] = -np.inf, -np.inf
    score[:380, :380] = -np.inf
    np.fill_diagonal(score, -np.inf)
    nearest = pd.read_parquet(tmp_path / "nearest.parquet")
    assert set(nearest.i) == set(np.flatnonzero(here))
    for item, table in nearest.groupby("i"):
        order = np.lexsort((np.arange(500), -score[item]))[:3]
        assert table.j.tolist() == order.tolist()


@pytest.mark.parametrize("harm", ["block pair", "pair"])
def test_a_result_that_is_not_whole_is_refused(tmp_path, harm):
    old, new = halves(planted(OLD + NEW, 24))
    runtime = Runtime("cpu")
    config = replace(CONFIG, max_score_floor=FLOOR)
    engine, limits, _ = set_up(concatenated(old, new), None, tmp_path, config, runtime, OLD, FLOOR)
    join(engine, limits, tmp_path, runtime)
    apply_score_floor(tmp_path, FLOOR)
    said = {"block pair": "cover", "pair": "missed"}[harm]
    if harm == "block pair":
        next((tmp_path / ".work/block_pairs").glob("*.json")).unlink()
    else:
        for path in (tmp_path / "pairs").glob("*.parquet"):
            pd.read_parquet(path).iloc[:0].to_parquet(path, index=False)
    with pytest.raises(Failed, match=said):
        prove(engine, tmp_path, FLOOR, 60)


def _work(out: str) -> None:
    vectors = planted(6000, 24)
    join_new(*halves(vectors, 4500), Path(out), FLOOR, CONFIG, Runtime("cpu"))


@pytest.mark.timeout(300)
def test_killed_workers_go_on(tmp_path):
    """Two workers by themselves, one killed in the middle; a third call finishes."""
    context = multiprocessing.get_context("spawn")
    out = tmp_path / "m"
    workers = [context.Process(target=_work, args=(str(out),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 200
    while not list(out.glob(".work/block_pairs/?????.json")) and time.monotonic() < end:
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    done = {path: path.stat().st_mtime_ns for path in out.glob(".work/block_pairs/?????.json")}
    assert done
    _work(str(out))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert found_in(out) == wanted_pairs(planted(6000, 24), old=4500)
    assert json.loads((out / "proof.json").read_text())["old"] == 4500


def test_rows_that_do_not_fit_are_refused(tmp_path):
    old, _ = halves(planted(100, 8), 100)
    _, none = halves(planted(100, 8), 100)
    _, narrow = halves(planted(100, 6), 50)
    _, image = halves({"image": planted(100, 8)["image"]}, 50)
    weighted = vectors_over(planted(100, 8), 0.3)
    for new, said in ((none, "no new rows"), (narrow, "6 columns"), (image, "image of 8"),
                      (weighted, "have image of 8 columns and weight 0.3 and")):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            join_new(old, new, tmp_path / "m", FLOOR, CONFIG, Runtime("cpu"))
