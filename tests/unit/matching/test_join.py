"""Every pair at a floor, exactly once, by both engines, against the definition in vectors.py."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config.options import IndexConfig
from dist_train.distributed.runtime import Runtime
from dist_train.distributed.stage import EMBEDDING
from dist_train.embedding.store import EmbeddingSet, Rows, part_path
from dist_train.matching.blocks import blocks_of
from dist_train.matching.engines import GemmEngine
from dist_train.matching.faiss_engine import FaissEngine
from dist_train.matching.index import build_index, index_shards, indexed_vectors, read_index_json
from dist_train.matching.join import JoinLimits, join, pairs_in_memory
from dist_train.matching.kernels import kernels_for
from dist_train.matching.nearest import merge_nearest
from dist_train.matching.sampling import sampled_score_floor
from dist_train.matching.vectors import (
    ItemVectors,
    ModalityVectors,
    open_vectors,
    subset,
    vectors_of_array,
)
from shards.storage import stage_files
from shards.storage.files import write_parquet
from tests.support.planted import read_pairs

CPU = torch.device("cpu")
ENGINES = ("faiss", "float32", "int8", "bfloat16")


def random_vectors(N: int, D: int = 8, *, seed: int = 0, holes: bool = True):
    """Unit float16 rows of both parts; a fifth of the items each: image only, text only, none."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 5, N) if holes else np.zeros(N, np.int64)
    out = {}
    for name, lacking in (("image", (2, 3)), ("text", (1, 3))):
        rows = rng.standard_normal((N, D))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rows[np.isin(kind, lacking)] = 0
        out[name] = rows.astype(np.float16)
    return out


def write_set(out: Path, vectors: dict[str, np.ndarray], part_rows: int = 47) -> EmbeddingSet:
    """An embedding set as the contract on disk says, made by hand."""
    N = len(next(iter(vectors.values())))
    stage_files.begin(out, EMBEDDING, {"by": "hand"}, {})
    files = []
    for name, rows in vectors.items():
        for number, start in enumerate(range(0, N, part_rows)):
            files.append(part_path(out, name, number))
            np.save(files[-1], rows[start : start + part_rows])
    has = {n: vectors[n].any(1) if n in vectors else np.zeros(N, bool) for n in ("image", "text")}
    write_parquet(
        out / "items.parquet",
        pd.DataFrame({
            "row": np.arange(N), "posting_id": [f"p{n}" for n in range(N)], "label_group": "",
            "split": "unlabelled", "title": "", "has_image": has["image"],
            "has_text": has["text"], "status": "embedded", "sha256": "", "phash": "",
            "photo_group": -1,
        }),
    )  # fmt: skip
    stage_files.finish(out, {"items": N}, [*files, out / "items.parquet"])
    return EmbeddingSet(out)


def gemm(item_vectors: ItemVectors, block: int, kernel: str = "float32") -> GemmEngine:
    """The engine over blocks of at most `block` rows."""
    kernels = {k.name: k for k in kernels_for(CPU, bf16=True)}
    return GemmEngine(item_vectors, blocks_of(item_vectors, block), kernels[kernel])


def faiss_engine(item_vectors: ItemVectors, index: Path, k: int, block: int = 4096) -> FaissEngine:
    """The engine over a saved index."""
    return FaissEngine(item_vectors, index_shards(index), read_index_json(index), block, k)


def opened(
    tmp: Path, vectors: dict[str, np.ndarray], engine: str, image_weight: float = 0.5,
    block: int = 50, k: int = 0,
) -> tuple[ItemVectors, GemmEngine | FaissEngine]:  # fmt: skip
    """ItemVectors and engine over a set and an index that are really on disk."""
    embeddings = write_set(tmp / "emb", vectors)
    build_index(tmp / "emb", tmp / "index", IndexConfig(image_weight=image_weight))
    item_vectors = indexed_vectors(tmp / "index", embeddings)
    if engine == "faiss":
        return item_vectors, faiss_engine(item_vectors, tmp / "index", k, block)
    return item_vectors, gemm(item_vectors, block, engine)


def joined(
    out: Path, item_vectors: ItemVectors, engine, floor: float, k: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Pairs and nearest of a join that goes through its files."""
    join(engine, JoinLimits(floor, k), out, Runtime("cpu"))
    if k:
        files = sorted((out / ".work/nearest").glob("*.parquet"))
        merge_nearest(files, item_vectors, k, out / "nearest.parquet")
        return read_pairs(out), pd.read_parquet(out / "nearest.parquet")
    return read_pairs(out), pd.DataFrame()


def indexed_like(vectors: dict[str, np.ndarray]) -> ItemVectors:
    """The item_vectors of vectors in memory, of equal weight."""
    return ItemVectors({n: ModalityVectors(Rows([r]), r.any(1), 0.5) for n, r in vectors.items()})


def scores_by_definition(vectors: dict[str, np.ndarray], image_weight: float = 0.5):
    """(N, N) float64 of score, score_image, score_text; NaN where there is none."""
    weight = {"image": image_weight, "text": 1 - image_weight}
    if len(vectors) == 1:
        weight = dict.fromkeys(vectors, 1.0)
    N = len(next(iter(vectors.values())))
    total, weights, out = np.zeros((N, N)), np.zeros((N, N)), {}
    for name, rows in vectors.items():
        wide, here = rows.astype(np.float64), rows.any(1)
        both = here[:, None] & here[None, :]
        dots = np.array([[(a * b).sum() for b in wide] for a in wide])
        out[f"score_{name}"] = np.where(both, dots, np.nan)
        total += np.where(both, weight[name] * dots, 0)
        weights += np.where(both, weight[name], 0)
    with np.errstate(invalid="ignore"):
        return {"score": total / weights} | out


def check_pairs(pairs: pd.DataFrame, truth: dict[str, np.ndarray], floor: float) -> None:
    i, j = np.triu_indices(len(truth["score"]), 1)
    with np.errstate(invalid="ignore"):
        wanted = truth["score"][i, j].astype(np.float32) >= np.float32(floor)
    assert list(zip(pairs.i, pairs.j, strict=True)) == list(zip(i[wanted], j[wanted], strict=True))
    for name in ("score", "score_image", "score_text"):
        expected = truth[name][i, j][wanted] if name in truth else np.full(wanted.sum(), np.nan)
        np.testing.assert_allclose(pairs[name], expected, rtol=0, atol=1e-7)
        assert pairs[name].dtype == np.float32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("image_weight", [0.5, 0.2, 0.9])
def test_all_pairs_at_the_floor_exactly_once(tmp_path, engine, image_weight):
    vectors = random_vectors(120)
    item_vectors, searcher = opened(tmp_path, vectors, engine, image_weight)
    truth = scores_by_definition(vectors, image_weight)
    for floor in (0.05, 0.3, 0.8):
        check_pairs(joined(tmp_path / str(floor), item_vectors, searcher, floor)[0], truth, floor)


@pytest.mark.parametrize("kernel", ["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("block", [29, 2500])
def test_all_pairs_in_blocks_of_any_size(tmp_path, kernel, block):
    vectors = random_vectors(90, 40, seed=20)
    item_vectors = indexed_like(vectors)
    truth = scores_by_definition(vectors)
    pairs, _ = joined(tmp_path, item_vectors, gemm(item_vectors, block, kernel), 0.35)
    check_pairs(pairs, truth, 0.35)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("modality", ["image", "text"])
def test_all_pairs_of_one_view(tmp_path, engine, modality):
    vectors = {modality: random_vectors(90, seed=1)[modality]}
    item_vectors, searcher = opened(tmp_path, vectors, engine)
    check_pairs(
        joined(tmp_path, item_vectors, searcher, 0.2)[0], scores_by_definition(vectors), 0.2
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_over_several_index_shards(tmp_path, engine):
    vectors = random_vectors(1100, 24, seed=2)
    item_vectors, searcher = opened(tmp_path, vectors, engine, block=300)
    assert len(index_shards(tmp_path / "index")) == 2
    pairs, _ = joined(tmp_path, item_vectors, searcher, 0.4)
    assert (pairs.i < pairs.j).all()
    assert not pairs.duplicated(["i", "j"]).any()
    here = {name: rows.any(1) for name, rows in vectors.items()}
    total, weights = 0, 0
    for name, rows in vectors.items():
        total = total + rows.astype(np.float64) @ rows.astype(np.float64).T
        weights = weights + np.outer(here[name], here[name]).astype(float)
    with np.errstate(invalid="ignore"):
        i, j = np.nonzero(np.triu((total / weights).astype(np.float32) >= np.float32(0.4), 1))
    assert set(zip(pairs.i, pairs.j, strict=True)) == set(zip(i, j, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_score_at_the_floor_is_kept_and_one_below_is_not(tmp_path, engine):
    rng = np.random.default_rng(3)
    exact = {n: rng.choice([-0.5, 0.5], (40, 4)).astype(np.float16) for n in ("image", "text")}
    item_vectors, searcher = opened(tmp_path, exact, engine)
    truth = scores_by_definition(exact)
    assert (truth["score"] == 0.5).sum() > 20  # every score is a multiple of 1/4
    for floor in (0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))):
        check_pairs(joined(tmp_path / str(floor), item_vectors, searcher, floor)[0], truth, floor)


@pytest.mark.parametrize("engine", ENGINES)
def test_duplicates_are_all_paired_and_none_with_itself(tmp_path, engine):
    one = random_vectors(1, 8, holes=False)
    vectors = {name: np.repeat(rows, 30, axis=0) for name, rows in one.items()}
    item_vectors, searcher = opened(tmp_path, vectors, engine, block=9, k=4)
    pairs, nearest = joined(tmp_path, item_vectors, searcher, 0.9, 4)
    assert len(pairs) == 30 * 29 / 2
    assert nearest.groupby("i").size().tolist() == [4] * 30
    assert (nearest.i != nearest.j).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("N", [1, 2, 3])
def test_fewer_items_than_neighbours(tmp_path, engine, N):
    vectors = random_vectors(N, holes=False, seed=4)
    item_vectors, searcher = opened(tmp_path, vectors, engine, k=5)
    pairs, nearest = joined(tmp_path, item_vectors, searcher, -1.0, 5)
    assert len(pairs) == N * (N - 1) // 2
    found = set(zip(nearest.i, nearest.j, strict=True))
    assert found == {(a, b) for a in range(N) for b in range(N) if a != b}
    check_pairs(pairs, scores_by_definition(vectors), -1.0)


@st.composite
def small_sets(draw):
    N, D = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    seed, weight = draw(st.integers(0, 999)), draw(st.floats(0.05, 0.95))
    vectors = random_vectors(N, D, seed=seed)
    twin = draw(st.integers(0, N - 1))
    for rows in vectors.values():
        rows[0] = rows[twin]
    return vectors, weight, draw(st.floats(0.05, 1.0))


@settings(max_examples=25, deadline=None)
@given(small_sets())
def test_any_small_set_in_memory(case):
    vectors, weight, floor = case
    weights = {"image": weight, "text": 1 - weight}
    item_vectors = ItemVectors(
        {n: ModalityVectors(Rows([r]), r.any(1), weights[n]) for n, r in vectors.items()}
    )
    truth = scores_by_definition(vectors, weight)
    with np.errstate(invalid="ignore"):
        floor = floor + 1e-5 if (np.abs(truth["score"] - floor) < 1e-6).any() else floor
    with tempfile.TemporaryDirectory() as folder:
        for n, kernel in enumerate(("float32", "int8")):
            pairs, _ = joined(
                Path(folder) / str(n), item_vectors, gemm(item_vectors, 5, kernel), floor
            )
            check_pairs(pairs, truth, floor)


def best_by_definition(score: np.ndarray, item: int, allowed: np.ndarray, k: int) -> list[int]:
    score = np.where(allowed & ~np.isnan(score[item]), score[item], -np.inf)
    score[item] = -np.inf
    order = np.argsort(-score, kind="stable")[:k]
    return [int(n) for n in order if score[n] > -np.inf]


@pytest.mark.parametrize("engine", ENGINES)
def test_nearest_of_complete_items_equal_brute_force(tmp_path, engine):
    vectors = random_vectors(120, holes=False, seed=5)
    item_vectors, searcher = opened(tmp_path, vectors, engine, k=5)
    truth = scores_by_definition(vectors)["score"]
    _, nearest = joined(tmp_path, item_vectors, searcher, 0.5, 5)
    assert sorted(nearest.i.unique()) == list(range(120))
    for item, rows in nearest.groupby("i"):
        wanted = best_by_definition(truth, item, np.ones(120, bool), 5)
        assert rows.j.tolist() == wanted
        np.testing.assert_allclose(rows.score, truth[item][wanted], atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["complete", "single"])
def test_nearest_where_parts_are_missing(tmp_path, engine, kind):
    """Every item asks for all, by the parts that both have."""
    vectors = random_vectors(120, seed=6)
    item_vectors, searcher = opened(tmp_path, vectors, engine, k=5)
    truth = scores_by_definition(vectors)["score"]
    _, nearest = joined(tmp_path, item_vectors, searcher, 0.5, 5)
    found = {item: rows.j.tolist() for item, rows in nearest.groupby("i")}
    assert set(found) <= set(np.flatnonzero(item_vectors.any_modality))
    wanted = (
        item_vectors.complete
        if kind == "complete"
        else item_vectors.any_modality & ~item_vectors.complete
    )
    allowed = np.ones(120, bool)
    for item in np.flatnonzero(wanted):
        assert found[item] == best_by_definition(truth, item, allowed, 5), item


@pytest.mark.parametrize("engine", ENGINES)
def test_nearest_are_kept_whatever_their_score(tmp_path, engine):
    """Items that score below zero with everybody still have their nearest."""
    corner = np.eye(3, dtype=np.float16) - np.float16(1 / 3)
    rows = (corner / np.linalg.norm(corner, axis=1, keepdims=True)).astype(np.float16)
    lacking = np.zeros((6, 3), np.float16)
    images = np.concatenate([rows, lacking])
    texts = np.concatenate([lacking[:3], np.ones((6, 3), np.float16) / np.float16(np.sqrt(3))])
    item_vectors, searcher = opened(tmp_path, {"image": images, "text": texts}, engine, k=2)
    _, nearest = joined(tmp_path, item_vectors, searcher, 0.5, 2)
    assert nearest[nearest.i < 3].groupby("i").size().to_dict() == {0: 2, 1: 2, 2: 2}
    assert (nearest[nearest.i < 3].score < 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_join_writes_every_block_pair_and_goes_on(tmp_path, engine):
    vectors = random_vectors(600, 16, seed=7)
    item_vectors, searcher = opened(tmp_path, vectors, engine, block=256, k=3)
    before, near = joined(tmp_path / "m", item_vectors, searcher, 0.5, 3)
    files = sorted((tmp_path / "m/pairs").glob("*.parquet"))
    assert len(files) == len(searcher.block_pairs) > 2
    assert near.i.is_monotonic_increasing
    kept, lost = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    (tmp_path / f"m/.work/block_pairs/{files[1].stem}.json").unlink()
    after, again = joined(tmp_path / "m", item_vectors, searcher, 0.5, 3)
    pd.testing.assert_frame_equal(before, after)
    pd.testing.assert_frame_equal(near, again)
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].read_bytes() == lost


def test_all_engines_say_the_same(tmp_path):
    vectors = random_vectors(120, seed=8)
    tables = []
    for engine in ENGINES:
        item_vectors, searcher = opened(tmp_path / engine, vectors, engine, k=4)
        tables.append(joined(tmp_path / engine, item_vectors, searcher, 0.1, 4))
    for pairs, nearest in tables[1:]:
        pd.testing.assert_frame_equal(pairs, tables[0][0])
        pd.testing.assert_frame_equal(nearest, tables[0][1])


# ItemVectors


def test_scores_are_nan_without_a_common_part():
    images = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], np.float16)
    texts = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], np.float16)
    item_vectors = ItemVectors({
        "image": ModalityVectors(Rows([images]), images.any(1), 0.3),
        "text": ModalityVectors(Rows([texts]), texts.any(1), 0.7),
    })  # fmt: skip
    found = item_vectors.scores(np.array([0, 0, 1, 2, 2]), np.array([1, 2, 2, 2, 3]))
    np.testing.assert_array_equal(found["score"], np.float32([np.nan, 1, 0, 1, np.nan]))
    np.testing.assert_array_equal(found["score_image"], np.float32([np.nan, 1, np.nan, 1, np.nan]))
    np.testing.assert_array_equal(found["score_text"], np.float32([np.nan, np.nan, 0, 1, np.nan]))


def test_a_subset_scores_as_its_items_do(tmp_path):
    vectors = random_vectors(60, seed=9)
    embeddings = write_set(tmp_path / "emb", vectors)
    item_vectors = open_vectors(embeddings, ["image", "text"], 0.4)
    rows = np.array([50, 3, 3, 17, 41, 0])
    few = subset(item_vectors, rows)
    i, j = np.triu_indices(len(rows), 1)
    ours, theirs = few.scores(i, j), item_vectors.scores(rows[i], rows[j])
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


# The floor


@pytest.mark.parametrize("per_item", [5.0, 40.0])
@pytest.mark.parametrize("holes", [False, True])
def test_the_floor_keeps_about_the_budget(tmp_path, per_item, holes):
    vectors = random_vectors(3000, 16, seed=10, holes=holes)
    item_vectors = ItemVectors(
        {n: ModalityVectors(Rows([r]), r.any(1), 0.5) for n, r in vectors.items()}
    )
    floor = sampled_score_floor(item_vectors, per_item)
    assert floor == round(floor, 3)
    pairs, _ = joined(tmp_path, item_vectors, gemm(item_vectors, 2048), floor)
    assert 0.5 * per_item <= len(pairs) / item_vectors.any_modality.sum() <= 1.5 * per_item


def test_the_floor_is_never_below_a_twentieth():
    vectors = random_vectors(50, holes=False)
    assert sampled_score_floor(vectors_of_array(vectors["image"]), 1000.0) == 0.05
    assert sampled_score_floor(vectors_of_array(vectors["image"][:1]), 1.0) == 0.05
    empty = np.zeros((4, 3), np.float32)
    nothing = ItemVectors({"image": ModalityVectors(Rows([empty]), np.zeros(4, bool), 1.0)})
    assert sampled_score_floor(nothing, 1.0) == 0.05


def test_pairs_in_memory_are_the_best_ones():
    rows = random_vectors(400, 12, seed=11, holes=False)["image"].astype(np.float32)
    pairs = pairs_in_memory(vectors_of_array(rows), CPU, 10.0)
    truth = scores_by_definition({"image": rows})["score"].astype(np.float32)
    i, j = np.triu_indices(400, 1)
    above = truth[i, j] >= pairs.score.min()
    assert len(pairs.score) == above.sum()
    assert 0.5 * 4000 <= len(pairs.score) <= 1.5 * 4000
