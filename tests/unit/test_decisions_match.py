"""The stage match over a set made by hand: both engines, one result; what it refuses."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from dist_train.config import IndexConfig, MatchConfig
from dist_train.decisions.match import match
from dist_train.embedding.store import part_path
from dist_train.matching.index import build_index
from dist_train.matching.join import read_pairs
from dist_train.stage import EMBEDDING
from shards import stage_files
from shards.errors import BadInput
from shards.files import write_parquet

PRODUCTS, EACH, D = 60, 5, 24


def write_set(out, seed: int = 0, labels: bool = True) -> None:
    """Noisy copies of products, a fifth val; some postings rejected, some without a photo."""
    rng = np.random.default_rng(seed)
    N = PRODUCTS * EACH
    product = rng.permutation(np.repeat(np.arange(PRODUCTS), EACH))
    split = np.where(product % 5 == 0, "val", np.where(product % 5 == 1, "test", "train"))
    stage_files.begin(out, EMBEDDING, {"by": "hand", "seed": seed, "labels": labels}, {})
    files, has = [out / "items.parquet"], {}
    for name in ("image", "text"):
        rows = rng.standard_normal((PRODUCTS, D))[product] + 0.6 * rng.standard_normal((N, D))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        if name == "image":
            rows[::7] = 0
        has[name] = rows.any(1)
        files.append(part_path(out, name, 0))
        np.save(files[-1], rows.astype(np.float16))
    table = pd.DataFrame({
        "row": np.arange(N), "posting_id": [f"p{n}" for n in range(N)],
        "label_group": [f"g{p}" if labels else "" for p in product], "split": split,
        "title": "", "has_image": has["image"], "has_text": has["text"], "status": "embedded",
        "sha256": "", "phash": "", "photo_group": -1,
    })  # fmt: skip
    lost = table.iloc[:2].assign(row=-1, posting_id=["lost1", "lost2"], status="rejected")
    write_parquet(files[0], pd.concat([lost, table.sample(frac=1, random_state=1)]))
    stage_files.finish(out, {"items": N}, files)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("match")
    write_set(folder / "emb")
    build_index(folder / "emb", folder / "index", IndexConfig())
    for engine in ("faiss", "gemm"):
        config = MatchConfig(engine=engine, device="cpu", pairs_per_item=20)
        match(folder / "emb", folder / "index", folder / engine, config)
    return folder


def read(folder, name: str):
    path = folder / name
    return pd.read_parquet(path) if name.endswith(".parquet") else path.read_text()


def test_both_engines_write_the_same_matches(made):
    for name in ("matches.parquet", "groups.parquet", "nearest.parquet"):
        pd.testing.assert_frame_equal(read(made / "faiss", name), read(made / "gemm", name))
    pd.testing.assert_frame_equal(read_pairs(made / "faiss"), read_pairs(made / "gemm"))
    for name in ("submission.csv", "threshold.json"):
        assert read(made / "faiss", name) == read(made / "gemm", name)


def test_matches_are_the_pairs_at_the_threshold(made):
    folder = made / "faiss"
    chosen = json.loads(read(folder, "threshold.json"))
    pairs = pd.read_parquet(folder / "pairs")
    assert pairs.score.min() >= np.float32(chosen["floor"])
    assert (pairs.i < pairs.j).all()
    accepted = pairs[pairs.score >= np.float32(chosen["threshold"])]
    matches = read(folder, "matches.parquet")
    assert len(matches) == PRODUCTS * EACH + 2
    assert sum(len(row) - 1 for row in matches.matches) == 2 * len(accepted) > 0
    lost = matches[matches.posting_id.str.startswith("lost")]
    assert [list(row) for row in lost.matches] == [["lost1"], ["lost2"]]
    assert chosen["source"] == "chosen"
    assert chosen["weights"] == {"image": 0.5, "text": 0.5}
    assert chosen["items"] == 60
    assert chosen["f1"] > 0.8
    assert math.isclose(pairs.score.isna().sum(), 0)


def test_what_lies_in_a_finished_directory(made):
    folder = made / "faiss"
    manifest = json.loads(read(folder, "manifest.json"))
    for name in ("pairs/00000.parquet", "nearest.parquet", "matches.parquet", "groups.parquet",
                 "threshold.json", "proof.json", "submission.csv"):  # fmt: skip
        assert name in manifest["files"]
    assert manifest["counts"]["postings"] == PRODUCTS * EACH + 2
    assert json.loads(read(folder, "status.json"))["status"] == "done"
    assert not (folder / ".work").exists()
    nearest = read(folder, "nearest.parquet")
    assert set(nearest.i) == set(range(PRODUCTS * EACH))
    assert nearest.groupby("i").size().max() == 5


@pytest.mark.parametrize("engine", ["faiss", "gemm"])
def test_the_proof_of_a_finished_directory(made, engine):
    proof, N = json.loads(read(made / engine, "proof.json")), PRODUCTS * EACH
    assert (proof["engine"], proof["exact"], proof["items"]) == (engine, True, N)
    planted = proof["canaries"]["planted"]
    assert proof["canaries"]["found"] == planted > 8
    # Of FAISS's shards the planted items stand in none.
    all_ = N + planted if engine == "gemm" else N
    assert proof["pairs_covered"] == all_ * (all_ + 1) // 2
    assert proof["floor"] == json.loads(read(made / engine, "threshold.json"))["floor"]
    assert (proof["audit"]["rows"], proof["audit"]["missed"], proof["audit"]["wrong"]) == (
        200,
        0,
        0,
    )
    pairs = pd.read_parquet(made / engine / "pairs")
    some = np.linspace(0, N - 1, 200).astype(int)
    true = proof["audit"]["true"]
    assert true == (np.isin(pairs.i, some) | np.isin(pairs.j, some)).sum()
    assert proof["audit"]["recall"] == 1
    # With no miss among m: p^m = 0.05, as Clopper and Pearson's one-sided limit says.
    assert proof["audit"]["recall_low"] == pytest.approx(0.05 ** (1 / true), abs=1e-9)
    assert 0 < proof["first_pass_error"] <= proof["first_pass_margin"] < 1e-4
    assert proof["first_pass_checked"] > 0


def test_a_given_threshold_and_one_from_a_file(made, tmp_path):
    given = MatchConfig(engine="faiss", threshold=0.7, pairs_per_item=20)
    first = match(made / "emb", made / "index", tmp_path / "given", given)
    assert (first["source"], first["threshold"]) == ("given", float(np.float32(0.7)))
    file = made / "faiss/threshold.json"
    taken = MatchConfig(engine="gemm", threshold_from=file, device="cpu", pairs_per_item=20)
    second = match(made / "emb", made / "index", tmp_path / "file", taken)
    assert (second["source"], second["threshold"]) == (
        "file",
        json.loads(file.read_text())["threshold"],
    )
    pd.testing.assert_frame_equal(
        read(tmp_path / "file", "matches.parquet"), read(made / "faiss", "matches.parquet")
    )


def test_the_number_in_a_file_of_a_threshold_is_part_of_the_config(made, tmp_path):
    """The file may be written anew: what counts is what it said."""
    file, out = tmp_path / "threshold.json", tmp_path / "m"
    config = MatchConfig(engine="gemm", threshold_from=file, device="cpu", pairs_per_item=20)
    file.write_text('{"threshold": 0.75}')
    match(made / "emb", made / "index", out, config)
    assert json.loads(read(out, "stage.json"))["config"]["threshold"] == 0.75
    assert match(made / "emb", made / "index", out, config)["threshold"] == 0.75
    file.write_text('{"threshold": 0.5}')
    with pytest.raises(BadInput, match=r"threshold 0\.75 there, 0\.5 requested"):
        match(made / "emb", made / "index", out, config)


def test_groups_are_what_a_walk_along_the_matches_reaches_in_the_catalogue_s_order(made):
    matches = read(made / "gemm", "matches.parquet").set_index("posting_id").matches
    number: dict[str, int] = {}
    for first in matches.index:
        ahead = [] if first in number else [first]
        fresh = max(number.values(), default=-1) + 1
        while ahead:
            here = ahead.pop()
            if here not in number:
                number[here] = fresh
                ahead.extend(matches[here])
    groups = read(made / "gemm", "groups.parquet")
    assert groups.posting_id.tolist() == matches.index.tolist()
    assert groups.group_id.tolist() == [number[name] for name in groups.posting_id]
    assert 1 < groups.group_id.value_counts().max() < len(groups) / 2


def test_a_threshold_below_the_floor_gets_all_its_pairs(made, tmp_path):
    low = MatchConfig(engine="faiss", threshold=0.3, pairs_per_item=1)
    told = match(made / "emb", made / "index", tmp_path / "low", low)
    pairs = pd.read_parquet(tmp_path / "low/pairs")
    assert told["floor"] <= 0.3
    assert pairs.score.min() < 0.31
    matches = read(tmp_path / "low", "matches.parquet")
    assert (
        sum(len(row) - 1 for row in matches.matches) == 2 * (pairs.score >= np.float32(0.3)).sum()
    )


def test_without_labels_a_threshold_is_asked_for(made, tmp_path):
    write_set(tmp_path / "emb", labels=False)
    build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    with pytest.raises(BadInput, match="--threshold"):
        match(tmp_path / "emb", tmp_path / "index", tmp_path / "m", MatchConfig(engine="faiss"))
    assert not (tmp_path / "m").exists()  # refused before anything is claimed
    given = MatchConfig(engine="faiss", threshold=0.7)
    assert match(tmp_path / "emb", tmp_path / "index", tmp_path / "n", given)["curve"] is None


def test_an_index_over_another_set_is_refused(made, tmp_path):
    write_set(tmp_path / "other", seed=1)
    with pytest.raises(BadInput, match="is over another embedding set"):
        match(tmp_path / "other", made / "index", tmp_path / "m", MatchConfig())


def test_another_threshold_in_a_finished_directory_is_refused(made):
    other = MatchConfig(engine="faiss", device="cpu", pairs_per_item=20, threshold=0.5)
    with pytest.raises(BadInput, match=r"threshold None there, 0\.5 requested"):
        match(made / "emb", made / "index", made / "faiss", other)
