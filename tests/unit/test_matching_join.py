"""Every pair at a floor, exactly once, by both engines, against the definition in views.py."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config import IndexConfig
from dist_train.embedding.store import EmbeddingSet, Rows, part_path
from dist_train.matching.engines import GemmEngine, floor_of_sample
from dist_train.matching.faiss_engine import FaissEngine
from dist_train.matching.index import build_index, index_shards, indexed_views
from dist_train.matching.join import join, join_block, nearest_table, pairs_in_memory, read_pairs
from dist_train.matching.views import ViewPart, Views, open_views, subset, views_of_array
from dist_train.runtime import Runtime
from dist_train.stage import EMBEDDING
from shards import stage_files
from shards.files import write_parquet

CPU = torch.device("cpu")
ENGINES = ("faiss", "gemm")


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
        }),
    )  # fmt: skip
    stage_files.finish(out, {"items": N}, [*files, out / "items.parquet"])
    return EmbeddingSet(out)


def opened(
    tmp: Path, vectors: dict[str, np.ndarray], engine: str, image_weight: float = 0.5
) -> tuple[Views, GemmEngine | FaissEngine]:
    """Views and engine over a set and an index that are really on disk."""
    embeddings = write_set(tmp / "emb", vectors)
    build_index(tmp / "emb", tmp / "index", IndexConfig(image_weight=image_weight))
    views = indexed_views(tmp / "index", embeddings)
    if engine == "gemm":
        return views, GemmEngine(views, CPU)
    return views, FaissEngine(views, index_shards(tmp / "index"))


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


def all_pairs(views, engine, floor: float, cuts: list[int]) -> pd.DataFrame:
    blocks = [join_block(views, engine, range(a, b), floor, 3)[0] for a, b in pairwise(cuts)]
    return pd.concat(blocks, ignore_index=True).sort_values(["i", "j"], ignore_index=True)


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
    views, searcher = opened(tmp_path, vectors, engine, image_weight)
    truth = scores_by_definition(vectors, image_weight)
    for floor in (0.05, 0.3, 0.8):
        for cuts in ([0, 120], [0, 1, 50, 119, 120]):
            check_pairs(all_pairs(views, searcher, floor, cuts), truth, floor)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("view", ["image", "text"])
def test_all_pairs_of_one_view(tmp_path, engine, view):
    vectors = {view: random_vectors(90, seed=1)[view]}
    views, searcher = opened(tmp_path, vectors, engine)
    check_pairs(all_pairs(views, searcher, 0.2, [0, 40, 90]), scores_by_definition(vectors), 0.2)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_over_several_index_shards(tmp_path, engine):
    vectors = random_vectors(1100, 24, seed=2)
    views, searcher = opened(tmp_path, vectors, engine)
    assert len(index_shards(tmp_path / "index")) == 2
    pairs = all_pairs(views, searcher, 0.4, [0, 256, 1024, 1100])
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
    views, searcher = opened(tmp_path, exact, engine)
    truth = scores_by_definition(exact)
    assert (truth["score"] == 0.5).sum() > 20  # every score is a multiple of 1/4
    for floor in (0.5, float(np.nextafter(np.float32(0.5), np.float32(1)))):
        check_pairs(all_pairs(views, searcher, floor, [0, 40]), truth, floor)


@pytest.mark.parametrize("engine", ENGINES)
def test_duplicates_are_all_paired_and_none_with_itself(tmp_path, engine):
    one = random_vectors(1, 8, holes=False)
    vectors = {name: np.repeat(rows, 30, axis=0) for name, rows in one.items()}
    views, searcher = opened(tmp_path, vectors, engine)
    pairs, nearest = join_block(views, searcher, range(30), 0.9, 4)
    assert len(pairs) == 30 * 29 / 2
    assert nearest.groupby("i").size().tolist() == [4] * 30
    assert (nearest.i != nearest.j).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("N", [1, 2, 3])
def test_fewer_items_than_neighbours(tmp_path, engine, N):
    vectors = random_vectors(N, holes=False, seed=4)
    views, searcher = opened(tmp_path, vectors, engine)
    pairs, nearest = join_block(views, searcher, range(N), -2.0, 5)
    assert len(pairs) == N * (N - 1) // 2
    found = set(zip(nearest.i, nearest.j, strict=True))
    assert found == {(a, b) for a in range(N) for b in range(N) if a != b}
    check_pairs(pairs, scores_by_definition(vectors), -2.0)


@st.composite
def small_sets(draw):
    N, D = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    seed, weight = draw(st.integers(0, 999)), draw(st.floats(0.05, 0.95))
    vectors = random_vectors(N, D, seed=seed)
    twin = draw(st.integers(0, N - 1))
    for rows in vectors.values():
        rows[0] = rows[twin]
    return vectors, weight, draw(st.floats(0.05, 1.0))


@settings(max_examples=60, deadline=None)
@given(small_sets())
def test_any_small_set_in_memory(case):
    vectors, weight, floor = case
    weights = {"image": weight, "text": 1 - weight}
    views = Views({n: ViewPart(Rows([r]), r.any(1), weights[n]) for n, r in vectors.items()})
    truth = scores_by_definition(vectors, weight)
    with np.errstate(invalid="ignore"):
        floor = floor + 1e-5 if (np.abs(truth["score"] - floor) < 1e-6).any() else floor
    check_pairs(all_pairs(views, GemmEngine(views, CPU), floor, [0, len(views)]), truth, floor)


def best_by_definition(score: np.ndarray, item: int, allowed: np.ndarray, k: int) -> list[int]:
    score = np.where(allowed & ~np.isnan(score[item]), score[item], -np.inf)
    score[item] = -np.inf
    order = np.argsort(-score, kind="stable")[:k]
    return [int(n) for n in order if score[n] > -np.inf]


@pytest.mark.parametrize("engine", ENGINES)
def test_nearest_of_complete_items_equal_brute_force(tmp_path, engine):
    vectors = random_vectors(120, holes=False, seed=5)
    views, searcher = opened(tmp_path, vectors, engine)
    truth = scores_by_definition(vectors)["score"]
    _, nearest = join_block(views, searcher, range(30, 90), 0.5, 5)
    assert sorted(nearest.i.unique()) == list(range(30, 90))
    for item, rows in nearest.groupby("i"):
        wanted = best_by_definition(truth, item, np.ones(120, bool), 5)
        assert rows.j.tolist() == wanted
        np.testing.assert_allclose(rows.score, truth[item][wanted], atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["complete", "single"])
def test_nearest_where_parts_are_missing(tmp_path, engine, kind):
    """Every item asks for all, by the parts that both have."""
    vectors = random_vectors(120, seed=6)
    views, searcher = opened(tmp_path, vectors, engine)
    truth = scores_by_definition(vectors)["score"]
    _, nearest = join_block(views, searcher, range(120), 0.5, 5)
    found = {item: rows.j.tolist() for item, rows in nearest.groupby("i")}
    assert set(found) <= set(np.flatnonzero(views.some))
    asking = views.complete if kind == "complete" else views.some & ~views.complete
    allowed = np.ones(120, bool)
    for item in np.flatnonzero(asking):
        assert found[item] == best_by_definition(truth, item, allowed, 5), item


@pytest.mark.parametrize("engine", ENGINES)
def test_nearest_are_kept_whatever_their_score(tmp_path, engine):
    """Items that score below zero with everybody still have their nearest."""
    corner = np.eye(3, dtype=np.float16) - np.float16(1 / 3)
    rows = (corner / np.linalg.norm(corner, axis=1, keepdims=True)).astype(np.float16)
    lacking = np.zeros((6, 3), np.float16)
    images = np.concatenate([rows, lacking])
    texts = np.concatenate([lacking[:3], np.ones((6, 3), np.float16) / np.float16(np.sqrt(3))])
    views, searcher = opened(tmp_path, {"image": images, "text": texts}, engine)
    _, nearest = join_block(views, searcher, range(9), 0.5, 2)
    assert nearest[nearest.i < 3].groupby("i").size().to_dict() == {0: 2, 1: 2, 2: 2}
    assert (nearest[nearest.i < 3].score < 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_join_writes_every_block_and_goes_on(tmp_path, engine):
    vectors = random_vectors(600, 16, seed=7)
    views, searcher = opened(tmp_path, vectors, engine)
    runtime = Runtime("cpu")
    join(views, searcher, 0.5, 3, tmp_path / "m", runtime)
    files = sorted((tmp_path / "m/pairs").glob("*.parquet"))
    assert [file.name for file in files] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    pairs, nearest = read_pairs(tmp_path / "m"), nearest_table(tmp_path / "m")
    expected = all_pairs(views, searcher, 0.5, [0, 600])
    pd.testing.assert_frame_equal(pairs.sort_values(["i", "j"], ignore_index=True), expected)
    assert nearest.i.is_monotonic_increasing
    kept, lost = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    join(views, searcher, 0.5, 3, tmp_path / "m", runtime)
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].read_bytes() == lost


def test_both_engines_say_the_same(tmp_path):
    vectors = random_vectors(120, seed=8)
    views, faiss = opened(tmp_path, vectors, "faiss")
    one = all_pairs(views, faiss, 0.1, [0, 120])
    pd.testing.assert_frame_equal(one, all_pairs(views, GemmEngine(views, CPU), 0.1, [0, 120]))


# Views


def test_scores_are_nan_without_a_common_part():
    images = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], np.float16)
    texts = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], np.float16)
    views = Views({
        "image": ViewPart(Rows([images]), images.any(1), 0.3),
        "text": ViewPart(Rows([texts]), texts.any(1), 0.7),
    })  # fmt: skip
    found = views.scores(np.array([0, 0, 1, 2, 2]), np.array([1, 2, 2, 2, 3]))
    np.testing.assert_array_equal(found["score"], np.float32([np.nan, 1, 0, 1, np.nan]))
    np.testing.assert_array_equal(found["score_image"], np.float32([np.nan, 1, np.nan, 1, np.nan]))
    np.testing.assert_array_equal(found["score_text"], np.float32([np.nan, np.nan, 0, 1, np.nan]))


def test_a_subset_scores_as_its_items_do(tmp_path):
    vectors = random_vectors(60, seed=9)
    embeddings = write_set(tmp_path / "emb", vectors)
    views = open_views(embeddings, ["image", "text"], 0.4)
    rows = np.array([50, 3, 3, 17, 41, 0])
    few = subset(views, rows)
    i, j = np.triu_indices(len(rows), 1)
    ours, theirs = few.scores(i, j), views.scores(rows[i], rows[j])
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


# The floor


@pytest.mark.parametrize("per_item", [5.0, 40.0])
@pytest.mark.parametrize("holes", [False, True])
def test_the_floor_keeps_about_the_budget(per_item, holes):
    vectors = random_vectors(3000, 16, seed=10, holes=holes)
    views = Views({n: ViewPart(Rows([r]), r.any(1), 0.5) for n, r in vectors.items()})
    floor = floor_of_sample(views, per_item, CPU)
    assert floor == round(floor, 3)
    pairs, _ = join_block(views, GemmEngine(views, CPU), range(3000), floor, 1)
    assert 0.5 * per_item <= len(pairs) / views.some.sum() <= 1.5 * per_item


def test_the_floor_is_never_below_a_twentieth():
    vectors = random_vectors(50, holes=False)
    assert floor_of_sample(views_of_array(vectors["image"]), 1000.0, CPU) == 0.05
    assert floor_of_sample(views_of_array(vectors["image"][:1]), 1.0, CPU) == 0.05
    empty = np.zeros((4, 3), np.float32)
    nothing = Views({"image": ViewPart(Rows([empty]), np.zeros(4, bool), 1.0)})
    assert floor_of_sample(nothing, 1.0, CPU) == 0.05


def test_pairs_in_memory_are_the_best_ones():
    rows = random_vectors(400, 12, seed=11, holes=False)["image"].astype(np.float32)
    pairs = pairs_in_memory(views_of_array(rows), CPU, 10.0)
    truth = scores_by_definition({"image": rows})["score"].astype(np.float32)
    i, j = np.triu_indices(400, 1)
    above = truth[i, j] >= pairs.score.min()
    assert len(pairs.score) == above.sum()
    assert 0.5 * 4000 <= len(pairs.score) <= 1.5 * 4000
