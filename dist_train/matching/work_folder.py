"""What the workers of a join share on disk: who does which tile, what is done, the floor.

Nobody waits for anybody: a worker takes the next tile that is free, commits it as files and looks
again. A claim is a file lock that the system frees when its holder dies; on a file system without
locks two workers may do the same tile, and write the same pairs.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from shards.storage.errors import Corrupt
from shards.storage.files import read_json, write_json, write_parquet
from shards.storage.lock import locked
from shards.storage.stage_files import MANIFEST

GRID = 1_000
"""Steps of the floor in a unit of score."""
EDGES = np.arange(-GRID, GRID + 1).astype(np.float32) / np.float32(GRID)
SELDOM = 50
"""The records of others are looked for once in so many times as long as that takes."""
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class Work:
    """The folder of a join: `pairs/`, and `.work/` until it is finished."""

    def __init__(self, out: Path) -> None:
        self.out, self.hidden = out, out / ".work"
        self.pairs, self.tiles = out / "pairs", out / ".work" / "tiles"
        self.nearest = out / ".work" / "nearest"
        self._records: dict[int, dict[str, Any]] = {}
        self._counts = np.zeros(len(EDGES), np.int64)
        self._look_again = 0.0

    def locked(self) -> AbstractContextManager[None]:
        """Nobody else sets up or clears while this is held."""
        return locked(self.hidden / "lock")

    def clear(self) -> None:
        """Take away what was needed to work; a worker that sets up just now does so before."""
        with self.locked():
            shutil.rmtree(self.hidden, ignore_errors=True)

    def pairs_path(self, tile: int, part: int) -> Path:
        """Where a part of a tile's pairs lies."""
        return self.pairs / (
            f"{tile:05d}.parquet" if part == 0 else f"{tile:05d}-{part:03d}.parquet"
        )

    def is_done(self, tile: int) -> bool:
        """The tile is committed."""
        return tile in self._records or (self.tiles / f"{tile:05d}.json").exists()

    def is_finished(self) -> bool:
        """Some worker has finished the whole of it, and taken away the records of the tiles.

        To be asked after `is_done` has said no: while a tile is not committed nobody can finish.
        """
        return (self.out / MANIFEST).exists()

    def commit(self, tile: int, record: dict[str, Any], nearest: pd.DataFrame | None) -> None:
        """Write what the tile found besides its pairs, its record last."""
        if nearest is not None and len(nearest):
            write_parquet(self.nearest / f"{tile:05d}.parquet", nearest)
        write_json(self.tiles / f"{tile:05d}.json", record)

    def records(self) -> dict[int, dict[str, Any]]:
        """What the committed tiles say of themselves, by number; their histograms are added up."""
        begin = time.monotonic()
        for path in self.tiles.glob("?????*.json"):
            if int(path.stem) not in self._records:
                record = read_json(path)
                bins = np.asarray(record.pop("histogram"), np.int64).reshape(-1, 2)
                np.add.at(self._counts, bins[:, 0], bins[:, 1])
                self._records[int(path.stem)] = record
        now = time.monotonic()
        self._look_again = now + SELDOM * (now - begin)
        return self._records

    @contextmanager
    def claim(self, tile: int) -> Iterator[bool]:
        """Hold a tile if nobody else does; yields whether it is ours."""
        path = self.hidden / "claims" / f"{tile:05d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield _locks(descriptor)
        finally:
            os.close(descriptor)

    def floor(self, lowest: float, budget: float, highest: float) -> float:
        """The lowest score kept: at least `lowest`, raised while more than `budget` pairs are.

        A function of the committed pairs alone that only rises as they grow, so what is left out
        on the way is below the floor that all tiles together give: the order does not matter, and
        a floor of a moment ago keeps more, never less.
        """
        if time.monotonic() >= self._look_again:
            self.records()
        above = np.cumsum(self._counts[::-1])[::-1]
        fits = np.flatnonzero(above <= budget)
        step = fits[0] if len(fits) else len(EDGES) - 1
        raised = float(EDGES[step]) if above[0] > budget else lowest
        return min(max(lowest, raised), max(lowest, highest))


def histogram(scores: np.ndarray) -> list[list[int]]:
    """How many scores lie in each step of the grid: [[step, count], ...]."""
    steps = np.searchsorted(EDGES, scores, side="right") - 1
    found, counts = np.unique(steps.clip(min=0), return_counts=True)
    return np.stack([found, counts], axis=1).tolist()


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A table of the join, or some of its columns; Corrupt names a broken one."""
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:
        raise Corrupt(f"{path}: cannot be read ({error}); remove it and its folder's "
                      ".work/tiles entry, and join again") from None  # fmt: skip


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
    return True
