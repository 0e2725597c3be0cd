"""Match lists and groups written piece by piece from the files of pairs.

Memory grows with the postings, by their names and some numbers each, never with the pairs: these
are laid out on disk by the posting they belong to and come back a piece at a time.
"""

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_train.decisions.groups import Groups
from dist_train.decisions.tables import match_lists, name_array, submission_table
from dist_train.embedding.store import told_corrupt
from dist_train.matching.pairs import PairSet
from shards.storage.files import atomic_path

WORK = ".work"
PIECE = 500_000
"""Pairs of the postings whose lists are in memory at one time."""
POSTINGS = 250_000
"""Postings in memory at one time, with their lists."""
ENTRY = np.dtype([("asking", np.int64), ("other", np.int64), ("score", np.float32)])


@dataclass(frozen=True)
class Postings:
    """M catalogue postings: names (M,), vector row (M,) or -1, and the place (N,) of every row."""

    names: pa.Array
    row: np.ndarray
    place: np.ndarray


def read_postings(path: Path) -> Postings:
    """The postings of an embedding set's items.parquet."""
    with told_corrupt(path):
        table = pq.read_table(path, columns=["posting_id", "row"])
    row = table["row"].to_numpy()
    place = np.empty(int((row >= 0).sum()), np.int64)
    place[row[row >= 0]] = np.flatnonzero(row >= 0)
    return Postings(name_array(table["posting_id"]), row, place)


def write_lists(
    pairs: PairSet, out: Path, postings: Postings, degree: np.ndarray, threshold: float
) -> dict[str, int]:
    """Write matches.parquet, groups.parquet and submission.csv; counts of pairs and matches.

    `degree` (N,) counts the pairs of every row. What does not fit in memory lies below `out`
    meanwhile.
    """
    room = out / WORK
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    of_posting = np.zeros(len(postings.row), np.int64)
    of_posting[postings.place] = degree
    cuts, groups, matches = _cuts(of_posting), Groups(len(postings.row)), 0
    for some in pairs.batches():
        accepted = some[some.score >= np.float32(threshold)]
        if len(accepted):
            matches += len(accepted)
            i, j = accepted.i.to_numpy(), accepted.j.to_numpy()
            groups.join(postings.place[i], postings.place[j])
            _lay_out(i, j, accepted.score.to_numpy(), postings, cuts, room)
    with atomic_path(out / "groups.parquet") as temporary:
        columns = {"posting_id": postings.names, "group_id": groups.numbers()}
        pq.write_table(pa.table(columns), temporary)
    _write_matches(out, postings, of_posting, cuts, room)
    shutil.rmtree(room)
    return {"pairs": int(degree.sum()) // 2, "matches": matches}


def _cuts(degree: np.ndarray) -> np.ndarray:
    """First postings of the pieces, and the end: each of at most POSTINGS with PIECE pairs.

    By the pairs, of which the matches are some: so the pairs need not be read to count matches.
    A posting that has more than PIECE by itself is a piece of its own.
    """
    cuts, before = [0], np.r_[0, np.cumsum(degree)]
    while cuts[-1] < len(degree):
        full = int(np.searchsorted(before, before[cuts[-1]] + PIECE, "right")) - 1
        cuts.append(min(max(full, cuts[-1] + 1), cuts[-1] + POSTINGS, len(degree)))
    return np.asarray(cuts)


def _lay_out(
    i: np.ndarray, j: np.ndarray, score: np.ndarray, postings: Postings, cuts: np.ndarray,
    room: Path,
) -> None:  # fmt: skip
    """Both directions of accepted pairs (P,), into a file for each piece of the postings."""
    entries = np.empty(2 * len(i), ENTRY)
    entries["asking"] = postings.place[np.concatenate([i, j])]
    entries["other"] = np.concatenate([j, i])
    entries["score"] = np.tile(score, 2)
    piece = np.searchsorted(cuts, entries["asking"], "right") - 1
    entries = entries[np.argsort(piece, kind="stable")]
    numbers, counts = np.unique(piece, return_counts=True)
    for number, some in zip(numbers, np.split(entries, np.cumsum(counts)[:-1]), strict=True):
        with (room / str(number)).open("ab") as file:
            some.tofile(file)


def _write_matches(
    out: Path, postings: Postings, degree: np.ndarray, cuts: np.ndarray, room: Path
) -> None:
    with (
        atomic_path(out / "matches.parquet") as table_path,
        atomic_path(out / "submission.csv") as text_path,
    ):
        writer = None
        for number, (first, last) in enumerate(pairwise(cuts)):
            file = room / str(number)
            found = np.fromfile(file, ENTRY) if file.exists() else np.zeros(0, ENTRY)
            table = match_lists(
                postings.names, postings.place, range(first, last),
                found["asking"], found["other"], found["score"],
            ).append_column("degree", pa.array(degree[first:last]))  # fmt: skip
            writer = writer or pq.ParquetWriter(table_path, table.schema)
            writer.write_table(table)
            submission = submission_table(table.select(["posting_id", "matches"]).to_pandas())
            submission.to_csv(text_path, index=False, mode="a", header=not number)
        assert writer is not None
        writer.close()
