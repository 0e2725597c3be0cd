"""The items that a score may speak of: labelled, of one split, without twins in another."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dist_train.embedding.store import told_corrupt
from dist_train.evaluation.leaks import twins


def read_labels(embeddings: Path) -> pd.DataFrame:
    """The items of an embedding set by vector row, with what `labelled_rows` looks at alone."""
    names = ["row", "split", "label_group", "photo_group"]
    with told_corrupt(embeddings / "items.parquet") as path:
        table = pq.read_table(
            path, columns=names, read_dictionary=["split", "label_group"]
        ).to_pandas(split_blocks=True, self_destruct=True)
    return table[table.row >= 0].sort_values("row", ignore_index=True).drop(columns="row")


def labelled_rows(items: pd.DataFrame, split: str) -> np.ndarray:
    """Rows (n,) of `split` that have a label and whose photo stands in no other split."""
    wanted = (items.split == split) & (items.label_group != "") & ~twins(items).crosses_split
    return np.flatnonzero(wanted.to_numpy())


def left_out(items: pd.DataFrame, split: str) -> int:
    """How many labelled items of `split` have a twin in another split."""
    labelled = (items.split == split) & (items.label_group != "")
    return int((labelled & twins(items).crosses_split).sum())


def pairs_among(
    rows: np.ndarray, pairs: pd.DataFrame, items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs whose items are both in `rows`, as positions in `rows`, with their scores."""
    position = np.full(items, -1, np.int64)
    position[rows] = np.arange(len(rows))
    i, j = position[pairs.i.to_numpy()], position[pairs.j.to_numpy()]
    both = (i >= 0) & (j >= 0)
    return i[both], j[both], pairs.score.to_numpy()[both]
