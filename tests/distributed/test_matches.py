"""Embed, index, join and match on one and on several processes: the same items and decisions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_train.distributed.stage import parent
from dist_train.embedding.store import EmbeddingSet
from tests.support.launching import run
from tests.support.matching import add_photos, joined, postings, with_splits
from tests.support.processes import kill, start, wait_for

pytestmark = pytest.mark.timeout(600)


def _matched(world: int, shards: Path, runs: list[object], out: Path, engine: str) -> Path:
    embedding, index = out / "embedding", out / "index"
    pairs, matches = out / f"pairs-{engine}", out / f"matches-{engine}"
    if not embedding.exists():
        run(world, "embed", "--shards", shards, *runs, "--out", embedding, "--workers", 0)
        run(world, "index", embedding, "--out", index)
    run(world, "join", embedding, "--index", index, "--out", pairs, "--engine", engine)
    run(world, "match", pairs, "--out", matches)  # under a launcher the first rank does it
    return matches


@pytest.fixture(scope="module")
def pipelines(
    shard_set: Path, image_run: Path, text_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Path]:
    """Match directories by (processes, engine)."""
    runs = ["--image", image_run, "--text", text_run]
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        (world, engine): _matched(world, shard_set, runs, folder / str(world), engine)
        for world in (1, 2)
        for engine in ("faiss", "gemm")
    }


def test_vectors_are_the_same(pipelines: dict[tuple[int, str], Path]) -> None:
    one, two = (EmbeddingSet(pipelines[w, "faiss"].parent / "embedding") for w in (1, 2))
    assert one.items.posting_id.tolist() == two.items.posting_id.tolist()
    assert len(one.items) == 300
    for modality in ("image", "text"):
        a, b = (np.concatenate(s.rows(modality).parts) for s in (one, two))
        assert a.shape[0] == 300
        assert np.abs(a.astype(np.float32) - b).max() < 1e-3


@pytest.mark.parametrize("other", [(2, "faiss"), (1, "gemm"), (2, "gemm")])
def test_matches_are_the_same(
    pipelines: dict[tuple[int, str], Path], other: tuple[int, str]
) -> None:
    first, second = pipelines[1, "faiss"], pipelines[other]
    thresholds = [pd.read_json(p / "threshold.json", typ="series") for p in (first, second)]
    t = thresholds[0]["threshold"]
    assert thresholds[1]["threshold"] == pytest.approx(t, abs=1e-4)
    pairs = [_accepted(path, t) for path in (first, second)]
    assert len(pairs[0]) > 20
    differing = pairs[0].index.symmetric_difference(pairs[1].index)
    scores = pd.concat(pairs).loc[differing] if len(differing) else pd.Series(dtype=float)
    assert (np.abs(scores - t) < 1e-4).all()
    both = pairs[0].index.intersection(pairs[1].index)
    assert np.abs(pairs[0][both] - pairs[1][both]).max() < 1e-3


def test_every_posting_has_its_row(pipelines: dict[tuple[int, str], Path]) -> None:
    for matches in pipelines.values():
        table = pd.read_parquet(matches / "matches.parquet")
        assert len(table) == 300
        assert (table.matches.str[0] == table.posting_id).all()
        submission = pd.read_csv(matches / "submission.csv")
        assert submission.matches.str.split().tolist() == [list(m) for m in table.matches]


def _accepted(matches: Path, threshold: float) -> pd.Series:
    files = sorted((parent(matches, "pairs") / "pairs").glob("*.parquet"))
    table = pd.concat([pd.read_parquet(file) for file in files])
    table = table[table.score >= threshold - 1e-4]
    series = table.set_index(["i", "j"]).score
    assert series.index.is_unique
    decided = series[series >= threshold]
    return decided


# By the pair model


@pytest.fixture(scope="module")
def by_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pairs of a catalogue for which the pair model decides, and its match on one process."""
    folder = tmp_path_factory.mktemp("by-model")
    table = add_photos(postings(folder / "generated", 400), folder / "images")
    pairs = joined(with_splits(table), folder / "stages", folder / "images")
    run(1, "match", pairs, "--out", folder / "one")
    assert json.loads((folder / "one/threshold.json").read_text())["form"] == "pair model"
    return pairs, folder / "one"


def assert_same_bytes(first: Path, second: Path) -> None:
    files = json.loads((first / "manifest.json").read_text())["files"]
    assert files == json.loads((second / "manifest.json").read_text())["files"]
    assert {"matches.parquet", "groups.parquet", "threshold.json", "pair_model.json"} < {*files}
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("world", [2, 3])
def test_a_match_by_the_model_is_the_same_on_several_processes(
    by_model: tuple[Path, Path], world: int, tmp_path: Path
) -> None:
    pairs, one = by_model
    run(world, "match", pairs, "--out", tmp_path / "m")
    assert_same_bytes(one, tmp_path / "m")


@pytest.mark.parametrize("world", [1, 2])
def test_a_match_by_the_model_that_was_killed_is_the_same_when_it_is_started_again(
    by_model: tuple[Path, Path], world: int, tmp_path: Path
) -> None:
    pairs, one = by_model
    out = tmp_path / "m"
    # As it begins, and when the model is fitted but nothing is decided yet.
    for mark in ("stage.json", "pair_model.json"):
        process = start(world, "match", pairs, "--out", out)
        try:
            wait_for((out / mark).exists, process)
        finally:
            kill(process)
        assert not (out / "manifest.json").exists()
    run(world, "match", pairs, "--out", out)
    assert_same_bytes(one, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in one.iterdir()}
