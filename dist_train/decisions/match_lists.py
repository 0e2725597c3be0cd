"""Match lists written piece by piece from batches of matches, and read again; groups by posting.

Memory grows with the postings, by their names and some numbers each, never with the pairs: these
are stored on disk by the posting they belong to and are read a piece at a time.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dist_train.matching.pairs import no_pairs
from shards.storage.files import atomic_path, corrupt_error
from shards.storage.stage_files import WORK

PIECE = 500_000
"""Pairs of the postings whose lists are in memory at one time."""
POSTINGS = 250_000
"""Postings in memory at one time, with their lists."""
MATCH = np.dtype([("posting", np.int64), ("row", np.int64), ("score", np.float32)])
"""A posting by its place in the catalogue, and the vector row of an item that it matches."""


@dataclass(frozen=True)
class Postings:
    """M postings of a catalogue: names (M,), and places (M,), of each vector row, then the rest."""

    names: pa.Array
    place: np.ndarray


def read_postings(path: Path) -> Postings:
    """The postings of an embedding set's items.parquet; Corrupt when it cannot be read."""
    with corrupt_error(path):
        table = pq.read_table(path, columns=["posting_id", "row"])
    row = table["row"].to_numpy()
    # Offsets of 64 bits, so that the names are one array however many they are.
    names = pa.concat_arrays(table["posting_id"].cast(pa.large_string()).chunks)
    return Postings(names, np.argsort(np.where(row < 0, len(row), row), kind="stable"))


def write_groups(path: Path, postings: Postings, group: np.ndarray) -> None:
    """Write groups.parquet; group: (M,) of each vector row, then of the rest."""
    by_place = np.empty(len(group), np.int64)
    by_place[postings.place] = group
    numbers = pd.factorize(by_place)[0]  # by the first posting of each
    with atomic_path(path) as temporary:
        pq.write_table(pa.table({"posting_id": postings.names, "group_id": numbers}), temporary)


def write_lists(
    accepted: Iterable[pd.DataFrame], out: Path, postings: Postings, degree: np.ndarray
) -> dict[str, int]:
    """Write matches.parquet and submission.csv; count postings, pairs and matches.

    accepted: the matches in batches, columns i, j and score; degree: (N,) pairs of every row. What
    does not fit in memory is stored below `out` until the lists are written.
    """
    work = out / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    degree_of = np.zeros(len(postings.names), np.int64)
    degree_of[postings.place[: len(degree)]] = degree
    cuts, matches = _cuts(degree_of), 0
    for batch in accepted:
        if len(batch):
            matches += len(batch)
            i, j = batch.i.to_numpy(), batch.j.to_numpy()
            both = np.empty(2 * len(i), MATCH)
            both["posting"] = postings.place[np.concatenate([i, j])]
            both["row"] = np.concatenate([j, i])
            both["score"] = np.tile(batch.score.to_numpy(), 2)
            _store(both, cuts, work)
    with (
        atomic_path(out / "matches.parquet") as table_path,
        atomic_path(out / "submission.csv") as text_path,
    ):
        writer = None
        for number, (first, last) in enumerate(pairwise(cuts)):
            file = work / str(number)
            found = np.fromfile(file, MATCH) if file.exists() else np.zeros(0, MATCH)
            table = match_lists(postings, range(first, last), found)
            table = table.append_column("degree", pa.array(degree_of[first:last]))
            writer = writer or pq.ParquetWriter(table_path, table.schema)
            writer.write_table(table)
            submission = table.select(["posting_id", "matches"]).to_pandas()
            submission["matches"] = submission.matches.map(" ".join)
            submission.to_csv(text_path, index=False, mode="a", header=not number)
        assert writer is not None
        writer.close()
    shutil.rmtree(work)
    return {"postings": len(degree_of), "pairs": int(degree.sum()) // 2, "matches": matches}


def match_lists(postings: Postings, wanted: range, found: np.ndarray) -> pa.Table:
    """posting_id, matches (itself first, then by score) and scores of the postings `wanted`.

    found: all matches (P,) of these postings, as MATCH; a rejected posting matches only itself.
    """
    own = np.arange(wanted.start, wanted.stop)
    # A posting comes before all its matches, whatever their score; of equal scores the lower row.
    first = np.r_[np.full(len(own), np.inf), found["score"]]
    order = np.lexsort((np.r_[own, found["row"]], -first, np.r_[own, found["posting"]]))
    lengths = 1 + np.bincount(found["posting"] - wanted.start, minlength=len(own))
    offsets = pa.array(np.cumsum(np.r_[0, lengths]), pa.int32())
    match = np.r_[own, postings.place[found["row"]]][order]
    score = np.r_[np.ones(len(own), np.float32), found["score"]][order]
    names = postings.names.take(pa.array(match))
    columns = {
        "posting_id": postings.names.slice(wanted.start, len(own)),
        "matches": pa.ListArray.from_arrays(offsets, names),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(score)),
    }
    return pa.table(columns)


def read_matches(path: Path, posting_ids: pd.Series, best: int | None = None) -> pd.DataFrame:
    """The matches within some postings (n,): places i < j in `posting_ids`, and score.

    best: keep only so many of each batch of matches.parquet, those of the highest score. Raises
    Corrupt when the file cannot be read.
    """
    found = [no_pairs(("i", "j", "score"))]
    for matches in iterate_matches(path, posting_ids):
        # A match stands in the lists of both postings.
        pairs = matches[(matches.i >= 0) & (matches.i < matches.j)]
        found.append(pairs if best is None else pairs.nlargest(best, "score"))
    return pd.concat(found, ignore_index=True)


def iterate_matches(path: Path, posting_ids: pd.Series) -> Iterator[pd.DataFrame]:
    """Every entry of every list, batch by batch: i, j and score, a posting itself first.

    i, j: the places in `posting_ids` (n,) of the posting and of its match, -1 for others.
    """
    places = pd.Index(posting_ids)
    with corrupt_error(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["posting_id", "matches", "scores"]):
            lists = pc.list_parent_indices(batch["matches"]).to_numpy()
            i = places.get_indexer(batch["posting_id"].to_pandas())[lists]
            j = places.get_indexer(pc.list_flatten(batch["matches"]).to_pandas())
            score = pc.list_flatten(batch["scores"]).to_numpy(zero_copy_only=False)
            yield pd.DataFrame({"i": i, "j": j, "score": score})


def _cuts(degree: np.ndarray) -> np.ndarray:
    """First postings of the pieces, and the end: each of at most POSTINGS with PIECE pairs.

    By the pairs, of which the matches are some: so the pairs need not be read to count matches.
    A posting that has more than PIECE alone is one piece.
    """
    cuts, before = [0], np.r_[0, np.cumsum(degree)]
    while cuts[-1] < len(degree):
        full = int(np.searchsorted(before, before[cuts[-1]] + PIECE, "right")) - 1
        cuts.append(min(max(full, cuts[-1] + 1), cuts[-1] + POSTINGS, len(degree)))
    return np.asarray(cuts)


def _store(matches: np.ndarray, cuts: np.ndarray, work: Path) -> None:
    """Append matches (P,) to the file of the piece that each posting belongs to."""
    piece = np.searchsorted(cuts, matches["posting"], "right") - 1
    matches = matches[np.argsort(piece, kind="stable")]
    numbers, counts = np.unique(piece, return_counts=True)
    for number, some in zip(numbers, np.split(matches, np.cumsum(counts)[:-1]), strict=True):
        with (work / str(number)).open("ab") as file:
            some.tofile(file)
