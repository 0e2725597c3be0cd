"""Matches and groups of a match directory, against sets and searches written out here."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.decisions.groups import Groups
from dist_train.decisions.match_lists import read_matches
from tests.support.match_tables import groups_table, matches_table


@st.composite
def accepted(draw):
    """Postings of which some are rejected, their rows in another order, and accepted pairs."""
    total = draw(st.integers(1, 10))
    packed = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    rows = np.full(total, -1)
    rows[packed] = draw(st.permutations(range(sum(packed))))
    every = [(i, j) for i in range(sum(packed)) for j in range(i + 1, sum(packed))]
    chosen = draw(st.permutations([pair for pair in every if draw(st.integers(0, 3)) == 0]))
    scores = [draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])) for _ in chosen]
    postings = pd.DataFrame({"posting_id": [f"p{n}" for n in range(total)], "row": rows})
    pairs = pd.DataFrame({
        "i": np.array([i for i, _ in chosen], np.int64),
        "j": np.array([j for _, j in chosen], np.int64),
        "score": np.array(scores, np.float32),
    })  # fmt: skip
    return postings, pairs


def accepted_pairs(matches: pd.DataFrame, posting_ids) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that are read of a matches.parquet."""
    with tempfile.TemporaryDirectory() as folder:
        matches.to_parquet(f"{folder}/matches.parquet")
        found = read_matches(Path(folder) / "matches.parquet", posting_ids)
    return found.i.to_numpy(), found.j.to_numpy()


def names_by_row(postings: pd.DataFrame) -> dict[int, str]:
    return {r: p for p, r in zip(postings.posting_id, postings.row, strict=True) if r >= 0}


def score_of(postings: pd.DataFrame, pairs: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Score of every ordered match by posting ids."""
    name = names_by_row(postings)
    out = {}
    for i, j, score in zip(pairs.i, pairs.j, pairs.score, strict=True):
        out[name[i], name[j]] = out[name[j], name[i]] = float(score)
    return out


@settings(max_examples=50, deadline=None)
@given(accepted())
def test_matches_are_the_accepted_pairs_seen_from_both_sides(case):
    postings, pairs = case
    table = matches_table(postings, pairs)
    wanted = score_of(postings, pairs)
    assert table.posting_id.tolist() == postings.posting_id.tolist()
    said = {}
    for own, matches, scores in zip(table.posting_id, table.matches, table.scores, strict=True):
        assert (matches[0], scores[0]) == (own, 1.0)
        assert list(scores[1:]) == sorted(scores[1:], reverse=True)
        assert len(set(matches)) == len(matches) == len(scores)
        said |= {(own, other): s for other, s in zip(matches[1:], scores[1:], strict=True)}
    assert said == wanted


@settings(max_examples=50, deadline=None)
@given(accepted())
def test_a_rejected_posting_stands_alone(case):
    postings, pairs = case
    matches = matches_table(postings, pairs).set_index("posting_id")
    groups = groups_table(postings, pairs).set_index("posting_id").group_id
    for own in postings.posting_id[postings.row < 0]:
        assert matches.matches[own] == [own]
        assert (groups == groups[own]).sum() == 1


@settings(max_examples=50, deadline=None)
@given(accepted())
def test_groups_are_what_a_search_along_the_matches_reaches(case):
    postings, pairs = case
    table = groups_table(postings, pairs)
    assert table.posting_id.tolist() == postings.posting_id.tolist()
    edges = score_of(postings, pairs)
    group = dict(zip(table.posting_id, table.group_id, strict=True))
    for own in postings.posting_id:
        reached, ahead = {own}, [own]
        while ahead:
            here = ahead.pop()
            new = {b for a, b in edges if a == here} - reached
            reached |= new
            ahead += new
        assert {other for other in group if group[other] == group[own]} == reached
    first_seen = list(dict.fromkeys(table.group_id))
    assert first_seen == list(range(len(first_seen)))


@settings(max_examples=50, deadline=None)
@given(accepted())
def test_accepted_pairs_are_the_inverse_of_matches(case):
    postings, pairs = case
    packed = postings[postings.row >= 0]
    i, j = accepted_pairs(matches_table(postings, pairs), packed.sort_values("row").posting_id)
    assert (i < j).all()
    given_pairs = sorted(zip(pairs.i, pairs.j, strict=True))
    assert sorted(zip(i, j, strict=True)) == given_pairs


def test_accepted_pairs_are_those_within_the_postings():
    names = pd.Series(["d", "a", "c"])
    lists = {
        "posting_id": list("abcd"),
        "matches": [list("abd"), list("ba"), list("cd"), list("dac")],
        "scores": [[1.0, 0.5, 0.75], [1.0, 0.5], [1.0, 0.25], [1.0, 0.75, 0.25]],
    }
    i, j = accepted_pairs(pd.DataFrame(lists), names)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2)]


@settings(max_examples=50, deadline=None)
@given(accepted(), st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_means_nothing(case, random):
    postings, pairs = case
    order = list(range(len(pairs)))
    random.shuffle(order)
    mixed = pairs.iloc[order].reset_index(drop=True)
    for table in (matches_table, groups_table):
        pd.testing.assert_frame_equal(table(postings, pairs), table(postings, mixed))


def test_of_equal_scores_the_lower_row_comes_first():
    postings = pd.DataFrame({"posting_id": list("cab"), "row": [2, 0, 1]})
    pairs = pd.DataFrame({"i": [1, 0], "j": [2, 2], "score": np.float32([0.5, 0.5])})
    table = matches_table(postings, pairs).set_index("posting_id")
    assert table.matches["c"] == ["c", "a", "b"]


def test_matches_survive_parquet(tmp_path):
    postings = pd.DataFrame({"posting_id": ["x1", "x2", "x3"], "row": [0, 1, -1]})
    pairs = pd.DataFrame({"i": [0], "j": [1], "score": np.float32([0.5])})
    matches_table(postings, pairs).to_parquet(tmp_path / "m.parquet")
    found = read_matches(tmp_path / "m.parquet", pd.Series(["x1", "x2"]))
    assert found.to_numpy().tolist() == [[0, 1, 0.5]]


def test_only_the_best_of_a_batch_are_kept(tmp_path):
    postings = pd.DataFrame({"posting_id": list("abc"), "row": [0, 1, 2]})
    pairs = pd.DataFrame({"i": [0, 0, 1], "j": [1, 2, 2], "score": np.float32([0.5, 0.75, 0.25])})
    matches_table(postings, pairs).to_parquet(tmp_path / "m.parquet")
    found = read_matches(tmp_path / "m.parquet", postings.posting_id, best=2)
    assert found.to_numpy().tolist() == [[0, 2, 0.75], [0, 1, 0.5]]


def test_groups_of_a_long_chain_and_of_nothing():
    chain, none = Groups(5), np.zeros(0, np.int64)
    chain.join(np.array([3, 2, 1]), np.array([4, 3, 2]))
    assert chain.numbers().tolist() == [0, 1, 1, 1, 1]
    alone = Groups(3)
    assert alone.numbers().tolist() == [0, 1, 2]
    alone.join(none, none)
    assert alone.numbers().tolist() == [0, 1, 2]
