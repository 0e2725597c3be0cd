"""An embedding set on disk: blocks of unit rows beside the table of the catalogue's postings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dist_train.config.training import Modality
from dist_train.distributed.stage import EMBEDDING
from shards.storage import stage_files
from shards.storage.errors import Corrupt

MODALITIES: tuple[Modality, ...] = ("image", "text")


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
        self.path = path
        self.manifest = stage_files.open_finished(path, EMBEDDING)
        for name, facts in self.manifest["files"].items():
            file = path / name
            if not file.exists() or file.stat().st_size != facts["bytes"]:
                raise Corrupt(f"{file}: missing or not as long as it was written; embed again")
        self.modalities = [
            modality for modality in MODALITIES if f"{modality}-00000.npy" in self.manifest["files"]
        ]

    @cached_property
    def items(self) -> pd.DataFrame:
        """The embedded items with all their columns, table row r being vector row r."""
        return read_items(self.path)

    def rows(self, modality: str) -> Rows:
        """The vectors of a modality, memory-mapped; Corrupt when a file cannot be read."""
        parts = []
        for name in sorted(n for n in self.manifest["files"] if n.startswith(f"{modality}-")):
            with corrupt_error(self.path / name) as path:
                parts.append(np.load(path, mmap_mode="r"))
        return Rows(parts)


def read_items(
    embeddings: Path, columns: Sequence[str] | None = None, with_rejected: bool = False
) -> pd.DataFrame:
    """The embedded items of items.parquet, table row r being vector row r.

    columns: those to read, all by default; each text of split and label_group is held once.
    with_rejected: the postings that have no vector row come after the items.
    Raises Corrupt when the file cannot be read or its rows are not 0 to N - 1, each once.
    """
    with corrupt_error(embeddings / "items.parquet") as path:
        table = pq.read_table(
            path,
            columns=None if columns is None else ["row", *columns],
            read_dictionary=["split", "label_group"],
        ).to_pandas(split_blocks=True, self_destruct=True)
    items = table[table.row >= 0].sort_values("row")
    if not np.array_equal(items.row, np.arange(len(items))):
        raise Corrupt(f"{path}: rows are not 0 to {len(items) - 1}, each once; embed again")
    if with_rejected:
        items = pd.concat([items, table[table.row < 0]])
    return items.drop(columns="row").reset_index(drop=True)


@contextmanager
def corrupt_error(path: Path) -> Iterator[Path]:
    """Raise Corrupt, which names `path`, for a file of an embedding set that cannot be read."""
    try:
        yield path
    except (OSError, ValueError, KeyError) as error:
        raise Corrupt(f"{path}: cannot be read ({error}); embed again") from None


def part_path(out: Path, modality: str, number: int) -> Path:
    """The file of block `number` of a modality."""
    return out / f"{modality}-{number:05d}.npy"
