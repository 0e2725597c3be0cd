"""The small parts of the search by themselves: budgets, floors, neighbours, sizes, intervals."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from dist_train.embedding.store import Rows
from dist_train.matching.blocks import join_bounds
from dist_train.matching.faiss_library import EXACT, choose_kind
from dist_train.matching.index import shard_rows
from dist_train.matching.kernels import sum_error
from dist_train.matching.nearest import KthBestScores, Nearest
from dist_train.matching.recall import interval
from dist_train.matching.sampling import coarse_scores, sampled_score_floor
from dist_train.matching.vectors import (
    ItemVectors,
    ModalityVectors,
    read_rows,
    subset,
    vectors_of_array,
)
from shards.storage.errors import BadInput
from tests.unit.matching.test_join import random_vectors, scores_by_definition


def weighted(vectors: dict[str, np.ndarray], weight: float) -> ItemVectors:
    weights = {"image": weight, "text": 1 - weight}
    return ItemVectors(
        {n: ModalityVectors(Rows([r]), r.any(1), weights[n]) for n, r in vectors.items()}
    )


# The floor


@pytest.mark.parametrize("per_item", [1.0, 3.0, 12.5])
def test_the_floor_of_few_items_leaves_the_budget_to_a_thousandth(per_item):
    """Of up to 256 items all are looked at, so nothing is estimated."""
    vectors = random_vectors(200, 8, seed=30, holes=False)
    floor = sampled_score_floor(weighted(vectors, 0.3), per_item)
    scores = scores_by_definition(vectors, 0.3)["score"][np.triu_indices(200, 1)]
    assert floor == pytest.approx(round(floor, 3), abs=1e-12)
    assert (scores >= floor).sum() <= per_item * 200 <= (scores >= floor - 0.001).sum()


def test_copies_never_raise_the_floor_to_one():
    rows = np.repeat(random_vectors(1, 8)["image"], 40, axis=0)
    assert sampled_score_floor(vectors_of_array(rows), 1.0) == 0.999


@pytest.mark.parametrize("weight", [0.3, 0.8])
def test_scores_of_a_sample_are_those_of_float64(weight):
    vectors = random_vectors(70, seed=31)
    item_vectors, some = weighted(vectors, weight), np.array([3, 17, 60, 61])
    truth = scores_by_definition(vectors, weight)["score"][some][:, 20:55]
    found = coarse_scores(subset(item_vectors, some), item_vectors, range(20, 55))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.where(np.isnan(truth), -np.inf, truth), atol=1e-6)


# Neighbours


def test_floors_on_disk_only_rise_and_only_where_they_are_told(tmp_path):
    floors, truth = KthBestScores(tmp_path / "f", 20), np.full(20, -np.inf, np.float32)
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows = np.sort(rng.choice(20, rng.integers(1, 9), replace=False))
        told = rng.random(len(rows)).astype(np.float32)
        floors.raise_to(rows, told)
        for row, value in zip(rows, told, strict=True):
            truth[row] = max(truth[row], value)
        wanted = np.sort(rng.choice(20, 7, replace=False))
        np.testing.assert_array_equal(KthBestScores(tmp_path / "f", 20).read(wanted), truth[wanted])
    np.testing.assert_array_equal(floors.read(np.arange(20)), truth)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch", [1, 7, 400])
def test_the_best_so_far_are_the_best_of_all_in_any_batches(k, batch):
    """By score, then by row number; told twice counts once; below the floor of a row never."""
    rng = np.random.default_rng(batch)
    rows = np.array([2, 3, 5, 8, 13])
    floors = np.float32([-np.inf, 0.5, -np.inf, 0.25, -np.inf])
    items, others = rng.choice(rows[:4], 400), rng.integers(0, 40, 400)
    scores = (others % 7 + items % 2) / np.float32(8)  # ties, and the same for the same pair
    near = Nearest(rows, k, floors)
    for start in range(0, 400, batch):
        cut = slice(start, start + batch)
        near.add(items[cut], others[cut], scores[cut].astype(np.float32))
    wanted, least = [], {}
    for row, floor in zip(rows, floors, strict=True):
        told = {(-s, o) for i, o, s in zip(items, others, scores, strict=True) if i == row}
        best = sorted(pair for pair in told if -pair[0] >= floor)[:k]
        wanted += [(row, other, -score) for score, other in best]
        least[row] = max(floor, -best[-1][0]) if len(best) == k else floor
    table = near.table()
    pd.testing.assert_frame_equal(
        table, pd.DataFrame(wanted, columns=["i", "j", "score"]), check_dtype=False
    )
    assert near.kth_best.tolist() == [least[row] for row in rows]


# Sizes


@pytest.mark.parametrize(
    ("memory", "factory"),
    [
        (4_505_600_000, "Flat"), (4_505_599_999, "SQfp16"), (2_252_800_000, "SQfp16"),
        (2_252_799_999, "IVF4000,SQ8"), (1_126_400_000, "IVF4000,SQ8"),
        (1_126_399_999, "IVF4000,PQ256x8"), (1, "IVF4000,PQ256x8"),
    ],
)  # fmt: skip
def test_the_kind_is_the_most_exact_that_fits(memory, factory):
    """A million rows of 1024: 4, 2, 1 and a quarter of a byte a number, and a tenth beside."""
    kind = choose_kind("auto", 1_000_000, 1024, memory)
    assert kind.factory == factory
    assert (kind.name in EXACT) == (factory in ("Flat", "SQfp16"))
    bytes_ = {"Flat": 4, "SQfp16": 2, "IVF4000,SQ8": 1}.get(factory, 0.25) * 1.024e9 * 1.1
    within = "more than" if bytes_ > memory else "within"
    assert f"{bytes_ / 1e9:.2f} GB, {within} the {memory / 1e9:.2f} GB given" in kind.reason


@pytest.mark.parametrize(
    ("items", "width", "factory"),
    [(255, 8, "IVF5,SQ8"), (256, 8, "IVF5,PQ2x8"), (4800, 6, "IVF100,PQ1x8"),
     (90_000, 50, "IVF1200,PQ10x8"), (10_000, 3, "IVF208,PQ1x8")],
)  # fmt: skip
def test_the_smallest_kind_of_few_rows(items, width, factory):
    """Lists with 48 rows each at the least, 4 sqrt(N) at the most; codes from 256 rows on."""
    assert choose_kind("auto", items, width, 1).factory == factory


def test_an_index_s_lists_follow_its_items():
    assert choose_kind("IVF", 90_000, 32, 1).factory == "IVF1200,SQfp16"
    assert choose_kind("IVF", 90_000, 32, 1).name not in EXACT


@pytest.mark.parametrize(("items", "width"), [(10, 4), (5000, 64), (3_000_000, 256)])
@pytest.mark.parametrize("memory", [10**6, 10**8, 10**11])
def test_shards_hold_all_rows_once_and_fit_the_memory(items, width, memory):
    shards = shard_rows(items, width, memory)
    assert (shards[0].start, shards[-1].stop) == (0, items)
    assert all(one.stop == two.start for one, two in pairwise(shards))
    largest = max(map(len, shards))
    assert largest <= 1024 or 4 * largest * 4 * width <= memory  # four copies in float32
    assert largest <= 1_000_000


@pytest.mark.parametrize("memory", [1.2e9, 2e9, 4e9, 1e12])
@pytest.mark.parametrize("items", [50, 9_000, 3_000_000])
def test_blocks_fill_the_memory_and_no_more(items, memory):
    bounds = join_bounds(items, 1024, 1024, 256, int(memory))
    rows = 2048 * bounds.block
    assert bounds.bytes <= memory
    assert 2 <= bounds.held <= max(2, -(-items // bounds.block) + 2)
    least = bounds.bytes - bounds.held * rows
    assert 0.72e9 < least < 1.2e9  # the program and its tables, whatever the blocks
    if bounds.held < -(-items // bounds.block) + 2:
        assert bounds.bytes + rows > memory
    assert bounds.block % 1024 == 0
    with pytest.raises(BadInput, match="too little for 256 numbers a row"):
        join_bounds(items, 1024, 1024, 256, least)


# Rows and numbers


def test_rows_are_read_from_their_files_in_any_runs(tmp_path):
    whole = np.random.default_rng(0).standard_normal((57, 3)).astype(np.float16)
    parts = []
    for number, (first, last) in enumerate([(0, 20), (20, 21), (21, 57)]):
        np.save(tmp_path / f"{number}.npy", whole[first:last])
        parts.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    for rows in (Rows(parts), Rows([whole[:20], whole[20:21], whole[21:]])):
        for wanted in (range(57), range(19, 22), np.array([0, 3, 4, 19, 20, 21, 56]), range(5, 5)):
            np.testing.assert_array_equal(read_rows(rows, wanted), whole[np.asarray(wanted, int)])
        some = np.array([56, 3, 3, 20, 0])
        one = ModalityVectors(rows, np.ones(57, bool), 1.0)
        taken = ItemVectors({"image": one}).stored_rows("image", some)
        assert taken.dtype == np.float64
        np.testing.assert_array_equal(taken, whole[some].astype(np.float64))


@pytest.mark.parametrize(("hits", "of"), [(0, 30), (30, 30), (1, 30), (95, 100), (499, 500)])
def test_a_share_has_the_exact_interval(hits, of):
    exact = binomtest(hits, of).proportion_ci(0.95, "exact")
    told = interval(hits, of)
    assert (told["found"], told["of"], told["share"]) == (hits, of, hits / of)
    assert (told["low"], told["high"]) == pytest.approx((exact.low, exact.high))


def test_a_share_of_nothing_is_whole_and_says_nothing():
    assert interval(0, 0) == {"found": 0, "of": 0, "share": 1.0, "low": 0.0, "high": 1.0}


def test_a_float32_sum_of_the_worst_order_is_within_its_bound():
    """Half of each addition's last place is lost, the most that can be."""
    n = 4096
    terms = np.float32([1.0] + [2.0**-24] * (n - 1))
    total = np.float32(0)
    for term in terms:
        total = np.float32(total + term)
    truth = terms.astype(np.float64).sum()
    assert abs(float(total) - truth) <= sum_error(n) * truth
    assert abs(float(total) - truth) > 0.9 * sum_error(n - 400) * truth
    assert sum_error(100) == pytest.approx(100 * 2.0**-24, rel=1e-4)
