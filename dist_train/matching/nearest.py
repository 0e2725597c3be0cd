"""The nearest neighbours of items: the best k so far, and the k-th best scores on disk.

An entry that is dropped has k better ones that are kept: leaving out what cannot be among the best
is safe in any order of block pairs, on any number of workers, however often they die.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dist_train.matching.pairs import no_pairs
from dist_train.matching.vectors import ItemVectors
from shards.storage.files import atomic_path

MERGED, SCORED = 500_000, 500_000
"""Items whose neighbours are merged at a time; neighbours that are scored at a time."""


class KthBestScores:
    """A file of N float32: the k-th best committed score of every item, -inf while there is none.

    Workers write it without a lock: a lost or stale entry is lower than it could be, never higher.
    """

    def __init__(self, path: Path, items: int) -> None:
        self.path = path
        if not path.exists():
            with atomic_path(path) as temporary:
                np.full(items, -np.inf, np.float32).tofile(temporary)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Scores (n,) of ascending row numbers."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        known = np.fromfile(self.path, np.float32, last - first, offset=4 * first)
        return known[rows - first]

    def raise_to(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Write scores (n,) of ascending row numbers where they are higher than before."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        known = np.fromfile(self.path, np.float32, last - first, offset=4 * first)
        known[rows - first] = np.maximum(known[rows - first], scores)
        with self.path.open("r+b") as file:
            file.seek(4 * first)
            known.tofile(file)


class Nearest:
    """The best k neighbours found so far of some items, by score, then by row number."""

    def __init__(self, rows: np.ndarray, k: int, kth_best: np.ndarray) -> None:
        """`rows` ascending (n,); lower scores than `kth_best` (n,) cannot be among the best k."""
        self.rows, self.k, self.kth_best = rows, k, kth_best.copy()
        self.scores = np.full((len(rows), k), -np.inf, np.float32)
        self.ids = np.full((len(rows), k), -1, np.int64)

    def add(self, items: np.ndarray, others: np.ndarray, scores: np.ndarray) -> None:
        """Add neighbours `others` (P,) of `items` (P,) held here; duplicates count once."""
        place = np.searchsorted(self.rows, items)
        worth = scores >= self.kth_best[place]
        place, others, scores = place[worth], others[worth], scores[worth]
        touched, group = np.unique(place, return_inverse=True)
        if not len(touched):
            return
        held = self.ids[touched] >= 0
        group = np.concatenate([np.nonzero(held)[0], group])
        ids = np.concatenate([self.ids[touched][held], others])
        values = np.concatenate([self.scores[touched][held], scores])
        order = np.lexsort((ids, -values, group))
        group, ids, values = group[order], ids[order], values[order]
        again = np.zeros(len(group), bool)
        again[1:] = (group[1:] == group[:-1]) & (ids[1:] == ids[:-1])
        group, ids, values = group[~again], ids[~again], values[~again]
        rank = ranks(group)
        group, ids, values, rank = (side[rank < self.k] for side in (group, ids, values, rank))
        self.ids[touched], self.scores[touched] = -1, -np.inf
        self.ids[touched[group], rank] = ids
        self.scores[touched[group], rank] = values
        self.kth_best[touched] = np.maximum(self.kth_best[touched], self.scores[touched, -1])

    def table(self) -> pd.DataFrame:
        """i, j, score of all neighbours that are held, by i, the best first."""
        place, rank = np.nonzero(self.ids >= 0)
        i, j, score = self.rows[place], self.ids[place, rank], self.scores[place, rank]
        return pd.DataFrame({"i": i, "j": j, "score": score})


def ranks(group: np.ndarray) -> np.ndarray:
    """Positions (P,) from 0 within runs of equal numbers, which ascend."""
    return np.arange(len(group)) - np.searchsorted(group, group)


def merge_nearest(files: list[Path], vectors: ItemVectors, k: int, out: Path) -> None:
    """Write the best k of all block pairs: i, j, score, score_image, score_text, by i, best first.

    Items are merged in ranges, so that memory does not grow with their number.
    """
    schema = pa.Schema.from_pandas(no_pairs(), preserve_index=False)
    with atomic_path(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(vectors), MERGED):
            rows = np.arange(start, min(start + MERGED, len(vectors)))
            nearest = Nearest(rows, k, np.full(len(rows), -np.inf, np.float32))
            for file in files:
                selected = [("i", ">=", start), ("i", "<", start + len(rows))]
                found = pd.read_parquet(file, filters=selected)
                nearest.add(found.i.to_numpy(), found.j.to_numpy(), found.score.to_numpy())
            table = nearest.table()
            for first in range(0, max(len(table), 1), SCORED):
                i, j = (table[name].to_numpy()[first : first + SCORED] for name in ("i", "j"))
                scored = pd.DataFrame({"i": i, "j": j} | vectors.scores(i, j))
                writer.write_table(pa.Table.from_pandas(scored, schema, preserve_index=False))
