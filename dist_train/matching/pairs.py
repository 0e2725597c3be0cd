"""A finished pairs directory: the scored pairs of a join, their score floor and their proof."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dist_train.distributed import stage
from dist_train.embedding.store import EmbeddingSet
from shards.read.location import Folder
from shards.storage.files import corrupt_error

BATCH = 500_000
"""Pairs in memory at one time."""
SCORES = ("score", "score_image", "score_text")


class Audit(TypedDict):
    """Audited rows; true pairs of theirs; missed and wrong ones; recall, its lower 95 % limit."""

    rows: int
    true: int
    missed: int
    wrong: int
    recall: float
    recall_low: float


class Proof(TypedDict):
    """proof.json."""

    engine: str
    exact: bool
    items: int
    score_floor: float
    block_pairs: int
    pairs_covered: int
    coarse_pass_error: float
    coarse_pass_margin: float
    coarse_pass_checked: int
    audit: Audit
    pairs: int
    weights: dict[str, float]


def no_pairs(columns: Sequence[str] = ("i", "j", *SCORES)) -> pd.DataFrame:
    """An empty table of pairs, to which batches are appended."""
    kinds = {name: "float32" if name in SCORES else "int64" for name in columns}
    return pd.DataFrame(columns=list(kinds)).astype(kinds)


class PairSet:
    """The pairs i < j of a finished join that reach its score floor."""

    def __init__(self, path: Path) -> None:
        """Open `path`; raises BadInput when it is no finished pairs directory, or damaged."""
        self.path, self.folder = path, Folder(path, stage.PAIRS)
        self.proof: Proof = self.folder.json("proof.json")
        self.score_floor = self.proof["score_floor"]
        """The lowest kept score: nothing is known of pairs below it."""
        self.weights = self.proof["weights"]
        """The weight of each modality in the score."""

    @cached_property
    def embedding(self) -> EmbeddingSet:
        """The embedding set whose rows were joined. Raises BadInput when it has changed since."""
        return EmbeddingSet(stage.parent(self.path, "embedding"))

    def reaches(self, threshold: float) -> bool:
        """Whether every pair of score `threshold` or more is here, compared as float32."""
        return bool(np.float32(threshold) >= np.float32(self.score_floor))

    def batches(self, columns: Sequence[str] = ("i", "j", "score")) -> Iterator[pd.DataFrame]:
        """All pairs in the order of their files, at most BATCH at a time.

        Raises Corrupt for a file that is not as it was written.
        """
        for name in self.folder.names("pairs/*.parquet"):
            path = self.folder.file(name)
            with corrupt_error(path), pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH, columns=list(columns)):
                    yield batch.to_pandas(ignore_metadata=True)

    def select(
        self, wanted: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    ) -> pd.DataFrame:
        """i, j, score, score_image, score_text of all pairs, which must fit in memory.

        Or only of those whose i and j (P,) the function `wanted` maps to True (P,).
        """
        found = [no_pairs()]
        for table in self.batches(("i", "j", *SCORES)):
            keep = slice(None) if wanted is None else wanted(table.i.to_numpy(), table.j.to_numpy())
            found.append(table[keep])
        return pd.concat(found, ignore_index=True)
