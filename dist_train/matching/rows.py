"""Stored rows read from their files.

Files are read, not mapped: the pages of a map would stay in the memory of the process.
"""

import os

import numpy as np

from dist_train.embedding.store import Rows
from shards.storage.errors import Corrupt


def read_rows(rows: Rows, wanted: range | np.ndarray) -> np.ndarray:
    """The stored rows (n, D) in their own dtype, by row number ascending."""
    out = np.empty((len(wanted), rows.width), rows.parts[0].dtype)
    numbers = np.asarray(wanted)
    edges = np.searchsorted(numbers, [0, *rows.ends])
    for part, end, first, last in zip(rows.parts, rows.ends, edges, edges[1:], strict=False):
        if first < last:
            _read(part, numbers[first:last] - (end - len(part)), out[first:last])
    return out


def finite(rows: Rows, wanted: range | np.ndarray, values: np.ndarray) -> np.ndarray:
    """The `values` (n, D) read of these rows; Corrupt names the first that holds NaN or infinity.

    No score of such a row means anything, and no margin holds for a product it takes part in.
    """
    if not np.isfinite(values).all():
        row = int(np.asarray(wanted)[np.flatnonzero(~np.isfinite(values).all(axis=1))[0]])
        part = int(np.searchsorted(rows.ends, row, side="right"))
        name = getattr(rows.parts[part], "filename", None) or "the rows"
        raise Corrupt(f"{name}: row {row - rows.ends[part] + len(rows.parts[part])} (item {row}) "
                      "holds NaN or infinity; embed again")  # fmt: skip
    return values


def take_rows(rows: Rows, wanted: np.ndarray) -> np.ndarray:
    """Any rows (n,) in any order, float64 (n, D): exact for every stored dtype."""
    numbers, place = np.unique(wanted, return_inverse=True)
    return read_rows(rows, numbers)[place].astype(np.float64)


def _read(part: np.ndarray, numbers: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` (n, D) with ascending rows (n,) of a part, neighbours with one call."""
    if not isinstance(part, np.memmap) or part.filename is None:
        out[:] = part[numbers]
        return
    size = part.shape[1] * part.itemsize
    starts = np.flatnonzero(np.r_[True, np.diff(numbers) != 1])
    flat = out.data.cast("B") if out.size else memoryview(b"")
    descriptor = os.open(part.filename, os.O_RDONLY)
    try:
        for first, last in zip(starts, [*starts[1:], len(numbers)], strict=True):
            _fill(descriptor, flat[first * size : last * size],
                  part.offset + int(numbers[first]) * size, part.filename)  # fmt: skip
    finally:
        os.close(descriptor)


def _fill(descriptor: int, room: memoryview, offset: int, name: object) -> None:
    while len(room):
        count = os.preadv(descriptor, [room], offset)
        if not count:
            raise Corrupt(f"{name}: shorter than when it was opened; embed again")
        room, offset = room[count:], offset + count
