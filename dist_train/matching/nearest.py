"""The running best k of the items of a tile, and what the other tiles know already.

An entry that is kept nowhere has k better ones that are kept somewhere: leaving out what cannot be
among the best is safe in any order of tiles, on any number of workers, however often they die.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dist_train.matching.vectors import ItemVectors
from shards.storage.files import atomic_path

MERGED, SCORED = 500_000, 500_000
"""Items whose neighbours are merged at a time; neighbours that are scored at a time."""


class KnownFloors:
    """A file of N float32: the k-th best committed score of every item, -inf before there is one.

    Workers write it without a lock: a lost or stale entry is lower than it could be, never higher.
    """

    def __init__(self, path: Path, items: int) -> None:
        self.path, self.items = path, items
        if not path.exists():
            with atomic_path(path) as temporary:
                np.full(items, -np.inf, np.float32).tofile(temporary)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Floors (n,) of ascending row numbers."""
        first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        known = np.fromfile(self.path, np.float32, last - first, offset=4 * first)
        return known[rows - first]

    def raise_to(self, rows: np.ndarray, floors: np.ndarray) -> None:
        """Note higher floors (n,) of ascending row numbers."""
        if not len(rows):
            return
        first, last = int(rows[0]), int(rows[-1]) + 1
        known = np.fromfile(self.path, np.float32, last - first, offset=4 * first)
        known[rows - first] = np.maximum(known[rows - first], floors)
        with self.path.open("r+b") as file:
            file.seek(4 * first)
            known.tofile(file)


class Nearest:
    """The best k found so far of some items, by score, then by row number."""

    def __init__(self, rows: np.ndarray, k: int, floors: np.ndarray) -> None:
        """`rows` ascending (n,); `floors` (n,): scores below can not be among the best k."""
        self.rows, self.k, self.floors = rows, k, floors.copy()
        self.scores = np.full((len(rows), k), -np.inf, np.float32)
        self.ids = np.full((len(rows), k), -1, np.int64)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The score (n,) that a neighbour of each of `rows` must reach, -inf while it may be any.

        A row that is not held here wants none.
        """
        if not len(self.rows):
            return np.full(len(rows), np.inf)
        place = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        return np.where(self.rows[place] == rows, self.floors[place], np.inf)

    def add(self, items: np.ndarray, others: np.ndarray, scores: np.ndarray) -> None:
        """Neighbours (P,) of items held here."""
        place = np.searchsorted(self.rows, items)
        worth = scores >= self.floors[place]
        place, others, scores = place[worth], others[worth], scores[worth]
        touched, group = np.unique(place, return_inverse=True)
        if not len(touched):
            return
        held = self.ids[touched] >= 0
        group = np.concatenate([np.nonzero(held)[0], group])
        ids = np.concatenate([self.ids[touched][held], others])
        values = np.concatenate([self.scores[touched][held], scores])
        group, ids, values, rank = _best(group, ids, values, self.k)
        self.ids[touched], self.scores[touched] = -1, -np.inf
        self.ids[touched[group], rank] = ids
        self.scores[touched[group], rank] = values
        self.floors[touched] = np.maximum(self.floors[touched], self.scores[touched, -1])

    def table(self) -> pd.DataFrame:
        """i, j, score of all that are held, by i, the best first."""
        place, rank = np.nonzero(self.ids >= 0)
        return pd.DataFrame({
            "i": self.rows[place], "j": self.ids[place, rank], "score": self.scores[place, rank]
        })  # fmt: skip


def _best(
    group: np.ndarray, ids: np.ndarray, scores: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The best k of every group, each id once, with their ranks from 0."""
    order = np.lexsort((ids, -scores, group))
    group, ids, scores = group[order], ids[order], scores[order]
    again = np.zeros(len(group), bool)
    again[1:] = (group[1:] == group[:-1]) & (ids[1:] == ids[:-1])
    group, ids, scores = group[~again], ids[~again], scores[~again]
    first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else group
    rank = np.arange(len(group)) - np.repeat(first, np.diff(np.r_[first, len(group)]))
    keep = rank < k
    return group[keep], ids[keep], scores[keep], rank[keep]


def merged_nearest(files: list[Path], views: ItemVectors, k: int, out: Path) -> None:
    """Write the best k of all tiles: i, j, score, score_image, score_text, by i, the best first.

    By ranges of items, so that memory does not grow with their number.
    """
    with atomic_path(out) as temporary:
        writer = None
        for start in range(0, max(len(views), 1), MERGED):
            stop = min(start + MERGED, len(views))
            near = Nearest(np.arange(start, stop), k, np.full(stop - start, -np.inf, np.float32))
            for file in files:
                found = pd.read_parquet(file, filters=[("i", ">=", start), ("i", "<", stop)])
                near.add(found.i.to_numpy(), found.j.to_numpy(), found.score.to_numpy())
            table = near.table()
            for first in range(0, max(len(table), 1), SCORED):
                i, j = (table[name].to_numpy()[first : first + SCORED] for name in ("i", "j"))
                scored = pd.DataFrame({"i": i, "j": j} | views.scores(i, j))
                part = pa.Table.from_pandas(scored, preserve_index=False)
                writer = writer or pq.ParquetWriter(temporary, part.schema)
                writer.write_table(part)
        assert writer is not None
        writer.close()
