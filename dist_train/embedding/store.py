"""An embedding set on disk: blocks of unit rows beside the table of the catalogue's postings."""

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.config.options import Modality
from dist_train.distributed.stage import EMBEDDING
from shards.storage import stage_files
from shards.storage.errors import Corrupt

MODALITIES: tuple[Modality, ...] = ("image", "text")


class Rows:
    """The rows of one modality over several memory-mapped blocks."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def width(self) -> int:
        """D, the numbers of a row."""
        return self.parts[0].shape[1]

    def block(self, rows: range) -> np.ndarray:
        """float32 (len(rows), D) of consecutive rows."""
        first, last = bisect.bisect(self.ends, rows.start), bisect.bisect_left(self.ends, rows.stop)
        pieces = []
        for number in range(first, last + 1):
            start = self.ends[number] - len(self.parts[number])
            piece = self.parts[number][max(rows.start - start, 0) : rows.stop - start]
            pieces.append(np.asarray(piece, np.float32))
        return np.concatenate(pieces)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The stored values of any rows (n,) as float64 (n, D): exact for every stored dtype."""
        out = np.empty((len(rows), self.width), np.float64)
        part_of = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(part_of):
            mine = part_of == number
            start = self.ends[number] - len(self.parts[number])
            out[mine] = self.parts[number][rows[mine] - start]
        return out


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
        self.views = [
            modality for modality in MODALITIES if f"{modality}-00000.npy" in self.manifest["files"]
        ]

    @cached_property
    def postings(self) -> pd.DataFrame:
        """items.parquet: one row a catalogue posting; `row` is -1 for a rejected one."""
        with told_corrupt(self.path / "items.parquet") as table:
            return pd.read_parquet(table)

    @cached_property
    def items(self) -> pd.DataFrame:
        """The embedded items, table row r being vector row r."""
        packed = self.postings[self.postings.row >= 0]
        return packed.sort_values("row").reset_index(drop=True)

    def rows(self, modality: str) -> Rows:
        """The vectors of a modality, memory-mapped; Corrupt when a file cannot be read."""
        names, parts = sorted(n for n in self.manifest["files"] if n.startswith(f"{modality}-")), []
        for name in names:
            with told_corrupt(self.path / name) as part:
                parts.append(np.load(part, mmap_mode="r"))
        return Rows(parts)


@contextmanager
def told_corrupt(path: Path) -> Iterator[Path]:
    """Raise Corrupt with its name for a file of an embedding set that cannot be read."""
    try:
        yield path
    except (OSError, ValueError, KeyError) as error:
        raise Corrupt(f"{path}: cannot be read ({error}); embed again") from None


def part_path(out: Path, modality: str, part: int) -> Path:
    """The file of block number `part` of the modality `modality`."""
    return out / f"{modality}-{part:05d}.npy"
