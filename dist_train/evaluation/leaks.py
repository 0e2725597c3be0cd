"""Photos that appear where they should not: in two splits, or in two label groups."""

import numpy as np
import pandas as pd

from shards.duplicates.label_noise import UNLEARNED, codes, differs_within
from shards.duplicates.near_duplicates import NO_PHOTO


def twins(table: pd.DataFrame) -> pd.DataFrame:
    """Which items have a twin in another split or in another label group.

    table: columns photo_group (below 0: no photo), split, label_group. Twins are photos of one
    photo group, as the pack found them: the same bytes or nearly the same picture. An empty or
    missing value differs from nothing; nor does the unlabelled split, of which nothing is
    learned, so that a photo shared with it gives nothing away. Returns bool columns
    crosses_split and crosses_group with the index of the table.
    """
    groups = table.photo_group.fillna(NO_PHOTO).to_numpy(np.int64)
    found = {
        "crosses_split": differs_within(groups, codes(table.split, UNLEARNED)),
        "crosses_group": differs_within(groups, codes(table.label_group)),
    }
    return pd.DataFrame(found, index=table.index)
