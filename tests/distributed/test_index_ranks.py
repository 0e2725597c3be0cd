"""The index by any number of ranks: the same files, and one answer whatever the shards."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.index import index_shards, indexed_vectors
from dist_train.matching.recall import ShardedIndex
from tests.support.launching import run
from tests.support.planted import planted, write_set

N, D, K = 3000, 32, 50
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of a planted set, with near-duplicates, ties and missing modalities."""
    folder = tmp_path_factory.mktemp("index-ranks")
    write_set(folder / "emb", planted(N, D))
    return folder


@pytest.fixture(scope="module")
def alone(whole) -> Path:
    """The index that one process builds."""
    run(1, "index", whole / "emb", "--out", whole / "alone", "--kind", "Flat")
    return whole / "alone"


def answers(item_vectors, index: ShardedIndex, nprobe: int = 0) -> np.ndarray:
    """Ids of the K nearest of every seventh complete item, ranked by the score that decides."""
    index.nprobe = nprobe
    return index.nearest(item_vectors, np.flatnonzero(item_vectors.complete)[::7], K)


def by_hand(item_vectors, rows: np.ndarray) -> np.ndarray:
    """The same from float64 scores of all, ties by row number."""
    everything, out = np.arange(len(item_vectors)), []
    for row in rows:
        score = item_vectors.scores(np.full(N, row), everything)["score"].astype(np.float64)
        score[np.isnan(score)] = -np.inf
        score[row] = -np.inf
        out.append(np.lexsort((everything, -score))[:K])
    return np.array(out)


def test_one_rank_answers_as_a_single_index(whole, alone, tmp_path):
    item_vectors = indexed_vectors(alone, EmbeddingSet(whole / "emb"))
    single = faiss.IndexFlatIP(item_vectors.width)
    single.add(item_vectors.database(range(N)))
    faiss.write_index(single, str(tmp_path / "single.faiss"))
    assert len(index_shards(alone)) == 3
    ours = answers(item_vectors, ShardedIndex(index_shards(alone), "Flat"))
    np.testing.assert_array_equal(
        ours, answers(item_vectors, ShardedIndex([tmp_path / "single.faiss"], "Flat"))
    )
    some = np.flatnonzero(item_vectors.complete)[::7]
    np.testing.assert_array_equal(ours[::20], by_hand(item_vectors, some[::20]))


WORLDS = [(2, "Flat"), (3, "Flat"), *[
    pytest.param(world, kind, marks=pytest.mark.full)
    for world in (2, 3) for kind in ("SQfp16", "IVF", "IVF40,PQ8", "HNSW16")
]]  # fmt: skip


@pytest.mark.parametrize(("world", "kind"), WORLDS)
def test_ranks_write_what_one_process_writes(whole, alone, tmp_path, world, kind):
    if kind != "Flat":
        alone = tmp_path / "alone"
        run(1, "index", whole / "emb", "--out", alone, "--kind", kind)
    output = run(world, "index", whole / "emb", "--out", tmp_path / "index", "--kind", kind)
    ours, theirs = index_shards(tmp_path / "index"), index_shards(alone)
    assert [path.name for path in ours] == [path.name for path in theirs]
    item_vectors = indexed_vectors(alone, EmbeddingSet(whole / "emb"))
    nprobe = json.loads((alone / "index.json").read_text())["recall"]["nprobe"]
    np.testing.assert_array_equal(
        answers(item_vectors, ShardedIndex(ours, kind), nprobe),
        answers(item_vectors, ShardedIndex(theirs, kind), nprobe),
    )
    about = json.loads((tmp_path / "index/index.json").read_text())
    assert about == json.loads((alone / "index.json").read_text())
    assert f"recall@50 of {about['factory']}" in output
    assert "range recall " in output
    if kind == "Flat":
        assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
