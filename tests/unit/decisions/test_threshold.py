"""The threshold that is chosen is the best one for val items matched with the whole catalogue."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config.options import MatchConfig
from dist_train.decisions.threshold import (
    Given,
    QueryMatches,
    Threshold,
    decide_threshold,
    given_threshold,
    queries_of,
)
from dist_train.evaluation.f1_curve import F1Curve
from dist_train.evaluation.labelled import CatalogueLabels, labelled_rows

CHOOSE = given_threshold(MatchConfig())


def items_of(splits: list[str], labels: list[str], photos: list[int] | None = None):
    """A table of items as an embedding set has it."""
    return pd.DataFrame({
        "posting_id": [f"p{n}" for n in range(len(splits))], "split": splits,
        "label_group": labels, "photo_group": photos or [-1] * len(splits),
    })  # fmt: skip


def decide(
    items: pd.DataFrame,
    pairs: pd.DataFrame,
    score_floor: float,
    given: Given,
    precision: float | None = None,
) -> Threshold:
    """As match calls it, with the pairs of val items and others that are left out by it."""
    labels, queries = CatalogueLabels.of(items.label_group), queries_of(items, len(pairs))
    matches = QueryMatches.of(queries, labels, pairs)
    return decide_threshold(queries, labels, matches, score_floor, given, precision)


def wrong_shares(seen: dict[float, list[int]], ratio: float) -> dict[float, float]:
    """The part of unknown matches of each score that counts as wrong, never rising with the score.

    The parts of matches known to be wrong by the min-max formula of isotonic regression: of a score
    the highest of the lowest means over ranges of scores that hold it.
    seen: for each score how many matches are wrong, and how many unknown; ratio: postings without
    a label to one with a label.
    """
    scores = sorted(seen, reverse=True)

    def mean(first: int, last: int) -> float:
        wrong, unknown = np.sum([seen[scores[n]] for n in range(first, last + 1)], axis=0)
        return wrong / max(wrong + unknown, 1)

    shares = {}
    for k, score in enumerate(scores):
        part = max(min(mean(a, b) for b in range(k, len(scores))) for a in range(k + 1))
        shares[score] = min(1, ratio * part / (1 - part)) if part < 1 else 1
    return shares


def means(items: pd.DataFrame, pairs: pd.DataFrame, threshold: float) -> tuple[float, float]:
    """Mean F1 and precision of the val items, each matched with every labelled posting, by sets.

    Of pairs with a posting without a label the part counts as wrong that the labelled ones lead to
    expect at that score.
    """
    labels = items.label_group
    labelled = set(np.flatnonzero(labels != ""))
    val = {n for n in labelled if items.split[n] == "val"}
    said: dict[int, dict[int, float]] = {n: {} for n in range(len(items))}
    seen: dict[float, list[int]] = {}
    for one, other, score in zip(pairs.i, pairs.j, pairs.score, strict=True):
        for i, j in ((one, other), (other, one)):
            if i in val and (j not in labelled or labels[i] != labels[j]):
                seen.setdefault(score, [0, 0])[j not in labelled] += 1
            if score >= np.float32(threshold):
                said[i][j] = score
    some_unknown = len(labelled) < len(items)
    shares = wrong_shares(seen, len(items) / len(labelled) - 1) if some_unknown else {}
    found = []
    for n in val:
        product = {m for m in labelled if labels[m] == labels[n]}
        right = 1 + len(said[n].keys() & product)
        wrong = len(said[n].keys() & labelled - product)
        strangers = sum(shares[score] for m, score in said[n].items() if m not in labelled)
        predicted = right + wrong + strangers
        found.append((2 * right / (predicted + len(product)), right / predicted))
    f1, precision = np.mean(found, axis=0)
    return float(f1), float(precision)


def mean_f1(items: pd.DataFrame, pairs: pd.DataFrame, threshold: float) -> float:
    return means(items, pairs, threshold)[0]


@st.composite
def catalogues(draw):
    N = draw(st.integers(2, 10))
    splits = draw(st.lists(st.sampled_from(["val", "val", "train"]), min_size=N, max_size=N))
    labels = draw(st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=N, max_size=N))
    splits[0], labels[0] = "val", "a"
    every = [(i, j) for i in range(N) for j in range(i + 1, N)]
    chosen = [pair for pair in every if draw(st.booleans())]
    scores = [draw(st.sampled_from([0.125, 0.3, 0.31, 0.5, 0.9, 1.0])) for _ in chosen]
    pairs = pd.DataFrame({
        "i": np.array([i for i, _ in chosen], np.int64),
        "j": np.array([j for _, j in chosen], np.int64),
        "score": np.array(scores, np.float32),
    })  # fmt: skip
    return items_of(splits, labels), pairs


@settings(max_examples=60, deadline=None)
@given(catalogues())
def test_the_chosen_threshold_is_the_best_over_distinct_scores(case):
    items, pairs = case
    chosen = decide(items, pairs, 0.1, CHOOSE)
    distinct = [*np.unique(pairs.score), 2.0]
    best = max(mean_f1(items, pairs, score) for score in distinct)
    difference = chosen["over_self_match"]
    assert difference["f1"] == pytest.approx(best - mean_f1(items, pairs, 2.0), abs=1e-5)
    assert difference["low"] <= difference["f1"] + 1e-9 <= difference["high"] + 2e-9
    assert chosen["source"] == "chosen"
    assert chosen["f1"] == pytest.approx(best, abs=1e-5)
    assert mean_f1(items, pairs, chosen["threshold"]) == pytest.approx(best, abs=1e-5)
    val = (items.split == "val") & (items.label_group != "")
    assert chosen["postings"] == len(items)
    assert chosen["labelled"] == (items.label_group != "").sum()
    assert chosen["items"] == val.sum()
    assert chosen["products"] == items.label_group[val].nunique()
    assert chosen["threshold"] == np.float32(chosen["threshold"])


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0]))
def test_the_lowest_threshold_of_a_precision_reaches_it(case, precision):
    items, pairs = case
    chosen = decide(items, pairs, 0.1, CHOOSE, precision)
    least = precision - 1e-12
    reached = [score for score in {*pairs.score} if means(items, pairs, score)[1] >= least]
    lowest = min(reached, default=2.0)
    assert means(items, pairs, chosen["threshold"])[1] >= precision - 1e-9
    labelled, val = (items.label_group != "").to_numpy(), (items.split == "val").to_numpy()
    counted = labelled[pairs.i] & labelled[pairs.j] & (val[pairs.i] | val[pairs.j])
    score = pairs.score[counted]
    accepted, wanted = ((score >= np.float32(t)) for t in (chosen["threshold"], lowest))
    assert accepted.tolist() == wanted.tolist()
    assert chosen["f1"] == pytest.approx(mean_f1(items, pairs, lowest), abs=1e-5)
    assert (chosen["source"], chosen["objective"]) == ("chosen", f"mean precision {precision}")


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.sampled_from([0.3, 0.305, 0.5, 2.0]))
def test_f1_of_each_query_at_a_threshold_has_the_mean_that_is_chosen_by(case, threshold):
    items, pairs = case
    labels, queries = CatalogueLabels.of(items.label_group), queries_of(items, len(pairs))
    f1 = QueryMatches.of(queries, labels, pairs).f1(threshold, labels.sizes[queries])
    assert f1.shape == queries.shape
    assert f1.mean() == pytest.approx(mean_f1(items, pairs, threshold), abs=1e-5)


def test_the_curve_in_the_file_says_the_same():
    rng = np.random.default_rng(0)
    items = items_of(["val"] * 60, [f"g{n // 3}" for n in range(60)])
    i, j = np.triu_indices(60, 1)
    same = (items.label_group[i].to_numpy() == items.label_group[j].to_numpy()) * 0.4
    score = (rng.random(len(i)) * 0.6 + same).astype(np.float32)
    pairs = pd.DataFrame({"i": i, "j": j, "score": score})
    chosen = json.loads(json.dumps(decide(items, pairs, 0.0, CHOOSE)))
    curve = F1Curve.from_json(chosen["curve"])
    assert len(curve.thresholds) <= 1000
    assert curve.best()[1] == pytest.approx(chosen["f1"])
    assert np.float32(curve.best()[0]) == np.float32(chosen["threshold"])
    assert chosen["f1"] == pytest.approx(mean_f1(items, pairs, chosen["threshold"]))
    assert not chosen["at_score_floor"]
    assert (chosen["split"], chosen["score_floor"]) == ("val", 0.0)


def test_a_best_threshold_at_the_score_floor_is_noted():
    items = items_of(["val"] * 4, ["a"] * 4)
    pairs = pd.DataFrame({"i": [0, 1, 2], "j": [1, 2, 3], "score": np.float32([0.9, 0.5, 0.3])})
    assert decide(items, pairs, 0.3, CHOOSE)["at_score_floor"]
    wrong = items_of(["val"] * 4, ["a", "a", "b", "c"])
    assert not decide(wrong, pairs, 0.3, CHOOSE)["at_score_floor"]
    assert not decide(items, pairs, 0.3, Given(0.3, "given"))["at_score_floor"]


def test_a_given_threshold_is_taken_as_it_is(tmp_path):
    items = items_of(["val"] * 3, ["a", "a", "b"])
    pairs = pd.DataFrame({"i": [0, 1], "j": [1, 2], "score": np.float32([0.7, 0.6])})
    given = decide(items, pairs, 0.1, given_threshold(MatchConfig(threshold=0.65)))
    assert (given["source"], given["threshold"]) == ("given", float(np.float32(0.65)))
    assert given["f1"] == pytest.approx(mean_f1(items, pairs, 0.65)) == 1.0
    (tmp_path / "threshold.json").write_text(
        json.dumps(given | {"threshold": 0.55, "weights": {"text": 1.0}})
    )
    config = MatchConfig(threshold_from=tmp_path / "threshold.json")
    read = decide(items, pairs, 0.1, given_threshold(config))
    assert (read["source"], read["threshold"]) == ("file", float(np.float32(0.55)))
    assert read["f1"] == pytest.approx(mean_f1(items, pairs, 0.55))
    assert read["f1"] < 1


def test_without_val_labels_a_given_threshold_has_no_score():
    items = items_of(["train", "test", "unlabelled", "val"], ["a", "b", "", ""])
    pairs = pd.DataFrame({"i": [0], "j": [1], "score": np.float32([0.9])})
    given = decide(items, pairs, 0.1, Given(0.5, "given"))
    assert (given["items"], given["f1"], given["curve"]) == (0, None, None)


def test_strangers_of_other_splits_are_wrong():
    items = items_of(["val", "val", "train"], ["a", "a", "b"])
    pairs = pd.DataFrame({"i": [0, 0], "j": [2, 1], "score": np.float32([0.99, 0.5])})
    chosen = decide(items, pairs, 0.1, CHOOSE)
    # Both val items match one another, and one of them the stranger: (4/5 + 1) / 2.
    assert chosen["f1"] == pytest.approx(0.9)
    assert chosen["threshold"] == 0.5
    alone = decide(items, pairs[:1], 0.1, CHOOSE)
    assert (alone["f1"], alone["threshold"]) == (pytest.approx(2 / 3), pytest.approx(0.99))
    assert alone["threshold"] > np.float32(0.99)


def test_a_posting_that_was_rejected_is_missed():
    items = items_of(["val", "val"], ["a", "a"])
    pairs = pd.DataFrame({"i": [0], "j": [1], "score": np.float32([0.9])})
    labels = CatalogueLabels.of(pd.Series(["a", "a", "a"]))  # the third has no vector row
    queries = queries_of(items, 1)
    matches = QueryMatches.of(queries, labels, pairs)
    chosen = decide_threshold(queries, labels, matches, 0.1, CHOOSE)
    assert chosen["f1"] == pytest.approx(2 * 2 / (2 + 3))


def test_of_many_pairs_whole_products_are_taken(monkeypatch):
    monkeypatch.setattr("dist_train.decisions.threshold.MOST_PAIRS", 600)
    items = items_of(["val"] * 900 + ["train"] * 100, [f"g{n // 3}" for n in range(1000)])
    taken = queries_of(items, 1000)  # a val item of each pair on average 0.9: 300 of 900 items
    assert 250 < len(taken) < 350
    assert set(items.label_group[taken].value_counts()) == {3}
    assert len(queries_of(items, 300)) == 900


def test_items_with_a_twin_in_another_split_may_not_speak():
    splits = ["val", "val", "val", "train", "val", "unlabelled", "test"]
    labels = ["a", "a", "", "b", "a", "", "c"]
    photos = [0, 1, 0, 0, 4, 4, -1]
    items = items_of(splits, labels, photos)
    assert labelled_rows(items, "val").tolist() == [1, 4]
    assert labelled_rows(items, "test").tolist() == [6]


def test_a_near_duplicate_does_not_move_the_threshold():
    items = items_of(["val"] * 4 + ["train"], ["a", "a", "b", "b", "c"], [-1, -1, 2, 3, 2])
    pairs = pd.DataFrame({"i": [0, 2], "j": [1, 3], "score": np.float32([0.8, 0.3])})
    chosen = decide(items, pairs, 0.1, CHOOSE)
    assert (chosen["items"], chosen["products"]) == (3, 2)
    assert 0.3 < chosen["threshold"] <= np.float32(0.8)
