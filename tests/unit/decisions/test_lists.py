"""Match lists written piece by piece: the same tables as from all pairs at once, in any cut."""

import numpy as np
import pandas as pd
import pytest

from dist_train.decisions import groups, match_lists
from dist_train.decisions.match_lists import read_postings, write_groups, write_lists
from dist_train.distributed.stage import PAIRS
from dist_train.matching import pairs as joined
from dist_train.matching.pairs import PairSet
from shards.storage import stage_files
from shards.storage.errors import Corrupt
from shards.storage.files import write_json, write_parquet
from tests.support.match_tables import groups_table, matches_table

N, THRESHOLD = 400, 0.5


@pytest.fixture
def case(tmp_path):
    """Pairs in seven files, with a hub and a rejected posting; rows in another order."""
    rng = np.random.default_rng(0)
    row = np.r_[rng.permutation(N), -1]
    postings = pd.DataFrame({"posting_id": [f"p{n}" for n in range(N + 1)], "row": row})
    code = np.unique(np.r_[rng.integers(0, N * N, 900), np.arange(N) + 7 * N])
    i, j = np.divmod(code, N)
    i, j = np.minimum(i, j), np.maximum(i, j)
    _, first = np.unique(i * N + j, return_index=True)
    pairs = pd.DataFrame({"i": i[first], "j": j[first]}).query("i < j").reset_index(drop=True)
    pairs["score"] = rng.choice(np.float32([0.3, 0.5, 0.7, 0.9]), len(pairs))
    write_parquet(tmp_path / "items.parquet", postings)
    stage_files.begin(tmp_path / "joined", PAIRS, {}, {})
    for number, some in enumerate(np.array_split(rng.permutation(len(pairs)), 7)):
        write_parquet(tmp_path / f"joined/pairs/{number:05d}.parquet", pairs.iloc[some])
    proof = {"score_floor": 0.3, "weights": {"image": 1.0}}
    write_json(tmp_path / "joined/proof.json", proof)
    files = [*tmp_path.glob("joined/pairs/*"), tmp_path / "joined/proof.json"]
    stage_files.finish(tmp_path / "joined", {}, files)
    return tmp_path, postings, pairs


def lists_of(folder, pairs):
    """The lists, and the components of the matches as groups, in `folder`; the counts."""
    degree = np.bincount(np.r_[pairs.i, pairs.j], minlength=N)
    found, together = read_postings(folder / "items.parquet"), groups.Groups(N + 1)

    def accepted():
        for batch in PairSet(folder / "joined").batches():
            matches = batch[batch.score >= np.float32(THRESHOLD)]
            together.join(matches.i.to_numpy(), matches.j.to_numpy())
            yield matches

    counts = write_lists(accepted(), folder, found, degree)
    write_groups(folder / "groups.parquet", found, together.numbers())
    return counts


@pytest.mark.parametrize(
    ("piece", "some", "batch"), [(10**6, 10**6, 10**6), (64, 90, 30), (1, 7, 1)]
)
def test_pieces_give_what_all_pairs_give(case, monkeypatch, piece, some, batch):
    folder, postings, pairs = case
    monkeypatch.setattr(match_lists, "PIECE", piece)
    monkeypatch.setattr(match_lists, "POSTINGS", some)
    monkeypatch.setattr(joined, "BATCH", batch)
    counts = lists_of(folder, pairs)
    accepted = pairs[pairs.score >= np.float32(THRESHOLD)]
    assert counts == {"postings": N + 1, "pairs": len(pairs), "matches": len(accepted)}
    wanted = matches_table(postings, accepted)
    table = pd.read_parquet(folder / "matches.parquet")
    degree = np.bincount(np.r_[pairs.i, pairs.j], minlength=N)
    assert table.degree.tolist() == [*degree[postings.row[:-1]], 0]
    for name in ("matches", "scores"):
        assert list(map(list, table[name])) == list(map(list, wanted[name]))
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "groups.parquet"), groups_table(postings, accepted)
    )
    lines = [f"{own},{' '.join(found)}" for own, found in zip(wanted.posting_id, wanted.matches)]  # noqa: B905
    assert (folder / "submission.csv").read_text().splitlines() == ["posting_id,matches", *lines]
    assert not (folder / ".work").exists()


def reached(items: int, i: np.ndarray, j: np.ndarray) -> list[int]:
    """Number of each item's group by a walk along the pairs, the groups by their first item."""
    beside = [[] for _ in range(items)]
    for one, other in zip(i.tolist(), j.tolist(), strict=True):
        beside[one].append(other)
        beside[other].append(one)
    number = {}
    for first in range(items):
        fresh, ahead = max(number.values(), default=-1) + 1, [first] * (first not in number)
        while ahead:
            here = ahead.pop()
            if here not in number:
                number[here] = fresh
                ahead += beside[here]
    return [number[item] for item in range(items)]


def test_groups_joined_in_any_batches_are_the_components():
    rng = np.random.default_rng(1)
    i, j = rng.integers(0, 3000, (2, 2500))
    wanted = reached(3000, i, j)
    assert 300 < len(set(wanted)) < 2000
    for size in (1, 50, 2500):
        found = groups.Groups(3000)
        for start in range(0, 2500, size):
            found.join(i[start : start + size], j[start : start + size])
            if size == 50:
                found._merge()
        np.testing.assert_array_equal(found.numbers(), wanted)


def test_groups_are_numbered_by_their_first_posting_whatever_the_library_says(monkeypatch):
    """SciPy promises no order of the numbers it gives to components."""
    given = groups.connected_components

    def turned(graph, **options):
        count, labels = given(graph, **options)
        return count, np.random.default_rng(0).permutation(count)[labels]

    monkeypatch.setattr(groups, "connected_components", turned)
    i, j = np.array([7, 6, 2, 9]), np.array([1, 3, 6, 8])
    found = groups.Groups(10)
    found.join(i, j)
    assert found.numbers().tolist() == [0, 1, 2, 2, 3, 4, 2, 1, 5, 5]


def test_a_broken_file_of_pairs_is_named(case):
    folder, _, pairs = case
    path = folder / "joined/pairs/00003.parquet"
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(Corrupt, match=r"pairs/00003\.parquet"):
        lists_of(folder, pairs)
