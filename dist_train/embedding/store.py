"""An embedding set on disk: blocks of unit rows beside the table of the catalogue's postings."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dist_train.config.training import Modality
from dist_train.distributed.stage import EMBEDDING
from shards.read.location import Folder
from shards.storage.errors import Corrupt
from shards.storage.files import AGAIN, corrupt_error

ITEMS = "items.parquet"
COLUMNS = ["row", "posting_id", "label_group", "split", "title"]
COLUMNS += ["has_image", "has_text", "status", "sha256", "phash", "photo_group"]
"""Columns of items.parquet; those of the catalogue that are none of ours follow."""
MODALITIES: tuple[Modality, ...] = ("image", "text")
DTYPES = (np.float16, np.float32)


class Rows:
    """The rows of one modality over memory-mapped blocks; matching/vectors.py reads them."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """`parts`: blocks (n, D) of equal D, in the order of their rows."""
        self.parts = list(parts)
        self.ends: list[int] = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def width(self) -> int:
        """D, the numbers of a row."""
        return self.parts[0].shape[1]


class EmbeddingSet:
    """A finished embedding set."""

    def __init__(self, path: Path) -> None:
        """Open `path`.

        Raises BadInput when it is not a finished embedding set, and Corrupt when a file is missing
        or has another size than was written.
        """
        self.path, self.folder = path, Folder(path, EMBEDDING)
        self.manifest = self.folder.manifest
        for name, facts in self.manifest["files"].items():
            file = path / name
            if not file.exists() or file.stat().st_size != facts["bytes"]:
                raise Corrupt(f"{file}: missing or not as long as it was written; embed again")
        self.modalities = [
            modality for modality in MODALITIES if f"{modality}-00000.npy" in self.manifest["files"]
        ]

    @cached_property
    def items(self) -> pd.DataFrame:
        """The embedded items with our columns, table row r being vector row r."""
        return self.read_items([name for name in COLUMNS if name != "row"])

    @cached_property
    def carried(self) -> list[str]:
        """Columns of items.parquet that are the user's, such as a brand or a price."""
        path = self.folder.file(ITEMS)
        with corrupt_error(path):
            return [name for name in pq.read_schema(path).names if name not in COLUMNS]

    def files(self, modalities: Sequence[str]) -> list[str]:
        """Names of items.parquet and of the vectors of some modalities, in order."""
        return [ITEMS, *(name for m in modalities for name in self.folder.names(f"{m}-*.npy"))]

    def rows(self, modality: str) -> Rows:
        """The vectors of a modality, memory-mapped.

        Raises Corrupt for a file that is not as it was written, or holds no rows like the others'.
        """
        names = self.files([modality])[1:]
        self.folder.compare(names)
        return open_rows([self.path / name for name in names])

    def read_items(
        self, columns: Sequence[str] | None = None, with_rejected: bool = False
    ) -> pd.DataFrame:
        """The embedded items of items.parquet, table row r being vector row r.

        columns: those to read, all by default; each text of split and label_group is held once.
        with_rejected: the postings that have no vector row come after the items.
        Raises Corrupt when the file is not as it was written or its rows are not 0 to N - 1.
        """
        path = self.folder.file(ITEMS)
        with corrupt_error(path):
            table = pq.read_table(
                path,
                columns=None if columns is None else ["row", *columns],
                read_dictionary=["split", "label_group"],
            ).to_pandas(split_blocks=True, self_destruct=True)
            items = table[table.row >= 0].sort_values("row")
        if not np.array_equal(items.row, np.arange(len(items))):
            raise Corrupt(f"{path}: rows are not 0 to {len(items) - 1}, each once; {AGAIN}")
        if with_rejected:
            items = pd.concat([items, table[table.row < 0]])
        return items.drop(columns="row").reset_index(drop=True)


def open_rows(paths: Sequence[Path]) -> Rows:
    """The files of one modality, memory-mapped: rows (N, D), all float16 or all float32.

    Raises Corrupt, which names the file, for anything else.
    """
    parts: list[np.ndarray] = []
    for path in paths:
        with corrupt_error(path):
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        first = parts[0] if parts else part
        if part.ndim != 2 or part.dtype not in DTYPES or not part.shape[1]:
            raise Corrupt(f"{path}: {part.dtype} {part.shape} is no block of vectors; {AGAIN}")
        if (part.shape[1], part.dtype) != (first.shape[1], first.dtype):
            raise Corrupt(
                f"{path}: rows of {part.shape[1]} {part.dtype}, in {paths[0].name} of "
                f"{first.shape[1]} {first.dtype}; {AGAIN}"
            )
        parts.append(part)
    return Rows(parts)


def part_path(out: Path, modality: str, number: int) -> Path:
    """The file of block `number` of a modality."""
    return out / f"{modality}-{number:05d}.npy"
