"""The tables that a match directory gives to its reader."""

import numpy as np
import pandas as pd
import pyarrow as pa

from dist_train.decisions.groups import components


def matches_table(postings: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """posting_id, matches (itself first, then by score), scores; one row a catalogue posting.

    `pairs` are the accepted ones; a rejected posting matches only itself.
    """
    place = _places(postings)
    asking = place[np.concatenate([pairs.i, pairs.j]).astype(np.int64)]
    other = np.concatenate([pairs.j, pairs.i]).astype(np.int64)
    score = np.concatenate([pairs.score, pairs.score])
    names = name_array(pa.chunked_array([pa.array(postings.posting_id)]))
    lists = match_lists(names, place, range(len(postings)), asking, other, score)
    return pd.DataFrame(lists.to_pydict())


def match_lists(
    names: pa.Array, place: np.ndarray, some: range,
    asking: np.ndarray, other: np.ndarray, score: np.ndarray,
) -> pa.Table:  # fmt: skip
    """matches_table of `some` postings, all of whose matches (P,) are given.

    `asking` are postings, `other` vector rows; `place` (N,) is the posting of each row.
    """
    own = np.arange(some.start, some.stop)
    # Itself comes before all others, whatever their score.
    order = np.lexsort((np.r_[own, other], -np.r_[np.full(len(own), np.inf), score],
                        np.r_[own, asking]))  # fmt: skip
    ends = np.cumsum(np.r_[0, 1 + np.bincount(asking - some.start, minlength=len(own))])
    match = np.r_[own, place[other]][order]
    value = np.r_[np.ones(len(own), np.float32), score.astype(np.float32)][order]
    offsets = pa.array(ends, pa.int32())
    text = names.take(pa.array(match))
    return pa.table({
        "posting_id": names.slice(some.start, len(own)),
        "matches": pa.ListArray.from_arrays(offsets, text),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(value)),
    })  # fmt: skip


def name_array(column: pa.ChunkedArray) -> pa.Array:
    """Posting ids as one array, of any length."""
    return pa.concat_arrays(column.cast(pa.large_string()).chunks)


def groups_table(postings: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """posting_id, group_id: connected components of the accepted pairs, the rest alone."""
    place = _places(postings)
    groups = components(len(postings), place[pairs.i.to_numpy()], place[pairs.j.to_numpy()])
    return pd.DataFrame({"posting_id": postings.posting_id.to_numpy(), "group_id": groups})


def submission_table(matches: pd.DataFrame) -> pd.DataFrame:
    """posting_id, matches as one text with spaces between."""
    return matches.assign(matches=matches.matches.map(" ".join))[["posting_id", "matches"]]


def accepted_pairs(matches: pd.DataFrame, row_of: pd.Series) -> pd.DataFrame:
    """i, j of the matches as they were decided, i < j; `row_of` maps posting_id to row."""
    long = matches[["posting_id", "matches"]].explode("matches")
    i = long.posting_id.map(row_of).to_numpy()
    j = long.matches.map(row_of).to_numpy()
    keep = i < j
    return pd.DataFrame({"i": i[keep], "j": j[keep], "score": 1.0})


def _places(postings: pd.DataFrame) -> np.ndarray:
    """The posting of every vector row (N,)."""
    rows = postings.row.to_numpy()
    place = np.empty((rows >= 0).sum(), np.int64)
    place[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    return place
