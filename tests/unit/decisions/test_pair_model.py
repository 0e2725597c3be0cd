"""The pair model is fitted out of fold, is the same everywhere, and no file of it is trusted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_train.decisions import booster_text
from dist_train.decisions.pair_model import (
    FOLDS,
    LEAST_PRODUCTS,
    PairModel,
    fit,
    fitting_obstacle,
    fold_of_products,
    load,
    monotone_of,
)
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import sha256_json, write_json

SIGNS = {"score": 1, "words": 1, "numbers_conflicting": -1, "score_gap_min": 0, "feature_price": 0}


def pairs_of(count: int = 1500, seed: int = 0):
    """Features, truth and folds of pairs, a fifth of which have no val query."""
    draw = np.random.default_rng(seed)
    score, words = draw.uniform(size=(2, count))
    conflicts = draw.integers(0, 3, count)
    price = np.where(draw.random(count) < 0.3, np.nan, draw.uniform(size=count))
    values = [score, words, conflicts, draw.exponential(size=count), price]
    features = pd.DataFrame(np.array(values, np.float32).T, columns=list(SIGNS))
    same = score + words - 0.4 * conflicts + 0.3 * draw.standard_normal(count) > 1.1
    folds = draw.integers(-1, FOLDS, (count, 2)).astype(np.int8)
    folds[: count // 5] = -1
    return features, same, folds


def fitted(
    features: pd.DataFrame, same: np.ndarray, folds: np.ndarray, weight=None, **options
) -> PairModel:
    return fit(features, same, folds, weight, queries=40, products=20, **options)


@pytest.fixture(scope="module")
def model() -> PairModel:
    return fitted(*pairs_of())


def test_a_pair_counts_by_its_weight(model: PairModel) -> None:
    features, same, folds = pairs_of()
    assert fitted(features, same, folds, weight=np.ones(len(same))).boosters == model.boosters
    draw = np.random.default_rng(1)
    by_chance = draw.random(len(same)) < 0.5
    tripled = fitted(features, by_chance, folds, weight=np.where(by_chance, 1.0, 3.0))
    assert abs(tripled.probabilities(features, folds).mean() - 0.25) < 0.03


def test_a_pair_has_no_part_in_its_probability(model: PairModel) -> None:
    features, same, folds = pairs_of()
    fold = 2
    own = (folds == fold).any(axis=1)
    flipped = fitted(features, same ^ own, folds)
    assert flipped.boosters[fold] == model.boosters[fold]
    assert all(flipped.boosters[f] != model.boosters[f] for f in range(FOLDS) if f != fold)
    within = ((folds == fold) | (folds == -1)).all(axis=1) & own
    before, after = (m.probabilities(features, folds) for m in (model, flipped))
    assert within.sum() > 50
    assert np.array_equal(before[within], after[within])
    assert not np.array_equal(before[~own], after[~own])


def test_a_pair_of_two_folds_has_the_mean_of_both_boosters(model: PairModel) -> None:
    features, _, folds = pairs_of()
    each = np.stack([
        model.probabilities(features, np.full((len(features), 2), fold, np.int8))
        for fold in range(FOLDS)
    ])  # fmt: skip
    expected = [
        each[[fold for fold in ends if fold >= 0] or range(FOLDS), row].mean()
        for row, ends in enumerate(folds)
    ]
    np.testing.assert_allclose(model.probabilities(features, folds), expected, atol=1e-6)
    np.testing.assert_allclose(model.probabilities(features), each.mean(axis=0), atol=1e-6)


def test_pairs_without_a_val_query_are_not_learned_from(model: PairModel) -> None:
    features, same, folds = pairs_of()
    unseen = (folds < 0).all(axis=1)
    assert unseen.sum() > 200
    assert fitted(features, same ^ unseen, folds).boosters == model.boosters
    assert model.fitted_on["pairs"] == (~unseen).sum()
    assert model.fitted_on["positives"] == same[~unseen].sum()


def test_it_is_the_same_for_any_number_of_threads(model: PairModel) -> None:
    for threads in (2, 5):
        assert fitted(*pairs_of(), threads=threads) == model


def test_probabilities_do_not_depend_on_the_other_rows_or_the_order(model: PairModel) -> None:
    features, _, folds = pairs_of(700, seed=1)
    expected = model.probabilities(features, folds)
    order = np.random.default_rng(2).permutation(len(features))[:333]
    columns = features.columns[::-1]
    assert np.array_equal(
        model.probabilities(features.iloc[order][columns], folds[order]), expected[order]
    )
    assert model.probabilities(features[:0], folds[:0]).shape == (0,)
    assert expected.dtype == np.float32


def test_probabilities_are_those_of_the_pairs(model: PairModel) -> None:
    features, same, _ = pairs_of(4000, seed=3)
    found = model.probabilities(features)
    band = np.digitize(found, [0.2, 0.4, 0.6, 0.8])
    for n in range(5):
        assert abs(found[band == n].mean() - same[band == n].mean()) < 0.1
    assert ((found > 0.5) == same).mean() > 0.8


def test_more_similar_pairs_are_never_less_probable(model: PairModel) -> None:
    features, _, _ = pairs_of(300, seed=4)
    assert {name: monotone_of(name) for name in SIGNS} == SIGNS
    for name, sign in SIGNS.items():
        steps = np.linspace(0, 2, 21, dtype=np.float32)
        curves = np.stack([model.probabilities(features.assign(**{name: x})) for x in steps])
        change = np.diff(curves, axis=0)
        assert np.abs(change).max() > 0
        assert sign == 0 or (sign * change >= -1e-7).all(), name


def test_only_absolute_similarities_have_a_direction() -> None:
    rising = ("score_image", "characters", "averaged_text", "model_numbers_shared")
    neither = (
        "score_rank_max", "score_mean_20_min", "averaged_gap_max", "photo_distance",
        "title_words_min", "quantities_one_sided", "feature_score", "feature_x_conflicting",
    )  # fmt: skip
    assert [monotone_of(name) for name in rising] == [1] * len(rising)
    assert [monotone_of(name) for name in neither] == [0] * len(neither)


def test_contributions_sum_to_the_log_odds(model: PairModel) -> None:
    features, _, _ = pairs_of(200, seed=5)
    found = model.contributions(features.iloc[::-1])
    assert list(found.columns) == list(SIGNS)
    assert list(found.index) == list(features.index[::-1])
    each = [
        model.probabilities(features, np.full((len(features), 2), fold, np.int8)).astype(float)
        for fold in range(FOLDS)
    ]
    log_odds = np.mean([np.log(p / (1 - p)) for p in each], axis=0)
    rest = log_odds - found.sort_index().sum(axis=1)
    assert rest.std() < 1e-4
    assert model.contributions(features[:0]).shape == (0, len(SIGNS))


def test_a_saved_model_is_the_same_to_the_bit(model: PairModel, tmp_path: Path) -> None:
    path = tmp_path / "pair_model.json"
    model.save(path)
    read = load(path)
    assert read == model
    features, _, folds = pairs_of(seed=6)
    assert np.array_equal(read.probabilities(features, folds), model.probabilities(features, folds))
    assert read.contributions(features[:20]).equals(model.contributions(features[:20]))
    read.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def sealed(path: Path, content: dict) -> None:
    """Write a file whose checksum is right, whatever its content."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    write_json(path, content | {"sha256": sha256_json(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["score"] * 5}, "features"),
        ({"features": []}, "features"),
        ({"features": [1, 2, 3, 4, 5]}, "features"),
        ({"monotone": [1, 1, -1, 0]}, "monotone"),
        ({"monotone": [1, 1, -1, 0, 2]}, "monotone"),
        ({"monotone": [True, 1, -1, 0, 0]}, "monotone"),
        ({"boosters": []}, "boosters are not 5"),
        ({"boosters": ["tree"] * FOLDS}, "booster 0 is not the text"),
        ({"boosters": {"0": "tree"}}, "boosters are not 5"),
        ({"fitted_on": {"queries": 1}}, "fitted_on"),
        ({"fitted_on": None}, "fitted_on"),
        ({"lightgbm_version": None}, "lightgbm_version"),
    ],
)
def test_a_file_that_is_no_model_is_named(
    model: PairModel, tmp_path: Path, change: dict, message: str
) -> None:
    path = tmp_path / "pair_model.json"
    model.save(path)
    sealed(path, json.loads(path.read_text()) | change)
    with pytest.raises(Corrupt, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_damaged_file_is_named(model: PairModel, tmp_path: Path) -> None:
    path = tmp_path / "pair_model.json"
    model.save(path)
    text = path.read_text()
    digit = text.index("leaf_value=") + len("leaf_value=-0.") + 4
    changed = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    for damaged in (text[: len(text) // 2], "", changed):
        path.write_text(damaged)
        with pytest.raises(Corrupt, match=r"pair_model\.json"):
            load(path)
    for other in ("[]", '{"threshold": 0.5}', text.replace('"format": 1', '"format": 99')):
        path.write_text(other)
        with pytest.raises(BadInput, match=r"pair_model\.json"):
            load(path)
    path.unlink()
    with pytest.raises(BadInput, match="not found"):
        load(path)


def hostile(text: str, find: str, replacement: str) -> str:
    """The text with a changed first tree whose size in the header is right all the same."""
    start, end = text.index(find), text.index("\n", text.index(find))
    line = text[start:end]
    signs = [int(sign) for sign in SIGNS.values()]
    trees = booster_text.trees_of(text)
    trees[0] = trees[0].replace(line, replacement)
    return booster_text.render(trees, signs)


@pytest.mark.parametrize(
    ("find", "replacement"),
    [
        ("left_child=", "left_child=" + " ".join(["999999"] * 6)),
        ("left_child=", "left_child=" + " ".join(["0"] * 6)),
        ("right_child=", "right_child=" + " ".join(["-99999"] * 6)),
        ("split_feature=", "split_feature=" + " ".join(["500000"] * 6)),
        ("split_feature=", "split_feature=" + " ".join(["-1"] * 6)),
        ("decision_type=", "decision_type=" + " ".join(["1"] * 6)),
        ("threshold=", "threshold=1"),
        ("leaf_value=", "leaf_value=" + " ".join(["nan"] * 7)),
        ("leaf_value=", "leaf_value=" + " ".join(["1e+999"] * 7)),
        ("leaf_count=", "leaf_count=" + " ".join(["0"] * 7)),
        ("num_leaves=", "num_leaves=2000000000"),
        ("num_cat=", "num_cat=7"),
        ("is_linear=", "is_linear=1"),
    ],
)
def test_a_hostile_booster_is_never_read(
    model: PairModel, tmp_path: Path, find: str, replacement: str
) -> None:
    path = tmp_path / "pair_model.json"
    text = hostile(model.boosters[0], find, replacement)
    assert text != model.boosters[0]
    replace(model, boosters=(text, *model.boosters[1:])).save(path)
    with pytest.raises(Corrupt, match=r"pair_model\.json: booster 0 .* in tree 0"):
        load(path)


HOSTILE_TRIALS = """
import sys
from pathlib import Path
import numpy as np
from dist_train.decisions import booster_text
from dist_train.decisions.pair_model import load
model = load(Path(sys.argv[1]))
import lightgbm
draw, table = np.random.default_rng(0), np.random.default_rng(1).normal(size=(50, 5))
text, read, changed = model.boosters[0], 0, b"0123456789-. e=\\n"
text = booster_text.render(booster_text.trees_of(text)[:3], model.monotone)
for _ in range(3000):
    letters = bytearray(text.encode())
    for _ in range(draw.integers(1, 4)):
        at, kind = draw.integers(len(letters)), draw.integers(3)
        if kind == 0:
            letters[at] = changed[draw.integers(len(changed))]
        elif kind == 1:
            del letters[at : at + draw.integers(1, 30)]
        else:
            letters[at:at] = letters[(b := draw.integers(len(letters))) : b + draw.integers(1, 30)]
    if not booster_text.fault_of(letters.decode(), model.monotone):
        read += 1
        booster = lightgbm.Booster(model_str=letters.decode())
        assert np.isfinite(booster.predict(table)).all()
        booster.predict(table, pred_contrib=True)
print(read)
"""


def test_no_change_of_a_booster_that_passes_ends_the_process(
    model: PairModel, tmp_path: Path
) -> None:
    model.save(tmp_path / "pair_model.json")
    command = [sys.executable, "-c", HOSTILE_TRIALS, str(tmp_path / "pair_model.json")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert found.returncode == 0, found.stderr
    assert 30 < int(found.stdout) < 2900


def test_a_tree_without_a_split_is_read(tmp_path: Path) -> None:
    features, same, folds = pairs_of(60)
    small = fitted(features, same, folds)
    assert "num_leaves=1\n" in small.boosters[0]
    small.save(tmp_path / "pair_model.json")
    assert load(tmp_path / "pair_model.json") == small
    assert len(np.unique(small.probabilities(features))) >= 1


def test_missing_features_are_named(model: PairModel) -> None:
    features, _, _ = pairs_of(20)
    model.check_features([*SIGNS, "another"])
    with pytest.raises(BadInput, match=r"old/pair_model.json: .*: words, feature_price; give"):
        model.check_features(["score", *list(SIGNS)[2:4]], Path("old/pair_model.json"))
    with pytest.raises(BadInput, match="words"):
        model.probabilities(features.drop(columns="words"))


def test_folds_depend_on_the_label_alone() -> None:
    labels = np.array([f"product {n}" for n in range(2000)])
    folds = fold_of_products(labels)
    assert np.array_equal(fold_of_products(labels[::-7]), folds[::-7])
    assert np.array_equal(fold_of_products(np.tile(labels.astype(object), 2)), np.tile(folds, 2))
    assert np.array_equal(fold_of_products(np.arange(50)), fold_of_products(
        np.arange(50).astype(str)
    ))  # fmt: skip
    assert list(fold_of_products(np.array(["A1", "ü", "99"]))) == [2, 4, 1]
    assert np.bincount(folds, minlength=FOLDS).min() > 330
    assert folds.dtype == np.int8


def test_folds_are_even_whatever_another_hash_has_chosen() -> None:
    """The queries of a large catalogue are the products of the lowest hashes of their labels."""
    labels = np.array([f"{n:x}" for n in range(20_000)], object)
    chosen = labels[pd.util.hash_array(labels) % 5 == 0]
    assert np.bincount(fold_of_products(chosen), minlength=FOLDS).min() > 700


def test_too_few_labels_are_explained() -> None:
    _, same, folds = pairs_of(200)
    assert fitting_obstacle(LEAST_PRODUCTS, same, folds) == ""
    few = fitting_obstacle(LEAST_PRODUCTS - 1, same, folds)
    assert few.startswith("No pair model is fitted: it takes 20 val products")
    assert "here are 19; the plain score decides" in few
    same &= (folds == 3).any(axis=1)
    alike = fitting_obstacle(LEAST_PRODUCTS, same, folds)
    assert f": {same.sum()} of {(folds >= 0).any(axis=1).sum()} candidate pairs" in alike
    with pytest.raises(ValueError, match="fold 3 leaves"):
        fit(pairs_of(200)[0], same, folds, queries=40, products=20)
