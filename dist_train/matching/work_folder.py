"""What the workers of a join share on disk: claims, committed block pairs, the score floor.

No worker waits for another: each claims the next free block pair, commits its files and continues.
A claim is a file lock that the system frees when its holder dies. On a file system without locks
two workers may score the same block pair and write the same files.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd

from shards.storage.errors import Corrupt
from shards.storage.files import read_json, write_json, write_parquet
from shards.storage.lock import NO_LOCKS, locked
from shards.storage.stage_files import WORK

EDGES = np.arange(-1_000, 1_001).astype(np.float32) / np.float32(1_000)
"""The grid of scores: lower edges of the histogram's steps, and what the score floor may be."""
SELDOM = 50
"""The records of other workers are read again after so many times the seconds a reading takes."""
LOCKED = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class Record(TypedDict):
    """A committed block pair: its area, the files of its pairs and the coarse pass's errors."""

    area: int
    files: int
    histogram: list[list[int]]
    """[[step, count], ...]: how many scores lie in each step of the grid."""
    error: float
    margin: float
    checked: int


class WorkFolder:
    """The folder of a join: `pairs/`, and `.work/` until it is finished."""

    def __init__(self, out: Path) -> None:
        self.hidden, self.lock = out / WORK, out / WORK / "lock"
        self.pairs, self.committed = out / "pairs", self.hidden / "block_pairs"
        self.nearest = self.hidden / "nearest"
        self._records: dict[int, Record] = {}
        self._counts = np.zeros(len(EDGES), np.int64)
        self._next_reading = 0.0

    def clear(self) -> None:
        """Remove `.work/`, after any worker that is setting up just now."""
        with locked(self.lock):
            shutil.rmtree(self.hidden, ignore_errors=True)

    def pairs_path(self, block_pair: int, file: int) -> Path:
        """The path of a file of a block pair's scored pairs."""
        more = f"-{file:03d}" if file else ""
        return self.pairs / f"{block_pair:05d}{more}.parquet"

    def is_done(self, block_pair: int) -> bool:
        """Whether the block pair is committed."""
        done = block_pair in self._records
        return done or (self.committed / f"{block_pair:05d}.json").exists()

    def commit(self, block_pair: int, record: Record, nearest: pd.DataFrame | None) -> None:
        """Write the neighbours that a block pair found and, last of its files, its record."""
        if nearest is not None and len(nearest):
            write_parquet(self.nearest / f"{block_pair:05d}.parquet", nearest)
        write_json(self.committed / f"{block_pair:05d}.json", record)

    def records(self) -> dict[int, Record]:
        """The records of the committed block pairs by number; new ones are read, and counted."""
        begin = time.monotonic()
        for path in self.committed.glob("?????*.json"):
            if int(path.stem) not in self._records:
                record: Record = read_json(path)
                bins = np.asarray(record["histogram"], np.int64).reshape(-1, 2)
                np.add.at(self._counts, bins[:, 0], bins[:, 1])
                # Of half a million block pairs the histograms would fill the memory.
                record["histogram"] = []
                self._records[int(path.stem)] = record
        now = time.monotonic()
        self._next_reading = now + SELDOM * (now - begin)
        return self._records

    @contextmanager
    def claim(self, block_pair: int) -> Iterator[bool]:
        """Hold a block pair if no other worker does; yields whether this worker holds it."""
        path = self.hidden / "claims" / f"{block_pair:05d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        ours = True
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                ours = error.errno not in LOCKED
                if ours and error.errno not in NO_LOCKS:
                    raise
            yield ours
        finally:
            os.close(descriptor)

    def score_floor(self, lowest: float, budget: float, highest: float) -> float:
        """The lowest score kept: `lowest`, raised while more than `budget` pairs reach it.

        It is raised no higher than `highest`. As a function of the committed pairs alone it only
        rises as they grow, so what is left out on the way is below the floor that all block pairs
        together give: their order does not matter, and a stale floor keeps more, never less.
        """
        if time.monotonic() >= self._next_reading:
            self.records()
        above = np.cumsum(self._counts[::-1])[::-1]
        fits = np.flatnonzero(above <= budget)
        step = fits[0] if len(fits) else len(EDGES) - 1
        raised = float(EDGES[step]) if above[0] > budget else lowest
        return min(max(lowest, raised), max(lowest, highest))


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A Parquet file of the join, or some columns of it. Raises Corrupt when it is broken."""
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:
        raise Corrupt(
            f"{path}: cannot be read ({error}); remove it and its folder's .work/block_pairs "
            "entry, and join again"
        ) from None
