"""Stored rows read from their files."""

import numpy as np

from dist_train.embedding.store import Rows


def read_rows(rows: Rows, wanted: range | np.ndarray) -> np.ndarray:
    """The stored rows (n, D) in their own dtype, by row number ascending.

    Files are read, not mapped: the pages of a map would stay in the memory of the process.
    """
    out = np.empty((len(wanted), rows.width), rows.parts[0].dtype)
    numbers = np.asarray(wanted)
    edges = np.searchsorted(numbers, [0, *rows.ends])
    for part, end, first, last in zip(rows.parts, rows.ends, edges, edges[1:], strict=False):
        if first < last:
            mine = numbers[first:last] - (end - len(part))
            out[first:last] = _read(part, int(mine[0]), int(mine[-1]) + 1)[mine - mine[0]]
    return out


def _read(part: np.ndarray, start: int, stop: int) -> np.ndarray:
    if not isinstance(part, np.memmap) or part.filename is None:
        return part[start:stop]
    width = part.shape[1]
    offset = part.offset + start * width * part.itemsize
    flat = np.fromfile(part.filename, part.dtype, (stop - start) * width, offset=offset)
    return flat.reshape(-1, width)
