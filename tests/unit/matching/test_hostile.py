"""Sets that are not as sets should be: copies, ties, NaN, nothing, and files that are broken."""

import logging

import numpy as np
import pytest
import torch

from dist_train.config.options import IndexConfig, JoinConfig, MatchConfig
from dist_train.decisions.match import match
from dist_train.decisions.threshold import given_threshold
from dist_train.distributed.memory import peak_bytes
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.blocks import blocks_of
from dist_train.matching.build_pairs import build_pairs
from dist_train.matching.engines import GemmEngine
from dist_train.matching.faiss_engine import FaissEngine
from dist_train.matching.faiss_library import faiss
from dist_train.matching.index import build_index, index_shards, indexed_vectors, read_index_json
from dist_train.matching.kernels import kernels_for
from shards.storage.errors import BadInput, Corrupt
from tests.support.damage import vouch_again
from tests.support.planted import read_pairs, write_set


def unit(rows: int, width: int, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, width))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def joined(folder, **options):
    """Index and join folder/emb; the folder of the pairs."""
    build_index(folder / "emb", folder / "index", IndexConfig())
    build_pairs(folder / "emb", folder / "index", folder / "pairs", JoinConfig(**options))
    return folder / "pairs"


# Copies


@pytest.mark.parametrize("more", [{}, {"pairs_per_item": 1.0}])
def test_a_thousand_copies_of_one_photo_are_kept_and_said(tmp_path, caplog, more):
    rows = unit(1600, 64)
    rows[:800] = rows[0]
    products = np.r_[np.zeros(800, int), np.arange(1, 801)]
    write_set(tmp_path / "emb", {"image": rows}, products=products)
    with caplog.at_level(logging.WARNING):
        out = joined(tmp_path, **more)
    pairs = read_pairs(out)
    assert (pairs.j < 800).sum() == 800 * 799 // 2
    assert match(out, tmp_path / "m", MatchConfig())["f1"] == pytest.approx(1.0)
    assert "all but copies of one another" in caplog.text
    if more:
        assert "more than the budget" in caplog.text


def test_without_any_pair_the_threshold_is_said_to_lie_at_the_floor(tmp_path):
    write_set(
        tmp_path / "emb", {"image": np.eye(40, dtype=np.float16)}, products=np.arange(40) // 2
    )
    out = joined(tmp_path)
    assert not len(read_pairs(out))
    assert match(out, tmp_path / "m", MatchConfig())["at_score_floor"]


# Recall


@pytest.mark.parametrize("copies", [150, 400])
def test_an_exact_index_finds_all_even_where_many_tie(tmp_path, copies):
    write_set(tmp_path / "emb", {"image": np.repeat(unit(2400 // copies, 16), copies, axis=0)})
    told = build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())["recall"]
    assert told["recall_at_50"]["share"] == told["range_recall"]["share"] == 1.0


def test_all_lists_of_a_factory_string_are_looked_into_where_few_find_too_little(tmp_path, caplog):
    write_set(tmp_path / "emb", {"image": unit(2000, 16)})
    told = build_index(tmp_path / "emb", tmp_path / "index", IndexConfig(kind="IVF500,Flat"))
    assert told["recall"]["recall_at_50"]["low"] > 0.95
    assert told["recall"]["nprobe"] > 41  # number_of_lists(2000)
    coarse = IndexConfig(kind="IVF64,PQ2x4")
    with caplog.at_level(logging.WARNING):
        told = build_index(tmp_path / "emb", tmp_path / "coarse", coarse)
    assert told["recall"]["nprobe"] == 64
    assert "finds too little even when all of its 64 lists are searched" in caplog.text


# What cannot be searched


SPOILT = {
    "NaN": (lambda row: np.r_[row[:3], np.nan, row[4:]], "holds NaN"),
    "Inf": (lambda row: np.r_[row[:3], np.inf, row[4:]], "holds NaN or infinity"),
    "scaled": (lambda row: 30_000 * row, "has length 3e[+]04, not 1"),
    "short": (lambda row: 0.9 * row, "has length 0.9, not 1"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_row_that_is_no_unit_vector_is_named(tmp_path, fault):
    """Though the manifest vouches for it: another program may have written the set."""
    rows, (spoil, message) = unit(300, 16), SPOILT[fault]
    write_set(tmp_path / "emb", {"image": rows}, part_rows=200)
    build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    vectors = indexed_vectors(tmp_path / "index", EmbeddingSet(tmp_path / "emb"))
    np.save(tmp_path / "emb" / "image-00001.npy", rows[200:])
    part = np.load(tmp_path / "emb" / "image-00001.npy")
    part[7] = spoil(part[7])
    np.save(tmp_path / "emb" / "image-00001.npy", part)
    vouch_again(tmp_path / "emb")
    named = rf"image-00001\.npy: row 7 \(item 207\) {message}"
    blocks = blocks_of(vectors, 512)
    engines = (
        GemmEngine(vectors, blocks, kernels_for(torch.device("cpu"), bf16=False)[0]),
        FaissEngine(
            vectors, index_shards(tmp_path / "index"), read_index_json(tmp_path / "index"), 512
        ),
    )
    for engine in engines:
        found = (list(engine.candidates(one, 0.5)) for one in engine.block_pairs)
        with pytest.raises(Corrupt, match=named):
            list(found)
    with pytest.raises(Corrupt, match=named):
        build_index(tmp_path / "emb", tmp_path / "again", IndexConfig())


DAMAGED_SETS = {
    "fewer": (lambda part: part[:-1], "299 image vectors for 300 items"),
    "one column": (lambda part: part[:, :1], "rows of 1 float16, in image-00000.npy of 16"),
    "no table": (lambda part: part.ravel(), "is no block of vectors"),
    "integers": (lambda part: part.astype(np.int8), "is no block of vectors"),
}


@pytest.mark.parametrize("damage", DAMAGED_SETS)
def test_vectors_that_do_not_fit_one_another_or_the_items_are_refused(tmp_path, damage):
    write_set(tmp_path / "emb", {"image": unit(300, 16)}, part_rows=200)
    path, (change, message) = tmp_path / "emb" / "image-00001.npy", DAMAGED_SETS[damage]
    np.save(path, change(np.load(path)))
    vouch_again(tmp_path / "emb")
    with pytest.raises(Corrupt, match=message):
        build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())


def test_a_set_without_any_vector_is_refused(tmp_path):
    write_set(tmp_path / "emb", {"image": np.zeros((30, 8), np.float16)})
    with pytest.raises(BadInput, match="no item has a vector of image modality"):
        build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    write_set(tmp_path / "none", {"image": np.zeros((0, 8), np.float16)})
    with pytest.raises(BadInput, match="no item has a vector of any modality"):
        build_index(tmp_path / "none", tmp_path / "index", IndexConfig())


@pytest.mark.parametrize("kind", ["IVF50,PQ8x8", "IVF5000,Flat", "IDMap,Flat"])
def test_what_faiss_refuses_is_bad_input(tmp_path, kind):
    write_set(tmp_path / "emb", {"image": unit(200, 16)})
    with pytest.raises(BadInput, match=f"--kind {kind}: FAISS cannot"):
        build_index(tmp_path / "emb", tmp_path / "index", IndexConfig(kind=kind))


def test_however_little_memory_there_is_a_kind_is_built(tmp_path):
    write_set(tmp_path / "emb", {"image": unit(200, 16)})
    told = build_index(tmp_path / "emb", tmp_path / "index", IndexConfig(memory="1kB"))
    assert told["factory"] == "IVF4,SQ8"


# Broken files


@pytest.fixture
def indexed(tmp_path):
    write_set(tmp_path / "emb", {"image": unit(300, 16)})
    build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    return tmp_path


@pytest.mark.parametrize("name", ["image-00000.npy", "items.parquet"])
@pytest.mark.parametrize("damage", ["gone", "short", "garbage"])
def test_a_broken_file_of_the_set_is_named(indexed, name, damage):
    path = indexed / "emb" / name
    whole = path.read_bytes()
    path.write_bytes({"short": whole[:-40]}.get(damage, b"\xff" * len(whole)))
    if damage == "gone":
        path.unlink()
    for work in (
        lambda: build_pairs(indexed / "emb", indexed / "index", indexed / "m", JoinConfig()),
        lambda: build_index(indexed / "emb", indexed / "again", IndexConfig()),
    ):
        with pytest.raises(Corrupt, match=f"{name}: (missing|differs from the sha256)"):
            work()


def test_an_index_of_another_format_is_named(indexed):
    (indexed / "index" / "index.json").write_text("{}")
    with pytest.raises(BadInput, match=r"index\.json: differs from the sha256"):
        build_pairs(indexed / "emb", indexed / "index", indexed / "m", JoinConfig())
    vouch_again(indexed / "index")
    with pytest.raises(BadInput, match="index format None"):
        build_pairs(indexed / "emb", indexed / "index", indexed / "m", JoinConfig())


@pytest.mark.parametrize("content", ["random", "huge", "of another width", "of fewer rows"])
def test_a_shard_that_faiss_cannot_use_is_named(indexed, content):
    path = indexed / "index" / "shard-00000.faiss"
    if content == "random":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif content == "huge":  # its header claims 2^60 rows
        path.write_bytes(
            path.read_bytes().replace((300).to_bytes(8, "little"), b"\0" * 7 + b"\x10")
        )
    else:
        of_another = faiss.IndexFlatIP(16 if content == "of fewer rows" else 3)
        faiss.write_index(of_another, str(path))
    vouch_again(indexed / "index")
    config = JoinConfig(engine="faiss")
    with pytest.raises(Corrupt, match=r"shard-00000\.faiss: (FAISS cannot read|holds 0 rows)"):
        build_pairs(indexed / "emb", indexed / "index", indexed / "pairs", config)


@pytest.mark.parametrize("told", ["{}", '{"threshold": null}', "[]", '{"threshold": NaN}'])
def test_a_file_without_a_threshold_is_named(tmp_path, told):
    (tmp_path / "t.json").write_text(told)
    with pytest.raises(BadInput, match=r"t\.json: holds no threshold"):
        given_threshold(MatchConfig(threshold_from=tmp_path / "t.json"))


# Memory


def test_a_tile_of_nothing_but_candidates_keeps_within_its_memory(tmp_path):
    """Two thousand rows in one cone: a product of which every place is a candidate."""
    rows = unit(4500, 16).astype(np.float32)
    rows[:2048] = rows[0] + 0.05 * rows[:2048]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    write_set(tmp_path / "emb", {"image": rows.astype(np.float16)})
    before = peak_bytes()
    out = joined(tmp_path, max_score_floor=0.9, memory="1.2GB", neighbours=0)
    # The program, the tests and what they have loaded stood before.
    joining = peak_bytes() - before
    assert joining < 1.2e9 - 0.72e9
    match(out, tmp_path / "m", MatchConfig(threshold=0.9))
    pairs = len(read_pairs(out))
    assert pairs >= 2048 * 2047 // 2
    assert peak_bytes() - before < max(joining, 550 * pairs)
