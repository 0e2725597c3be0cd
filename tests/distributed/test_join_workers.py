"""The join by any number of workers, whoever starts them and however they die: the same pairs."""

import json
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_train.config.options import IndexConfig
from dist_train.matching.index import build_index
from tests.support.launching import command, environment, run
from tests.support.planted import planted, read_pairs, true_pairs, write_set

N, D, FLOOR = 3000, 32, 0.5
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """Folder of a planted set and its index."""
    folder = tmp_path_factory.mktemp("join")
    write_set(folder / "emb", planted(N, D))
    build_index(folder / "emb", folder / "index", IndexConfig())
    return folder


@pytest.fixture(scope="module")
def truth() -> set[tuple[int, int]]:
    i, j = true_pairs(planted(N, D), FLOOR)
    assert len(i) > 3000
    return set(zip(i.tolist(), j.tolist(), strict=True))


def verb(pipeline: Path, out: Path, engine: str = "gemm") -> list[object]:
    """The command, with a limit of the score floor: that of the budget would lie above it."""
    return ["join", pipeline / "emb", "--index", pipeline / "index", "--out", out,
            "--engine", engine, "--max-score-floor", FLOOR, "--pairs-per-item", 2,
            "--neighbours", 3]  # fmt: skip


def check(out: Path, truth: set[tuple[int, int]]) -> None:
    pairs = read_pairs(out)
    assert not pairs.duplicated(["i", "j"]).any()
    assert set(zip(pairs.i, pairs.j, strict=True)) == truth
    assert json.loads((out / "status.json").read_text())["status"] == "done"
    proof = json.loads((out / "proof.json").read_text())
    assert proof["audit"]["missed"] == proof["audit"]["wrong"] == 0
    run(1, "match", out, "--out", out.with_name("matches"), "--threshold", FLOOR)
    degree = pd.read_parquet(out.with_name("matches") / "matches.parquet").degree.to_numpy()
    both = np.concatenate([pairs.i, pairs.j])
    np.testing.assert_array_equal(degree, np.bincount(both, minlength=N))


WORLDS = [
    (1, "gemm"),
    (2, "gemm"),
    (2, "faiss"),
    *[
        pytest.param(w, e, marks=pytest.mark.full)
        for w, e in ((3, "gemm"), (4, "gemm"), (1, "faiss"), (3, "faiss"), (4, "faiss"))
    ],
]


@pytest.mark.parametrize(("world", "engine"), WORLDS)
def test_ranks_of_one_launcher(pipeline, truth, tmp_path, world, engine):
    run(world, *verb(pipeline, tmp_path / "m", engine))
    check(tmp_path / "m", truth)


def start(pipeline: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(1, *verb(pipeline, out)), env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def block_pairs_done(out: Path) -> int:
    return len(list((out / ".work" / "block_pairs").glob("?????.json")))


def test_tasks_that_know_nothing_of_each_other(pipeline, truth, tmp_path):
    """As the tasks of a Slurm array: three processes, no group, one killed."""
    out = tmp_path / "m"
    tasks = [start(pipeline, out) for _ in range(3)]
    end = time.monotonic() + 120
    while not block_pairs_done(out) and time.monotonic() < end:
        time.sleep(0.005)
    tasks[0].kill()
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks[1:]] == [0, 0], outputs
    check(out, truth)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
@pytest.mark.timeout(1500)
def test_killed_joins_go_on(pipeline, truth, tmp_path, kills):
    out, moments, seen = tmp_path / "m", random.Random(kills), []
    for _ in range(kills):
        process, before = start(pipeline, out), block_pairs_done(out)
        wanted = before + moments.randint(0, 2)
        while process.poll() is None and block_pairs_done(out) <= wanted:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        process.kill()
        process.communicate()
        seen.append(block_pairs_done(out))
    assert seen[0] > 0 or (out / "manifest.json").exists()
    run(1, *verb(pipeline, out))
    check(out, truth)
