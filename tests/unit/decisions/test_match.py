"""The stages join and match over a set made by hand: both engines, one result; what is refused."""

import json
import math
import shutil
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from dist_train.config.options import IndexConfig, JoinConfig, MatchConfig
from dist_train.decisions import threshold
from dist_train.decisions.match import match
from dist_train.distributed import stage
from dist_train.distributed.stage import EMBEDDING
from dist_train.embedding.store import part_path
from dist_train.matching.build_pairs import build_pairs
from dist_train.matching.index import build_index
from dist_train.matching.pairs import PairSet
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import write_parquet

PRODUCTS, EACH, D = 60, 5, 24
WEIGHTS = {"weights": {"image": 0.5, "text": 0.5}}
"""Of the score over both modalities, as a threshold.json names them."""


def write_set(out, seed: int = 0, labels: str | None = "g{product}") -> None:
    """Noisy copies of products, a fifth val; some postings rejected, some without a photo.

    labels: how the label group is formed of `product` and `number`; None for none at all.
    """
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
        "label_group": [
            labels.format(product=p, number=n) if labels else "" for n, p in enumerate(product)
        ],
        "split": split,
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
        config = JoinConfig(engine=engine, device="cpu", pairs_per_item=20)
        build_pairs(folder / "emb", folder / "index", folder / f"{engine}-pairs", config)
        match(folder / f"{engine}-pairs", folder / engine, MatchConfig())
    return folder


def pairs_of(folder) -> pd.DataFrame:
    """All pairs of a pairs directory, by i and j."""
    return PairSet(folder).select().sort_values(["i", "j"], ignore_index=True)


def read(folder, name: str):
    path = folder / name
    return pd.read_parquet(path) if name.endswith(".parquet") else path.read_text()


def test_both_engines_write_the_same_matches(made):
    for name in ("matches.parquet", "groups.parquet"):
        pd.testing.assert_frame_equal(read(made / "faiss", name), read(made / "gemm", name))
    nearest = [read(made / f"{engine}-pairs", "nearest.parquet") for engine in ("faiss", "gemm")]
    pd.testing.assert_frame_equal(*nearest)
    pairs = [pairs_of(made / f"{engine}-pairs") for engine in ("faiss", "gemm")]
    pd.testing.assert_frame_equal(*pairs)
    for name in ("submission.csv", "threshold.json"):
        assert read(made / "faiss", name) == read(made / "gemm", name)


def test_matches_are_the_pairs_at_the_threshold(made):
    folder = made / "faiss"
    chosen = json.loads(read(folder, "threshold.json"))
    pairs = pd.read_parquet(made / "faiss-pairs" / "pairs")
    assert pairs.score.min() >= np.float32(chosen["score_floor"])
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


def test_what_lies_in_the_finished_directories(made):
    pairs, matches = (json.loads(read(made / f, "manifest.json")) for f in ("faiss-pairs", "faiss"))
    parts = {f"pairs/{path.name}" for path in (made / "faiss-pairs" / "pairs").iterdir()}
    assert pairs["files"].keys() == parts | {"nearest.parquet", "proof.json"}
    assert "pairs/00000.parquet" in parts
    assert matches["files"].keys() == {
        "matches.parquet", "groups.parquet", "threshold.json", "submission.csv"
    }  # fmt: skip
    kept = len(pairs_of(made / "faiss-pairs"))
    assert pairs["counts"] == {"items": PRODUCTS * EACH, "pairs": kept}
    assert matches["counts"].keys() == {"postings", "pairs", "matches"}
    assert (matches["counts"]["postings"], matches["counts"]["pairs"]) == (
        PRODUCTS * EACH + 2,
        kept,
    )
    for folder in (made / "faiss-pairs", made / "faiss"):
        assert json.loads(read(folder, "status.json"))["status"] == "done"
        assert not (folder / ".work").exists()
    parents = [
        json.loads(read(made / f, "stage.json"))["parents"] for f in ("faiss-pairs", "faiss")
    ]
    assert [set(found) for found in parents] == [{"embedding", "index"}, {"pairs"}]
    nearest = read(made / "faiss-pairs", "nearest.parquet")
    assert set(nearest.i) == set(range(PRODUCTS * EACH))
    assert nearest.groupby("i").size().max() == 5


@pytest.mark.parametrize("engine", ["faiss", "gemm"])
def test_the_proof_of_a_finished_directory(made, engine):
    proof, N = json.loads(read(made / f"{engine}-pairs", "proof.json")), PRODUCTS * EACH
    assert (proof["engine"], proof["exact"], proof["items"]) == (engine, True, N)
    assert proof["pairs_covered"] == N * (N + 1) // 2
    assert proof["score_floor"] == json.loads(read(made / engine, "threshold.json"))["score_floor"]
    assert (proof["audit"]["rows"], proof["audit"]["missed"], proof["audit"]["wrong"]) == (
        200,
        0,
        0,
    )
    pairs = pd.read_parquet(made / f"{engine}-pairs" / "pairs")
    some = np.linspace(0, N - 1, 200).astype(int)
    true = proof["audit"]["true"]
    assert true == (np.isin(pairs.i, some) | np.isin(pairs.j, some)).sum()
    assert proof["audit"]["recall"] == 1
    # With no miss among m: p^m = 0.05, as Clopper and Pearson's one-sided limit says.
    assert proof["audit"]["recall_low"] == pytest.approx(0.05 ** (1 / true), abs=1e-9)
    assert 0 < proof["coarse_pass_error"] <= proof["coarse_pass_margin"] < 1e-4
    assert proof["coarse_pass_checked"] > 0


def test_another_threshold_takes_no_join(made, tmp_path):
    """By hand and from a file, over the same pairs."""
    before = {path: path.stat().st_mtime_ns for path in (made / "faiss-pairs").rglob("*")}
    given = match(made / "faiss-pairs", tmp_path / "given", MatchConfig(threshold=0.7))
    assert (given["source"], given["threshold"]) == ("given", float(np.float32(0.7)))
    accepted = (pairs_of(made / "faiss-pairs").score >= np.float32(0.7)).sum()
    assert json.loads(read(tmp_path / "given", "manifest.json"))["counts"]["matches"] == accepted
    file = made / "faiss/threshold.json"
    second = match(made / "gemm-pairs", tmp_path / "file", MatchConfig(threshold_from=file))
    assert (second["source"], second["threshold"]) == (
        "file",
        json.loads(file.read_text())["threshold"],
    )
    pd.testing.assert_frame_equal(
        read(tmp_path / "file", "matches.parquet"), read(made / "faiss", "matches.parquet")
    )
    after = {path: path.stat().st_mtime_ns for path in (made / "faiss-pairs").rglob("*")}
    assert after == before


def test_the_number_in_a_file_of_a_threshold_is_part_of_the_config(made, tmp_path):
    """The file may be written anew: what counts is what it said."""
    file, out = tmp_path / "threshold.json", tmp_path / "m"
    config = MatchConfig(threshold_from=file)
    file.write_text(json.dumps({"threshold": 0.75} | WEIGHTS))
    match(made / "gemm-pairs", out, config)
    assert json.loads(read(out, "stage.json"))["config"]["threshold"] == 0.75
    assert match(made / "gemm-pairs", out, config)["threshold"] == 0.75
    file.write_text(json.dumps({"threshold": 0.5} | WEIGHTS))
    with pytest.raises(BadInput, match=r"threshold 0\.75 there, 0\.5 requested"):
        match(made / "gemm-pairs", out, config)


def test_a_file_of_a_threshold_that_is_replaced_meanwhile_is_not_read_again(
    made, tmp_path, monkeypatch
):
    """What stage.json says the matches were decided by is what they were decided by."""
    said = iter([0.8, 0.2])
    real = threshold.read_json

    def replaced(path):
        path.write_text(json.dumps({"threshold": next(said)} | WEIGHTS))
        return real(path)

    monkeypatch.setattr(threshold, "read_json", replaced)
    config = MatchConfig(threshold_from=tmp_path / "t.json")
    assert match(made / "gemm-pairs", tmp_path / "m", config)["threshold"] == np.float32(0.8)
    assert json.loads(read(tmp_path / "m", "stage.json"))["config"]["threshold"] == 0.8
    assert list(said) == [0.2]


@pytest.fixture
def batches(monkeypatch) -> Iterator[list[int]]:
    """Pairs of every batch that is read."""
    read_, seen = PairSet.batches, []

    def counted(self, columns=("i", "j", "score")):
        for table in read_(self, columns):
            seen.append(len(table))
            yield table

    monkeypatch.setattr(PairSet, "batches", counted)
    return seen


def test_a_match_reads_the_pairs_twice(made, tmp_path, batches):
    counts = json.loads(read(made / "gemm-pairs", "manifest.json"))["counts"]
    match(made / "gemm-pairs", tmp_path / "m", MatchConfig())
    assert sum(batches) == 2 * counts["pairs"]


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


def test_a_threshold_below_the_score_floor_is_refused_before_any_work(made, tmp_path):
    floor = json.loads(read(made / "gemm-pairs", "proof.json"))["score_floor"]
    low = float(np.nextafter(np.float32(floor), np.float32(0)))
    with pytest.raises(BadInput, match=f"--max-score-floor {low}, or give a higher threshold"):
        match(made / "gemm-pairs", tmp_path / "low", MatchConfig(threshold=low))
    (tmp_path / "t.json").write_text(json.dumps({"threshold": low} | WEIGHTS))
    with pytest.raises(BadInput, match=f"score {floor} or more, the threshold is {low}"):
        match(
            made / "gemm-pairs", tmp_path / "low", MatchConfig(threshold_from=tmp_path / "t.json")
        )
    assert not (tmp_path / "low").exists()
    # As float32 rounds it, which the pairs' scores are and what threshold.json holds.
    told = match(made / "gemm-pairs", tmp_path / "at", MatchConfig(threshold=floor))
    assert told["threshold"] == np.float32(floor)
    again = MatchConfig(threshold_from=tmp_path / "at/threshold.json")
    assert match(made / "gemm-pairs", tmp_path / "again", again)["threshold"] == np.float32(floor)


def test_a_join_told_of_the_threshold_keeps_all_its_pairs(made, tmp_path):
    low = JoinConfig(engine="faiss", max_score_floor=0.3, pairs_per_item=1, device="cpu")
    build_pairs(made / "emb", made / "index", tmp_path / "pairs", low)
    told = match(tmp_path / "pairs", tmp_path / "low", MatchConfig(threshold=0.3))
    pairs = pairs_of(tmp_path / "pairs")
    assert told["score_floor"] <= 0.3
    assert pairs.score.min() < 0.31
    matches = read(tmp_path / "low", "matches.parquet")
    assert (
        sum(len(row) - 1 for row in matches.matches) == 2 * (pairs.score >= np.float32(0.3)).sum()
    )


@pytest.mark.parametrize(
    ("labels", "obstacle"),
    [
        (None, "no item has a label_group"),
        ("g{number}", "none of the 60 products has two items"),
        ("g", "all items are of one product"),
    ],
)
def test_without_products_to_tell_apart_a_threshold_must_be_given(tmp_path, labels, obstacle):
    write_set(tmp_path / "emb", labels=labels)
    build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    build_pairs(tmp_path / "emb", tmp_path / "index", tmp_path / "pairs", JoinConfig(device="cpu"))
    with pytest.raises(BadInput, match=f"{obstacle}.*--threshold T or --threshold-from MATCHES"):
        match(tmp_path / "pairs", tmp_path / "m", MatchConfig())
    assert not (tmp_path / "m").exists()  # refused before anything is claimed
    given = match(tmp_path / "pairs", tmp_path / "n", MatchConfig(threshold=0.7))
    assert (given["curve"] is None) == (labels is None)


def test_an_index_over_another_set_is_refused(made, tmp_path):
    write_set(tmp_path / "other", seed=1)
    with pytest.raises(BadInput, match="is over another embedding set"):
        build_pairs(tmp_path / "other", made / "index", tmp_path / "m", JoinConfig())


def test_what_is_no_pairs_directory_is_refused(made, tmp_path):
    with pytest.raises(BadInput, match="emb: holds embedding set, wanted pairs"):
        match(made / "emb", tmp_path / "m", MatchConfig())
    stage_files.begin(tmp_path / "pairs", stage.PAIRS, {}, {})
    with pytest.raises(BadInput, match="pairs: unfinished"):
        match(tmp_path / "pairs", tmp_path / "m", MatchConfig())


def test_another_threshold_in_a_finished_directory_is_refused(made):
    with pytest.raises(BadInput, match=r"threshold None there, 0\.5 requested"):
        match(made / "faiss-pairs", made / "faiss", MatchConfig(threshold=0.5))
    with pytest.raises(BadInput, match="already holds matches"):
        build_pairs(made / "emb", made / "index", made / "faiss", JoinConfig(device="cpu"))


# The threshold of another match


@pytest.mark.parametrize(
    "weights",
    [{"text": 1.0}, {"image": 1.0}, {"image": 0.7, "text": 0.3}, {"image": 0.5, "title": 0.5}],
)
def test_a_threshold_of_another_score_is_refused(made, tmp_path, weights):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"threshold": 0.7, "weights": weights}))
    with pytest.raises(BadInput, match=r"belongs to the score .* here the score is 0\.5 image"):
        match(made / "gemm-pairs", tmp_path / "m", MatchConfig(threshold_from=path))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("weights", [None, [], {"image": "half"}, {"image": None}])
def test_a_file_that_does_not_name_its_score_is_refused(made, tmp_path, weights):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"threshold": 0.7, "weights": weights}))
    with pytest.raises(BadInput, match=r"t\.json: does not say which score .*--threshold 0\.7"):
        match(made / "gemm-pairs", tmp_path / "m", MatchConfig(threshold_from=path))


def test_a_match_directory_or_a_run_gives_its_threshold(made, tmp_path):
    wanted = json.loads(read(made / "faiss", "threshold.json"))["threshold"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/matches").symlink_to(made / "faiss")
    for number, path in enumerate((made / "faiss", tmp_path / "run")):
        config = MatchConfig(threshold_from=path)
        found = match(made / "gemm-pairs", tmp_path / f"m{number}", config)
        assert (found["source"], found["threshold"]) == ("file", wanted)


def test_a_directory_without_a_threshold_is_named(made, tmp_path):
    for path, message in (
        (tmp_path, "no match directory, and no run that has one"),
        (made / "emb", "emb: holds embedding set, wanted matches"),
        (tmp_path / "none.json", r"none\.json"),
    ):
        with pytest.raises(BadInput, match=message):
            match(made / "gemm-pairs", tmp_path / "m", MatchConfig(threshold_from=path))


def test_a_threshold_that_was_changed_after_the_match_is_named(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made / "faiss", copy)
    told = json.loads(read(copy, "threshold.json"))
    (copy / "threshold.json").write_text(json.dumps(told | {"threshold": 0.9}))
    for path in (copy, copy / "threshold.json"):
        with pytest.raises(BadInput, match=r"threshold\.json: differs from the sha256"):
            match(made / "gemm-pairs", tmp_path / "m", MatchConfig(threshold_from=path))
