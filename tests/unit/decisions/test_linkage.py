"""Groups by average linkage, beside plain means over all pairs of clusters and beside SciPy's."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from dist_train.decisions.linkage import (
    NO_LINKS,
    STEP,
    Merges,
    check_links,
    choose_cut,
    groups_at,
    merges,
    read_links,
)
from dist_train.evaluation.labelled import CatalogueLabels
from shards.storage.errors import BadInput

Merge = tuple[int, int, float]


def plain(
    items: int, pairs: dict[tuple[int, int], float], least: float, most: int = 10**9,
    together: np.ndarray = NO_LINKS, apart: np.ndarray = NO_LINKS,
) -> tuple[list[Merge], set[frozenset[int]]]:  # fmt: skip
    """The merges behind the links, and the groups: every mean of every step taken anew."""
    clusters = [{item} for item in range(items)]
    for one, other in together:
        both = [cluster for cluster in clusters if cluster & {one, other}]
        clusters = [cluster for cluster in clusters if cluster not in both] + [set.union(*both)]
    done = []
    while True:
        found = []
        for a, b in combinations(sorted(clusters, key=min), 2):
            cross = [(min(x, y), max(x, y)) for x in a for y in b]
            mean = sum(pairs.get(pair, 0.0) for pair in cross) / len(cross)
            forbidden = {tuple(sorted(pair)) for pair in apart.tolist()} & set(cross)
            if mean >= least and len(a) + len(b) <= most and not forbidden:
                found.append((-mean, min(a), min(b), a, b))
        if not found:
            return done, {frozenset(cluster) for cluster in clusters}
        mean, first, second, a, b = min(found, key=lambda one: one[:3])
        done.append((first, second, -mean))
        clusters = [cluster for cluster in clusters if cluster not in (a, b)] + [a | b]


def arrays(pairs: dict[tuple[int, int], float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """i, j and probability (P,) of pairs."""
    ends = np.array(list(pairs), np.int64).reshape(-1, 2)
    return ends[:, 0], ends[:, 1], np.array(list(pairs.values()))


def rows_of(found: Merges) -> list[Merge]:
    return list(zip(*(column.tolist() for column in found[:3]), strict=True))


def sets(group: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(group == number).tolist()) for number in np.unique(group)}


def random_pairs(
    seed: int, items: int, share: float, levels: int = 2**20
) -> dict[tuple[int, int], float]:
    """A share of all pairs, with probabilities of so many levels, which are multiples of STEP."""
    draw = np.random.default_rng(seed)
    return {
        pair: float(draw.integers(0, levels + 1)) / levels
        for pair in combinations(range(items), 2)
        if draw.random() < share
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("share", "levels"), [(1.0, 2**20), (0.3, 2**20), (0.5, 4), (1.0, 2)])
def test_merges_are_those_of_plain_means(seed: int, share: float, levels: int) -> None:
    """With few levels many means are equal, and the lower first items decide."""
    pairs = random_pairs(seed, 18, share, levels)
    found = merges(18, *arrays(pairs), least=0.05)
    expected, groups = plain(18, pairs, 0.05)
    assert rows_of(found) == expected
    assert sets(groups_at(found, 18, 0.05)) == groups


@pytest.mark.parametrize("seed", range(4))
def test_cuts_of_a_complete_graph_are_those_of_scipy(seed: int) -> None:
    """A pair that is not given counts 0, which is a distance of 1 there."""
    items, square = 120, np.zeros((120, 120))
    pairs = random_pairs(seed, items, [1.0, 0.5, 0.2, 0.05][seed])
    for (i, j), probability in pairs.items():
        square[i, j] = square[j, i] = probability
    tree = linkage(squareform(1 - square, checks=False), "average")
    found = merges(items, *arrays(pairs), least=0.02)
    for cut in (0.02, 0.1, 0.25, 0.4, 0.5, 0.75, 0.99):
        theirs = fcluster(tree, 1 - cut, "distance")
        assert sets(groups_at(found, items, cut)) == sets(theirs), cut


def test_what_lies_between_components_does_not_count_and_within_them_does() -> None:
    pairs = {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.125, (2, 3): 0.25, (3, 4): 0.75}
    found = merges(6, *arrays(pairs), least=0.5)
    assert rows_of(found) == [
        (0, 1, np.rint(0.9 / STEP) * STEP),
        (3, 4, 0.75),
        (0, 2, (np.rint(0.9 / STEP) * STEP + 0.125) / 2),
    ]
    assert groups_at(found, 6, 0.5).tolist() == [0, 0, 0, 1, 1, 2]
    assert groups_at(found, 6, 0.6).tolist() == [0, 0, 1, 2, 2, 3]
    assert groups_at(found, 6, 0.5).dtype == np.int64


def test_a_group_has_at_most_so_many_items() -> None:
    pairs = dict.fromkeys(combinations(range(5), 2), 0.9) | {(4, 5): 1.0}
    expected_of = (
        (1, [0, 1, 2, 3, 4, 5]),
        (2, [0, 0, 1, 1, 2, 2]),
        (3, [0, 0, 0, 1, 1, 1]),
        (9, [0] * 6),
    )
    for most, expected in expected_of:
        found = merges(6, *arrays(pairs), least=0.05, most=most)
        assert groups_at(found, 6, 0.05).tolist() == expected


def test_links_put_items_together_and_keep_them_apart_through_chains() -> None:
    pairs = {(0, 1): 0.9, (1, 2): 0.8, (3, 4): 0.7, (4, 5): 0.6}
    together, apart = np.array([[0, 5], [5, 6], [6, 7]]), np.array([[1, 6]])
    found = merges(8, *arrays(pairs), 0.05, most=3, together=together, apart=apart)
    assert rows_of(found)[:3] == [(0, 5, np.inf), (0, 6, np.inf), (0, 7, np.inf)]
    # Four items stay together although three are the most, so that no other joins them.
    assert groups_at(found, 8, 0.05).tolist() == [0, 1, 1, 2, 2, 0, 0, 0]
    assert groups_at(found, 8, 1.0).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_links_stand_without_any_pair() -> None:
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    found = merges(3, *nothing, 0.05, together=np.array([[0, 2], [0, 2]]), apart=np.array([[1, 2]]))
    assert groups_at(found, 3, 0.9).tolist() == [0, 1, 0]
    assert groups_at(merges(3, *nothing, 0.05), 3, 0.05).tolist() == [0, 1, 2]


def test_contradicting_links_are_refused_with_their_names() -> None:
    together, apart = np.array([[0, 1], [3, 1]]), np.array([[0, 2], [0, 3]])
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    with pytest.raises(BadInput, match=r"rows 0 and 3 .* through others"):
        merges(4, *nothing, 0.05, together=together, apart=apart)
    with pytest.raises(BadInput, match=r"'a' and 'd' .*\(1 such pairs\)"):
        check_links(4, together, apart, pd.Series(list("abcd")))
    check_links(4, together, apart[:1])


graphs = st.integers(2, 8).flatmap(
    lambda items: st.tuples(
        st.just(items),
        st.dictionaries(
            st.sampled_from(list(combinations(range(items), 2))),
            st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.7, 1.0]) | st.floats(0, 1, width=32),
        ),
        st.lists(st.sampled_from(list(combinations(range(items), 2))), max_size=2),
        st.lists(st.sampled_from(list(combinations(range(items), 2))), max_size=3),
    )
)


@settings(max_examples=300, deadline=None)
@given(graphs, st.sampled_from([1, 2, 3, 5, None]), st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.7, 1]))
def test_groups_at_a_cut_are_those_of_a_run_down_to_it(
    graph: tuple[int, dict, list, list], most: int | None, cut: float
) -> None:
    items, pairs, together, apart = graph
    links = [np.array(pairs, np.int64).reshape(-1, 2) for pairs in (together, apart)]
    try:
        check_links(items, *links)
    except BadInput:
        links[1] = NO_LINKS
    low = merges(items, *arrays(pairs), 0.05, most, *links)
    high = merges(items, *arrays(pairs), cut, most, *links)
    assert (groups_at(low, items, cut) == groups_at(high, items, cut)).all()
    assert rows_of(high) == [row for row in rows_of(low) if row[2] >= high.least]
    assert (np.diff(low.mean[np.isfinite(low.mean)]) <= 0).all()
    rounded = {pair: np.rint(one / STEP) * STEP for pair, one in pairs.items()}
    expected = plain(items, rounded, high.least, most or 10**9, *links)
    assert sets(groups_at(high, items, cut)) == expected[1]


def test_the_order_of_pairs_and_of_their_blocks_does_not_matter() -> None:
    draw = np.random.default_rng(0)
    key = np.unique(draw.integers(0, 300**2, 4000))
    key = key[key // 300 < key % 300]
    i, j, probability = key // 300, key % 300, draw.random(len(key), np.float32)
    expected = merges(300, i, j, probability, 0.05, most=40)
    assert len(expected.mean) > 200
    for order in (np.arange(len(i))[::-1], draw.permutation(len(i))):
        found = merges(300, i[order], j[order], probability[order], 0.05, most=40)
        assert rows_of(found) == rows_of(expected)


def test_a_cut_below_the_run_is_refused() -> None:
    found = merges(2, np.array([0]), np.array([1]), np.array([0.3]), 0.2)
    with pytest.raises(ValueError, match="end at"):
        groups_at(found, 2, 0.1)


def test_the_cut_with_the_best_f1_of_the_queries_is_chosen() -> None:
    """Products a (3) and b (2), a posting without a label, one that was rejected."""
    labels = CatalogueLabels.of(pd.Series(["a", "a", "a", "b", "b", "", "b"]))
    pairs = {(0, 1): 0.9, (0, 2): 0.6, (1, 2): 0.6, (3, 4): 0.5, (2, 3): 0.9, (4, 5): 0.3}
    found = merges(6, *arrays(pairs), least=0.05, apart=np.array([[2, 3]]))
    cut, f1 = choose_cut(found, np.array([0, 3]), labels)
    # a complete; b has two of its three, and a posting without a label neither helps nor harms.
    assert cut == 0.5
    assert f1 == pytest.approx((1 + 2 * 2 / (2 + 3)) / 2)
    # The end of a run is the lowest cut.
    assert choose_cut(merges(6, *arrays(pairs), 0.61), np.array([0]), labels)[0] >= 0.65


def write(path: Path, table: pd.DataFrame) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


IDS = pd.Series(["007", "8", "p 3", "ü"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_links_are_read_as_rows(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"note": "x", "posting_id_1": ["ü", "8"], "posting_id_2": ["007", "p 3"]})
    found = read_links(write(tmp_path / f"links{suffix}", table), IDS)
    assert found.tolist() == [[0, 3], [1, 2]]
    assert found.dtype == np.int64
    assert read_links(write(tmp_path / f"none{suffix}", table[:0]), IDS).shape == (0, 2)


def test_ids_that_are_numbers_in_parquet_are_read_as_text(tmp_path: Path) -> None:
    table = pd.DataFrame({"posting_id_1": [2**60 + 1], "posting_id_2": [8]})
    ids = pd.Series([str(2**60), str(2**60 + 1), "8"])
    assert read_links(write(tmp_path / "links.parquet", table), ids).tolist() == [[1, 2]]
    floats = pd.DataFrame({"posting_id_1": [17.0, None], "posting_id_2": ["8", "9"]})
    with pytest.raises(BadInput, match="row 2: posting_id_1 ''"):
        read_links(write(tmp_path / "floats.parquet", floats), pd.Series(["17", "8", "9"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("posting_id_1,posting_id_2\n007,8\n8,7\n9,8\n", r"row 2: posting_id_2 '7'.*\(2 such"),
        ("posting_id_1,posting_id_2\n,8\n", "row 1: posting_id_1 ''"),
        ("posting_id_1,posting_id_2\n007,8\n8,8\n", "row 2: posting '8' is linked with itself"),
        ("posting_id_1,other\n007,8\n", "no column posting_id_2 .found: posting_id_1, other"),
        ("posting_id_1,posting_id_2\n007,8,9\n", "row 1 .line 2.: 3 cells"),
        ("", "cannot be read|no column"),
    ],
)
def test_bad_links_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "links.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        read_links(path, IDS)
    assert str(path) in str(error.value)


def test_files_of_links_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "links.parquet").write_text("no Parquet")
    with pytest.raises(BadInput, match="cannot be read"):
        read_links(tmp_path / "links.parquet", IDS)
    for name in ("links.xlsx", "absent.csv"):
        with pytest.raises(BadInput, match="no file of one of the kinds"):
            read_links(tmp_path / name, IDS)
