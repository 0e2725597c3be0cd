"""The stages join and match over a set made by hand: both engines, one result; what is refused."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from sklearn.isotonic import IsotonicRegression

from dist_train.config.options import IndexConfig, JoinConfig, MatchConfig
from dist_train.config.training import result_options
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
MANY_PRODUCTS = 150
"""So many that a fifth of them suffices for a pair model."""
WEIGHTS = {"weights": {"image": 0.5, "text": 0.5}}
"""Of the score over both modalities, as a threshold.json names them."""


def write_set(
    out,
    seed: int = 0,
    labels: str | None = "g{product}",
    products: int = PRODUCTS,
    title: str = "",
) -> None:
    """Noisy copies of products, a fifth val; some postings rejected, some without a photo.

    labels: how the label group is formed of `product` and `number`, None for none at all; title:
    how the title is. The catalogue carries the column brand.
    """
    rng = np.random.default_rng(seed)
    N = products * EACH
    product = rng.permutation(np.repeat(np.arange(products), EACH))
    split = np.where(product % 5 == 0, "val", np.where(product % 5 == 1, "test", "train"))
    made_with = {"by": "hand", "seed": seed, "labels": labels, "title": title}
    stage_files.begin(out, EMBEDDING, made_with, {})
    files, has = [out / "items.parquet"], {}
    for name in ("image", "text"):
        rows = rng.standard_normal((products, D))[product] + 0.6 * rng.standard_normal((N, D))
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
        "title": [title.format(product=p, number=n) for n, p in enumerate(product)],
        "has_image": has["image"], "has_text": has["text"], "status": "embedded",
        "sha256": "", "phash": "", "photo_group": -1, "brand": [f"b{p % 7}" for p in product],
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


@pytest.fixture(scope="module")
def titled(tmp_path_factory):
    """Pairs of products that their titles tell apart better than their vectors, and two matches."""
    folder = tmp_path_factory.mktemp("titled")
    write_set(folder / "emb", products=MANY_PRODUCTS, title="thing model{product}")
    build_index(folder / "emb", folder / "index", IndexConfig())
    build_pairs(folder / "emb", folder / "index", folder / "pairs", JoinConfig(device="cpu"))
    match(folder / "pairs", folder / "by-model", MatchConfig())
    match(folder / "pairs", folder / "by-score", MatchConfig(plain=True))
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


def test_what_lies_in_the_finished_directory_of_a_pair_model(titled):
    names = {"matches.parquet", "groups.parquet", "threshold.json", "submission.csv"}
    manifest = json.loads(read(titled / "by-score", "manifest.json"))
    assert manifest["files"].keys() == names
    manifest = json.loads(read(titled / "by-model", "manifest.json"))
    names |= {"pair_model.json", "reasons.parquet", "variants.parquet", "review.parquet"}
    assert manifest["files"].keys() == names
    decided = json.loads(read(titled / "by-model", "threshold.json"))
    matches = read(titled / "by-model", "matches.parquet")
    compared = decided["candidates"]["pairs"]
    assert (manifest["counts"]["pairs"], matches.degree.sum()) == (compared, 2 * compared)
    scores = np.concatenate([row[1:] for row in matches.scores])
    assert np.float32(decided["threshold"]) <= scores.min() < scores.max() <= 1
    assert 0 < decided["candidates"]["recall"]["words"] <= decided["candidates"]["recall"]["all"]


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
    assert json.loads(read(out, "stage.json"))["config"]["given_threshold"] == 0.75
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
    assert json.loads(read(tmp_path / "m", "stage.json"))["config"]["given_threshold"] == 0.8
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


@pytest.mark.parametrize(("plain", "times"), [(True, 3), (False, 2)])
def test_how_often_a_match_reads_the_pairs(titled, tmp_path, batches, plain, times):
    """By the score for the threshold, the lists and the groups.

    By the pair model for the threshold on the score and for the candidates, which it then holds.
    """
    counts = json.loads(read(titled / "pairs", "manifest.json"))["counts"]
    decided = match(titled / "pairs", tmp_path / "m", MatchConfig(plain=plain))
    assert decided["form"] == ("score" if plain else "pair model")
    assert sum(batches) == times * counts["pairs"]


def test_too_few_val_products_for_a_pair_model_cost_no_more_reads(made, tmp_path, batches):
    counts = json.loads(read(made / "gemm-pairs", "manifest.json"))["counts"]
    decided = match(made / "gemm-pairs", tmp_path / "m", MatchConfig())
    assert "it takes 20 val products" in decided["no_model"]
    assert sum(batches) == 3 * counts["pairs"]


def by_average_linkage(
    names: dict[int, str], probability: dict[tuple[int, int], float], most: int, cut: float
) -> dict[str, set[str]]:
    """The group of each posting: the closest two groups are merged, over and over.

    Two are as close as the mean probability of the pairs between them; of equally close ones those
    with the first vector rows. names: by vector row; probability: of each pair, 0 of all others.
    """

    def rounded(value: float) -> float:
        return round(value * 2**24) / 2**24

    group = {row: {name} for row, name in names.items()}
    between = Counter({pair: rounded(value) for pair, value in probability.items()})
    while True:
        close = [
            (-total / (len(group[a]) * len(group[b])), a, b)
            for (a, b), total in between.items()
            if len(group[a]) + len(group[b]) <= most
        ]
        mean, a, b = min(close, default=(0.0, 0, 0))
        if -mean < rounded(cut):
            return {name: members for members in group.values() for name in members}
        group[a] |= group.pop(b)
        merged: Counter = Counter()
        for ends, total in between.items():
            x, y = sorted(a if end == b else end for end in ends)
            merged[x, y] += total if x != y else 0
        between = Counter({ends: total for ends, total in merged.items() if total})


@pytest.mark.parametrize("chosen", [True, False])
def test_groups_are_those_of_average_linkage_in_the_catalogue_s_order(made, chosen, tmp_path):
    """At the cut that is best for the val postings.

    A match counts 1 where the threshold is given; else every pair has the probability of its score
    among the val postings' pairs.
    """
    folder, best = made / "gemm", json.loads(read(made / "gemm", "threshold.json"))["threshold"]
    if not chosen:
        folder, config = tmp_path / "m", MatchConfig(threshold=best)
        match(made / "gemm-pairs", folder, config)
    decided, pairs = json.loads(read(folder, "threshold.json")), pairs_of(made / "gemm-pairs")
    items = read(made / "emb", "items.parquet").set_index("posting_id")
    label = items.label_group.to_dict()
    names = {int(name[1:]): name for name in items.index if name[0] == "p"}
    val = [name for name in names.values() if items.split[name] == "val"]
    probability = (pairs.score >= np.float32(decided["threshold"])).astype(float)
    if chosen:
        ends = [(names[i], names[j]) for i, j in zip(pairs.i, pairs.j, strict=True)]
        seen = [{*val} & {*both} for both in ends]
        # A pair of two val postings is seen from both.
        same = [label[one] == label[other] for one, other in ends]
        known = IsotonicRegression(out_of_bounds="clip")
        known.fit(pairs.score.astype(float), same, sample_weight=[len(one) for one in seen])
        probability = known.predict(pairs.score.astype(float)).astype(np.float32)
        probability[probability < 0.01] = 0
    weights = dict(zip(zip(pairs.i, pairs.j, strict=True), map(float, probability), strict=True))
    weights = {ends: weight for ends, weight in weights.items() if weight}
    product = items.groupby("label_group").groups
    f1 = {}
    for cut in [step / 20 for step in range(1, 19)]:
        found = by_average_linkage(names, weights, 2 * (EACH + 1), cut)
        true = {name: set(product[label[name]]) for name in val}
        scores = [2 * len(found[n] & true[n]) / (len(found[n]) + len(true[n])) for n in val]
        f1[cut] = round(float(np.mean(scores)), 12)
        if cut == decided["groups_cut"]:
            wanted = {name: {name} for name in items.index} | found
    assert decided["groups_cut"] == max(f1, key=lambda cut: (f1[cut], cut))
    groups = read(folder, "groups.parquet")
    assert groups.posting_id.tolist() == read(folder, "matches.parquet").posting_id.tolist()
    number: dict[str, int] = {}
    for name in groups.posting_id:
        fresh = max(number.values(), default=-1) + 1
        number |= {} if name in number else dict.fromkeys(wanted[name], fresh)
    assert groups.group_id.tolist() == [number[name] for name in groups.posting_id]
    assert 1 < groups.group_id.value_counts().max() <= 2 * (EACH + 1)


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
def test_without_products_to_tell_apart_only_near_certain_pairs_match(
    tmp_path, caplog, labels, obstacle
):
    write_set(tmp_path / "emb", labels=labels)
    build_index(tmp_path / "emb", tmp_path / "index", IndexConfig())
    build_pairs(tmp_path / "emb", tmp_path / "index", tmp_path / "pairs", JoinConfig(device="cpu"))
    decided = match(tmp_path / "pairs", tmp_path / "m", MatchConfig())
    said = rf"{obstacle}.*; only pairs that score 0\.95 or more .*--threshold T"
    assert re.search(said, caplog.text)
    assert (decided["source"], decided["form"]) == ("near-certain", "score")
    assert decided["threshold"] == np.float32(0.95)
    stored = json.loads(read(tmp_path / "m", "stage.json"))["config"]
    assert result_options(MatchConfig()).items() <= stored.items()  # so a run goes on with it
    certain = (pairs_of(tmp_path / "pairs").score >= np.float32(0.95)).sum()
    assert json.loads(read(tmp_path / "m", "manifest.json"))["counts"]["matches"] == certain
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
