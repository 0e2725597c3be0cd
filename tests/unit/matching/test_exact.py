"""Planted groups among thousands: every exact engine finds what float64 finds, and nothing else."""

import numpy as np
import pytest

from dist_train.config.options import IndexConfig
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.index import build_index, indexed_vectors
from dist_train.matching.join import JoinLimits, join
from tests.support.planted import planted, read_pairs, true_pairs, write_set
from tests.unit.matching.test_join import ENGINES, faiss_engine, gemm

N, D, FLOOR = 3000, 48, 0.5


@pytest.fixture(scope="module", params=["float16", "float32"])
def case(request, tmp_path_factory):
    """Vectors in one dtype, their set and index on disk, and the true pairs."""
    vectors, folder = planted(N, D, request.param), tmp_path_factory.mktemp(request.param)
    write_set(folder / "emb", vectors)
    for kind in ("Flat", "SQfp16"):
        build_index(folder / "emb", folder / kind, IndexConfig(kind=kind))
    return folder, vectors, set(zip(*map(np.ndarray.tolist, true_pairs(vectors, FLOOR)),
                                    strict=True))  # fmt: skip


def found(folder, item_vectors, engine) -> set[tuple[int, int]]:
    join(engine, JoinLimits(FLOOR), folder, Runtime("cpu"))
    pairs = read_pairs(folder)
    assert not pairs.duplicated(["i", "j"]).any()
    assert engine.stats.error <= engine.stats.margin
    return set(zip(pairs.i, pairs.j, strict=True))


@pytest.mark.parametrize("block", [700, 4096])
@pytest.mark.parametrize("engine", [*ENGINES, "SQfp16"])
def test_every_engine_and_block_size(case, tmp_path, engine, block):
    folder, _, truth = case
    kind = engine if engine == "SQfp16" else "Flat"
    item_vectors = indexed_vectors(folder / kind, EmbeddingSet(folder / "emb"))
    if engine in ("faiss", "SQfp16"):
        searcher = faiss_engine(item_vectors, folder / kind, 0, block)
    else:
        searcher = gemm(item_vectors, block, engine)
    assert found(tmp_path, item_vectors, searcher) == truth


def test_the_order_of_the_parts_does_not_matter(case, tmp_path):
    _, vectors, truth = case
    starts = np.random.default_rng(0).permutation(np.arange(0, N, 700))
    order = np.concatenate([np.arange(s, min(s + 700, N)) for s in starts])
    write_set(tmp_path / "emb", {name: rows[order] for name, rows in vectors.items()})
    build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    item_vectors = indexed_vectors(tmp_path / "index", EmbeddingSet(tmp_path / "emb"))
    pairs = found(tmp_path / "m", item_vectors, gemm(item_vectors, 1024))
    assert {tuple(sorted((int(order[i]), int(order[j])))) for i, j in pairs} == truth


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """50 000 rows of 768 columns with an index, and their true pairs."""
    rows, folder = planted(50_000, 768)["image"], tmp_path_factory.mktemp("large")
    write_set(folder / "emb", {"image": rows}, part_rows=20_000)
    build_index(folder / "emb", folder / "index", IndexConfig(kind="Flat"))
    truth: set[tuple[int, int]] = set()
    exact = rows.astype(np.float64)
    for start in range(0, len(rows), 2000):
        scores = (exact[start : start + 2000] @ exact[start:].T).astype(np.float32)
        at, by = np.nonzero(scores >= np.float32(FLOOR))
        above = by > at
        truth.update(zip((at + start)[above].tolist(), (by + start)[above].tolist(), strict=True))
    return folder, truth


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", ["float32", "int8", "faiss"])
def test_fifty_thousand(large, tmp_path, engine):
    folder, truth = large
    item_vectors = indexed_vectors(folder / "index", EmbeddingSet(folder / "emb"))
    if engine == "faiss":
        searcher = faiss_engine(item_vectors, folder / "index", 0)
    else:
        searcher = gemm(item_vectors, 6144, engine)
    assert found(tmp_path, item_vectors, searcher) == truth
