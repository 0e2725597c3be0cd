"""The index on disk: plain FAISS files over global row numbers, whole or refused by name."""

import json
import re
import shutil

import faiss
import numpy as np
import pandas as pd
import pytest

from dist_train.config.options import IndexConfig, bytes_of
from dist_train.distributed.stage import EMBEDDING
from dist_train.embedding.store import EmbeddingSet, part_path
from dist_train.matching.faiss_library import choose_kind
from dist_train.matching.index import build_index, index_shards, indexed_vectors
from dist_train.matching.recall import ShardedIndex, measured_recall
from dist_train.matching.sampling import sampled_score_floor
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt, Unfinished
from shards.storage.files import write_parquet
from tests.support.damage import vouch_again
from tests.support.planted import write_set as planted_set
from tests.unit.matching.test_join import random_vectors
from tests.unit.matching.test_join import write_set as joined_set

N, D = 1100, 6


def write_set(out, names=("image", "text"), seed: int = 0):
    """An embedding set made by hand: unit rows, every fifth without a photo."""
    rng = np.random.default_rng(seed)
    stage_files.begin(out, EMBEDDING, {"by": "hand", "seed": seed}, {})
    vectors, files = {}, [out / "items.parquet"]
    for name in names:
        rows = rng.standard_normal((N, D))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        if name == "image":
            rows[::5] = 0
        vectors[name] = rows.astype(np.float16)
        for part, start in enumerate(range(0, N, 256)):
            files.append(part_path(out, name, part))
            np.save(files[-1], vectors[name][start : start + 256])
    has = {n: vectors[n].any(1) if n in vectors else np.zeros(N, bool) for n in ("image", "text")}
    items = pd.DataFrame({"row": np.arange(N), "posting_id": [f"p{n}" for n in range(N)]})
    write_parquet(files[0], items.assign(has_image=has["image"], has_text=has["text"]))
    stage_files.finish(out, {"items": N}, files)
    return vectors


@pytest.fixture
def built(tmp_path):
    vectors = write_set(tmp_path / "emb")
    about = build_index(tmp_path / "emb", tmp_path / "index", IndexConfig(image_weight=0.3))
    return tmp_path, vectors, about


def test_shards_are_plain_faiss_files_with_global_row_numbers(built):
    folder, vectors, about = built
    halves = [vectors["image"] * np.sqrt(0.3), vectors["text"] * np.sqrt(0.7)]
    expected = np.hstack(halves).astype(np.float32)
    ids = []
    for path in index_shards(folder / "index"):
        shard = faiss.read_index(str(path))
        assert (shard.d, shard.metric_type) == (2 * D, faiss.METRIC_INNER_PRODUCT)
        here = faiss.vector_to_array(shard.id_map)
        rows = np.stack([shard.reconstruct(int(n)) for n in here])
        np.testing.assert_allclose(rows, expected[here], atol=1e-3)
        ids += here.tolist()
    assert ids == list(range(N))
    assert len(index_shards(folder / "index")) == 2
    assert about["modalities"] == ["image", "text"]
    assert (about["items"], about["width"], about["image_weight"]) == (N, 2 * D, 0.3)


def test_a_stranger_finds_an_item_by_itself(built):
    folder, vectors, _ = built
    text = vectors["text"][1055].astype(np.float32)
    query = np.concatenate([np.zeros(D, np.float32), text / np.float32(np.sqrt(0.7))])
    best = []
    for path in index_shards(folder / "index"):
        scores, ids = faiss.read_index(str(path)).search(query[None], 1)
        best.append((scores[0, 0], ids[0, 0]))
    score, row = max(best)
    assert row == 1055
    assert score == pytest.approx(1, abs=2e-3)


def test_the_views_of_an_index_have_its_weights(built):
    folder, _, _ = built
    item_vectors = indexed_vectors(folder / "index", EmbeddingSet(folder / "emb"))
    assert {name: part.weight for name, part in item_vectors.modalities.items()} == {
        "image": 0.3,
        "text": 0.7,
    }
    np.testing.assert_array_equal(item_vectors.modalities["image"].present, np.arange(N) % 5 != 0)
    assert len(item_vectors) == N


@pytest.mark.parametrize("modality", ["image", "text"])
def test_an_index_over_one_view_ignores_the_weight(tmp_path, modality):
    vectors = write_set(tmp_path / "emb")
    config = IndexConfig(modality=modality, image_weight=0.3)
    about = build_index(tmp_path / "emb", tmp_path / "index", config)
    assert (about["modalities"], about["width"]) == ([modality], D)
    first = faiss.read_index(str(index_shards(tmp_path / "index")[0]))
    np.testing.assert_array_equal(first.reconstruct(7), vectors[modality][7].astype(np.float32))
    item_vectors = indexed_vectors(tmp_path / "index", EmbeddingSet(tmp_path / "emb"))
    assert [part.weight for part in item_vectors.modalities.values()] == [1.0]


def test_auto_takes_what_there_is_and_a_missing_view_is_refused(tmp_path):
    write_set(tmp_path / "emb", ("text",))
    assert build_index(tmp_path / "emb", tmp_path / "auto", IndexConfig())["modalities"] == ["text"]
    for modality in ("image", "both"):
        with pytest.raises(BadInput, match="emb: holds no image vectors"):
            build_index(tmp_path / "emb", tmp_path / modality, IndexConfig(modality=modality))
        assert not (tmp_path / modality).exists()


def test_a_second_call_changes_nothing(built):
    folder, _, about = built
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (folder / "index").iterdir()}
    again = build_index(folder / "emb", folder / "index", IndexConfig(image_weight=0.3))
    assert again == about
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (folder / "index").iterdir()}
    assert after == before


def test_a_cut_off_index_is_completed_to_the_same_bytes(built):
    folder, _, about = built
    lost = folder / "index/shard-00001.faiss"
    wanted = lost.read_bytes()
    for path in (lost, folder / "index/manifest.json", folder / "index/index.json"):
        path.unlink()
    with pytest.raises(Unfinished, match="index"):
        index_shards(folder / "index")
    again = build_index(folder / "emb", folder / "index", IndexConfig(image_weight=0.3))
    assert again == about
    assert lost.read_bytes() == wanted


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_shard_is_refused_by_name(built, damage):
    path = built[0] / "index/shard-00001.faiss"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 3])
    if damage == "missing":
        path.unlink()
    with pytest.raises(Corrupt, match=r"shard-00001\.faiss"):
        index_shards(built[0] / "index")


def test_another_config_another_set_and_another_format_are_refused(built):
    folder, _, _ = built
    with pytest.raises(BadInput, match=r"image_weight 0\.3 there, 0\.5 requested"):
        build_index(folder / "emb", folder / "index", IndexConfig())
    write_set(folder / "other", seed=1)
    with pytest.raises(BadInput, match="parents differs"):
        build_index(folder / "other", folder / "index", IndexConfig(image_weight=0.3))
    about = json.loads((folder / "index/index.json").read_text())
    (folder / "index/index.json").write_text(json.dumps(about | {"format": 7}))
    vouch_again(folder / "index")
    with pytest.raises(BadInput, match="index format 7"):
        indexed_vectors(folder / "index", EmbeddingSet(folder / "emb"))


def test_an_unfinished_set_is_refused(built):
    (built[0] / "emb/manifest.json").unlink()
    with pytest.raises(Unfinished, match="emb: unfinished"):
        build_index(built[0] / "emb", built[0] / "new", IndexConfig())
    with pytest.raises(BadInput, match="holds index, wanted embedding set"):
        build_index(built[0] / "index", built[0] / "new", IndexConfig())


# Kinds


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set whose items all have both parts, in groups, so that lists have something to find."""
    folder = tmp_path_factory.mktemp("kinds")
    rng, vectors = np.random.default_rng(1), {}
    group = rng.permutation(np.arange(3000) // 20)
    for name in ("image", "text"):
        rows = rng.standard_normal((150, 16))[group] + 0.5 * rng.standard_normal((3000, 16))
        vectors[name] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    planted_set(folder / "emb", vectors)
    return folder


@pytest.mark.parametrize("kind", ["Flat", "SQfp16", "IVF", "IVF40,PQ8", "HNSW16"])
def test_every_kind_says_how_much_it_finds(whole, tmp_path, kind):
    about = build_index(whole / "emb", tmp_path / "index", IndexConfig(kind=kind))
    item_vectors = indexed_vectors(tmp_path / "index", EmbeddingSet(whole / "emb"))
    index = ShardedIndex(index_shards(tmp_path / "index"), kind)
    told = measured_recall(item_vectors, index, 100, about["recall"]["nprobe"])
    if kind in ("Flat", "SQfp16"):
        assert told["recall_at_50"]["share"] == told["range_recall"]["share"] == 1
        return
    assert about["recall"]["recall_at_50"]["low"] <= told["recall_at_50"]["share"] + 0.05
    for name in ("recall_at_50", "range_recall"):
        found = about["recall"][name]
        assert 0 < found["low"] < found["share"] <= found["high"] <= 1
        assert found["of"] > 1000
    if kind == "IVF":
        assert about["recall"]["recall_at_50"]["low"] >= 0.95


def test_a_sharded_flat_index_answers_as_a_single_one(whole, tmp_path):
    build_index(whole / "emb", tmp_path / "index", IndexConfig(kind="Flat"))
    item_vectors = indexed_vectors(tmp_path / "index", EmbeddingSet(whole / "emb"))
    shards = index_shards(tmp_path / "index")
    assert len(shards) == 3
    single = faiss.IndexFlatIP(item_vectors.width)
    single.add(item_vectors.database(range(3000)))
    faiss.write_index(single, str(tmp_path / "single.faiss"))
    rows = np.arange(0, 3000, 37)
    ours = ShardedIndex(shards, "Flat").nearest(item_vectors, rows, 50)
    theirs = ShardedIndex([tmp_path / "single.faiss"], "Flat").nearest(item_vectors, rows, 50)
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """An exact index in two shards over items of which some lack a part, and their true scores."""
    folder = tmp_path_factory.mktemp("lacking")
    vectors = random_vectors(1100, 12, seed=3)
    embeddings = joined_set(folder / "emb", vectors)
    config = IndexConfig(kind="Flat", image_weight=0.3, recall_rows=0)
    build_index(folder / "emb", folder / "index", config)
    total, weights = np.zeros((1100, 1100)), np.zeros((1100, 1100))
    for name, weight in (("image", 0.3), ("text", 0.7)):
        wide, here = vectors[name].astype(np.float64), vectors[name].any(1)
        total += weight * (wide @ wide.T)
        weights += weight * np.outer(here, here)
    truth = np.divide(total, weights, out=np.full((1100, 1100), -np.inf), where=weights > 0)
    np.fill_diagonal(truth, -np.inf)
    return index_shards(folder / "index"), indexed_vectors(folder / "index", embeddings), truth


def test_answers_of_an_index_are_those_of_float64(lacking):
    shards, item_vectors, truth = lacking
    index, rows = ShardedIndex(shards, "Flat"), np.arange(2, 1100, 61)
    nearest = index.nearest(item_vectors, rows, 5)
    for row, found in zip(rows, nearest, strict=True):
        best = np.argsort(-truth[row], kind="stable")[:5]
        assert found.tolist() == [n if truth[row, n] > -np.inf else -1 for n in best]
    found = index.at_least(item_vectors, rows, 0.6)
    item, other = np.divmod(found, len(item_vectors))
    strangers = item[rows[item] != other], other[rows[item] != other]
    told = set(zip(*(side.tolist() for side in strangers), strict=True))
    assert len(told) == len(strangers[0]) > 50
    clear = truth[rows] >= 0.6 + 1e-6
    assert told >= set(zip(*np.nonzero(clear), strict=True))
    assert all(truth[rows[n], m] >= 0.6 - 1e-6 for n, m in told)


def test_a_search_of_all_shards_ranks_every_row_and_says_where_there_are_no_more(lacking):
    shards, item_vectors, _ = lacking
    queries = np.random.default_rng(0).standard_normal((9, item_vectors.width)).astype(np.float32)
    products = queries.astype(np.float64) @ item_vectors.database(range(1100)).astype(np.float64).T
    scores, ids = ShardedIndex(shards, "Flat").search(queries, 1105)
    assert (ids[:, 1100:] == -1).all()
    assert (scores[:, 1100:] == -np.inf).all()
    assert all(sorted(row) == list(range(1100)) for row in ids[:, :1100])
    np.testing.assert_allclose(scores[:, :1100], -np.sort(-products, axis=1), atol=1e-5)
    at = np.take_along_axis(products, ids[:, :1100], 1)
    np.testing.assert_allclose(scores[:, :1100], at, atol=1e-5)


def test_the_recall_of_an_index_that_has_lost_a_shard_is_what_it_still_finds(lacking):
    shards, item_vectors, truth = lacking
    held = 1024  # rows of the first
    told = measured_recall(item_vectors, ShardedIndex(shards[:1], "Flat"), 40, 0)
    complete = np.flatnonzero(item_vectors.complete)
    some = complete[np.linspace(0, len(complete) - 1, 40).astype(int)]
    assert (told["rows"], told["nprobe"]) == (40, 0)
    floor = told["range_floor"]
    assert floor == sampled_score_floor(item_vectors, 20.0)
    within = truth[some] >= floor
    best = np.argsort(-truth[some], axis=1)[:, :50]
    assert told["recall_at_50"]["of"] == 40 * 50
    assert told["recall_at_50"]["found"] == (best < held).sum()
    assert told["range_recall"]["of"] == pytest.approx(within.sum(), abs=1)
    assert told["range_recall"]["found"] == pytest.approx(within[:, :held].sum(), abs=1)
    assert 0.9 < told["range_recall"]["share"] < 1


def test_what_an_approximate_index_says_is_off_by_no_more_than_its_margin(whole, tmp_path):
    config = IndexConfig(kind="IVF10,SQ4", recall_rows=50)
    told = build_index(whole / "emb", tmp_path / "index", config)["recall"]
    item_vectors = indexed_vectors(tmp_path / "index", EmbeddingSet(whole / "emb"))
    index = ShardedIndex(index_shards(tmp_path / "index"), "IVF10,SQ4")
    index.nprobe = told["nprobe"]
    rows = np.linspace(0, 2999, 50).astype(int)
    scores, ids = index.search(item_vectors.queries(range(3000), "complete")[0][rows], 50)
    wide = item_vectors.database(range(3000)).astype(np.float64)
    off = np.abs((wide[rows][:, None] * wide[ids]).sum(2) - scores)
    assert told["margin"] == pytest.approx(np.quantile(off, 0.999), rel=0.02)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_without_a_measured_recall_all_lists_are_searched(whole, tmp_path):
    config = IndexConfig(kind="IVF10,SQ4", recall_rows=0)
    assert build_index(whole / "emb", tmp_path / "index", config)["recall"] == {"nprobe": 10}


@pytest.mark.parametrize(
    ("memory", "kind", "factory"),
    [("8GB", "Flat", "Flat"), ("2.5GB", "SQfp16", "SQfp16"), ("1.2GB", "IVF", r"IVF\d+,SQ8"),
     ("300MB", "IVF", r"IVF\d+,PQ\d+x8")],
)  # fmt: skip
def test_the_kind_follows_the_memory(memory, kind, factory):
    chosen = choose_kind("auto", 1_000_000, 1024, bytes_of(memory))
    assert chosen.name == kind
    assert re.fullmatch(factory, chosen.factory)
    assert "GB" in chosen.reason


def test_a_kind_that_faiss_does_not_know_is_refused(whole, tmp_path):
    with pytest.raises(BadInput, match=r"--kind Fancy.*use auto, Flat"):
        build_index(whole / "emb", tmp_path / "index", IndexConfig(kind="Fancy"))


def test_a_foreign_file_is_refused_by_name(built):
    path = built[0] / "index/shard-00001.faiss"
    faiss.write_index(faiss.IndexFlatIP(3), str(path))
    with pytest.raises(Corrupt, match=r"shard-00001\.faiss"):
        index_shards(built[0] / "index")


# A modality that no item has


def without_photos(out):
    """A set with image vectors, all of them missing."""
    write_set(out)
    items = pd.read_parquet(out / "items.parquet").assign(has_image=False)
    shutil.rmtree(out)
    stage_files.begin(out, EMBEDDING, {"by": "hand"}, {})
    files = [out / "items.parquet", part_path(out, "image", 0), part_path(out, "text", 0)]
    write_parquet(files[0], items)
    np.save(files[1], np.zeros((N, D), np.float16))
    np.save(files[2], np.eye(D, dtype=np.float16)[np.arange(N) % D])
    stage_files.finish(out, {"items": N}, files)


@pytest.mark.parametrize("modality", ["image", "both"])
def test_a_modality_that_no_item_has_is_named(tmp_path, modality):
    without_photos(tmp_path / "emb")
    with pytest.raises(BadInput, match="no item has a vector of image modality"):
        build_index(tmp_path / "emb", tmp_path / "index", IndexConfig(modality=modality))


def test_auto_leaves_it_out_and_says_so(tmp_path, caplog):
    without_photos(tmp_path / "emb")
    about = build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    assert about["modalities"] == ["text"]
    assert "no item has a vector of image: it is left out" in caplog.text
