"""Twins against a comparison of every two rows."""

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from dist_train.evaluation.leaks import twins
from dist_train.evaluation.strata import by_group_size

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "split": st.sampled_from(["train", "val", "unlabelled", "", None]),
            "label_group": st.sampled_from(["g", "h", "", None]),
            "photo_group": st.sampled_from([0, 1, 2, -1, None]),
        }
    ),
    min_size=1,
    max_size=8,
)


def same_photo(one, other) -> bool:
    return one["photo_group"] not in (-1, None) and one["photo_group"] == other["photo_group"]


def differ(one, other, key) -> bool:
    known = one[key] and other[key] and "unlabelled" not in (one[key], other[key])
    return bool(known and one[key] != other[key])


@given(ROWS)
def test_twins_equal_every_two_rows_compared(rows):
    table = pd.DataFrame(rows, index=[f"row {k}" for k in range(len(rows))])
    found = twins(table)
    for column, key in (("crosses_split", "split"), ("crosses_group", "label_group")):
        expected = [any(same_photo(a, b) and differ(a, b, key) for b in rows) for a in rows]
        assert found[column].tolist() == expected
        assert found[column].dtype == bool
    assert found.index.equals(table.index)


@given(st.lists(st.integers(1, 25), min_size=1, max_size=12), st.integers(0, 2**16))
def test_strata_split_the_items_and_keep_the_mean(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    f1 = np.random.default_rng(seed).random(len(groups))
    table = by_group_size(groups, f1)
    size_of = np.repeat(sizes, sizes)
    for row in table.itertuples():
        inside = (size_of >= row.size_from) & (size_of <= row.size_to)
        assert row.items == inside.sum() > 0
        assert np.isclose(row.f1, f1[inside].mean())
    assert table["items"].sum() == len(groups)


def test_strata_have_the_named_bands():
    sizes = [1, 2, 3, 4, 5, 9, 10, 19, 20, 33]
    table = by_group_size(np.repeat(sizes, sizes), np.ones(sum(sizes)))
    bands = table[["size_from", "size_to"]].to_numpy().tolist()
    assert bands == [[1, 1], [2, 2], [3, 4], [5, 9], [10, 19], [20, 33]]
    assert table["items"].tolist() == [1, 2, 7, 14, 29, 53]
