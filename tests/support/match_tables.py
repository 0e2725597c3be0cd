"""Matches and groups from all pairs at once, in memory."""

import numpy as np
import pandas as pd
import pyarrow as pa

from dist_train.decisions.groups import Groups
from dist_train.decisions.match_lists import MATCH, Postings, match_lists


def postings_of(table: pd.DataFrame) -> Postings:
    """Postings from a table of posting_id and row."""
    row = table.row.to_numpy()
    place = np.empty((row >= 0).sum(), np.int64)
    place[row[row >= 0]] = np.flatnonzero(row >= 0)
    return Postings(pa.array(table.posting_id, pa.large_string()), place)


def matches_table(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """posting_id, matches and scores of every posting; `pairs` are the accepted ones."""
    postings, found = postings_of(table), np.empty(2 * len(pairs), MATCH)
    found["posting"] = postings.place[np.concatenate([pairs.i, pairs.j]).astype(np.int64)]
    found["row"] = np.concatenate([pairs.j, pairs.i])
    found["score"] = np.concatenate([pairs.score, pairs.score])
    return pd.DataFrame(match_lists(postings, range(len(table)), found).to_pydict())


def groups_table(table: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """posting_id and group_id of every posting."""
    place, groups = postings_of(table).place, Groups(len(table))
    groups.join(place[pairs.i.to_numpy()], place[pairs.j.to_numpy()])
    return pd.DataFrame({"posting_id": table.posting_id, "group_id": groups.numbers()})
