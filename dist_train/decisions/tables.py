"""The tables that a match directory gives to its reader."""

import numpy as np
import pandas as pd

from dist_train.decisions.groups import components


def matches_table(postings: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """posting_id, matches (itself first, then by score), scores; one row a catalogue posting.

    `pairs` are the accepted ones; a rejected posting matches only itself.
    """
    ids = _ids_by_row(postings)
    asking = np.concatenate([pairs.i, pairs.j]).astype(np.int64)
    other = np.concatenate([pairs.j, pairs.i]).astype(np.int64)
    score = np.concatenate([pairs.score, pairs.score])
    order = np.lexsort((other, -score, asking))
    ends = np.cumsum(np.bincount(asking, minlength=len(ids)))[:-1]
    found = np.split(ids[other[order]], ends)
    scores = np.split(score[order].astype(np.float32), ends)
    rows = postings.row.to_numpy()
    return pd.DataFrame({
        "posting_id": postings.posting_id.to_numpy(),
        "matches": [
            [own, *(found[row] if row >= 0 else ())]
            for own, row in zip(postings.posting_id, rows, strict=True)
        ],
        "scores": [[1.0, *(scores[row] if row >= 0 else ())] for row in rows],
    })  # fmt: skip


def groups_table(postings: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """posting_id, group_id: connected components of the accepted pairs, the rest alone."""
    place = np.empty((postings.row >= 0).sum(), np.int64)
    rows = postings.row.to_numpy()
    place[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
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


def _ids_by_row(postings: pd.DataFrame) -> np.ndarray:
    packed = postings[postings.row >= 0].sort_values("row")
    return packed.posting_id.to_numpy(object)
