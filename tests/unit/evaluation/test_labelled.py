"""Near-duplicates against a comparison of every two rows."""

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from dist_train.evaluation.labelled import near_duplicates_across_splits

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
def test_near_duplicates_equal_every_two_rows_compared(rows):
    table = pd.DataFrame(rows, index=[f"row {k}" for k in range(len(rows))])
    found = near_duplicates_across_splits(table)
    expected = [any(same_photo(a, b) and differ(a, b, "split") for b in rows) for a in rows]
    assert found.tolist() == expected
    assert found.dtype == bool
    assert found.index.equals(table.index)
