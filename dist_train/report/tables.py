"""The tables of a match directory, read in batches so that a large catalogue fits."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.storage.errors import Corrupt

# Without labels only the best matches are shown; no more than these are kept of a batch.
BEST_OF_A_BATCH = 5_000


@dataclass(frozen=True)
class Matches:
    """pairs: i, j, score among the rows looked at (i < j); postings: rows of the table;
    matched: those with another match than itself."""

    pairs: pd.DataFrame
    postings: int
    matched: int


def embedded_items(path: Path) -> pd.DataFrame:
    """items.parquet of an embedding set: posting_id, label_group, split, by row 0..N-1."""
    columns = ["row", "posting_id", "label_group", "split"]
    table = pd.read_parquet(path, columns=columns)
    table = table[table["row"].notna()].astype({"row": "int64"}).sort_values("row")
    if not np.array_equal(table["row"], np.arange(len(table))):
        raise Corrupt(f"{path}: rows are not 0 to {len(table) - 1}, each once: embed again")
    return table.set_index("row")


def titles_of(path: Path, rows: list[int]) -> dict[int, str]:
    """Titles of some rows of an embedding set."""
    table = pd.read_parquet(path, columns=["row", "title"], filters=[("row", "in", rows)])
    return dict(zip(table["row"].astype(int), table["title"].fillna(""), strict=True))


def read_matches(path: Path, posting_ids: pd.Series, looked_at: np.ndarray | None) -> Matches:
    """matches.parquet as pairs of rows.

    posting_ids: (N,) by row; looked_at: (N,) bool rows whose pairs are wanted, or None for
    the best pairs of all rows.
    """
    row_of = pd.Index(posting_ids)
    parts, postings, matched = [_pairs_frame([], [], [])], 0, 0
    for batch in _batches(path, ["posting_id", "matches", "scores"]):
        postings += batch.num_rows
        matched += int(pc.sum(pc.greater(pc.list_value_length(batch["matches"]), 1)).as_py() or 0)
        parts.append(_matched_rows(batch, row_of, looked_at))
    pairs = pd.concat(parts, ignore_index=True).drop_duplicates(["i", "j"], ignore_index=True)
    return Matches(pairs, postings, matched)


def read_groups(path: Path, posting_ids: pd.Series) -> tuple[np.ndarray, int, int]:
    """groups.parquet: group of every row (N,) int64, groups of two or more, the largest."""
    table = pd.read_parquet(path, columns=["posting_id", "group_id"])
    codes, _ = pd.factorize(table["group_id"])
    sizes = np.bincount(codes, minlength=1)
    group_of = codes[pd.Index(table["posting_id"]).get_indexer(posting_ids)]
    return group_of, int((sizes > 1).sum()), int(sizes.max())


def _batches(path: Path, columns: list[str]):
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(columns=columns)


def _matched_rows(batch: pa.RecordBatch, row_of: pd.Index, looked_at) -> pd.DataFrame:
    """The pairs of a batch. A match may be said from one side only, so both sides are read."""
    lists = pc.list_parent_indices(batch["matches"]).to_numpy()
    one = row_of.get_indexer(batch["posting_id"].to_pandas())[lists]
    other = row_of.get_indexer(pc.list_flatten(batch["matches"]).to_pandas())
    score = pc.list_flatten(batch["scores"]).to_numpy(zero_copy_only=False)
    kept = (one != other) & (one >= 0) & (other >= 0)
    if looked_at is not None:
        kept &= looked_at[one] & looked_at[other]
    one, other, score = one[kept], other[kept], score[kept]
    pairs = _pairs_frame(np.minimum(one, other), np.maximum(one, other), score)
    return pairs if looked_at is not None else pairs.nlargest(BEST_OF_A_BATCH, "score")


def _pairs_frame(i, j, score) -> pd.DataFrame:
    kinds = {"i": "int64", "j": "int64", "score": "float64"}
    return pd.DataFrame({"i": i, "j": j, "score": score}).astype(kinds)
