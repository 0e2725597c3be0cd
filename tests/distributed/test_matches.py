"""Embed, index, join and match on one and on two processes: the same items, pairs and decisions."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_train.distributed.stage import parent
from dist_train.embedding.store import EmbeddingSet
from tests.support.launching import run

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
