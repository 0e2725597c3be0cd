"""All pairs of 64-bit hashes within a Hamming distance: exact, in bounded memory.

Pigeonhole: cut the 64 bits into radius + EQUAL blocks. Two hashes that differ in at most
`radius` bits agree in at least EQUAL complete blocks, so it is enough to compare, for every choice
of EQUAL blocks, the hashes that agree in them (Manku, Jain, Sarma: Detecting near-duplicates for
web crawling, WWW 2007, §3).
"""

from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

BITS = 64
# Blocks that must agree: at radius 6 they hold 21 bits, so that of a million unrelated hashes
# about one falls into each bucket.
EQUAL = 3
ROWS = 2**17
"""Rows that are compared at a time; more of them are first partitioned on the disk."""
PARTS = 128

Pairs = tuple[np.ndarray, np.ndarray]
Blocks = tuple[int, ...]


def near_pairs(hashes: np.ndarray, radius: int, within: Blocks = ()) -> Iterator[Pairs]:
    """Yield (i, j), int64 positions in `hashes` (N,) uint64: every pair within `radius` bits, once.

    With `within` only pairs whose first agreeing blocks are those (see `pieces`). No yielded
    array is longer than N. Time grows with the pairs that agree in EQUAL blocks, so with the
    square of the largest group of similar hashes; equal ones should be merged before.
    """
    blocks = _blocks(radius)
    for chosen in combinations(range(len(blocks)), EQUAL):
        if chosen[: len(within)] != within:
            continue
        together = _mask([blocks[b] for b in chosen])
        # A pair is reported only where its first agreeing blocks are the chosen ones.
        others = [_mask([blocks[b]]) for b in range(chosen[-1]) if b not in chosen]
        key, width = np.zeros_like(hashes), 0
        for start, end in (blocks[b] for b in chosen):
            key |= _bits(hashes, start, end) << np.uint64(width)
            width += end - start
        for i, j in _sharing(key):
            differing = hashes[i] ^ hashes[j]
            found = np.flatnonzero(np.bitwise_count(differing) <= radius)
            differing = differing[found]
            first = (differing & together) == 0
            for other in others:
                first &= (differing & other) != 0
            if first.any():
                yield i[found[first]], j[found[first]]


def _sharing(keys: np.ndarray) -> Iterator[Pairs]:
    """Every pair of positions with equal keys (N,), at most N at a time.

    Only as many low bits of the keys are compared as fit into 64 beside a position.
    """
    # One sort of key and position in a word: a quarter of the time of an argsort.
    bits = max(1, len(keys).bit_length())
    ordered = np.sort(keys << np.uint64(bits) | np.arange(len(keys), dtype=np.uint64))
    position = _bits(ordered, 0, bits).astype(np.int64)
    ordered >>= np.uint64(bits)
    left = np.flatnonzero(ordered[:-1] == ordered[1:])
    ends = np.searchsorted(ordered, ordered[left], side="right")
    step = 1
    while len(left):  # neighbours in the sorted order first, then those further apart
        yield position[left], position[left + step]
        step += 1
        further = left + step < ends
        left, ends = left[further], ends[further]


def pieces(
    path: Path, kind: np.dtype, radius: int, within: Blocks = ()
) -> Iterator[tuple[np.ndarray, Blocks]]:
    """Yield (rows, within) such that `near_pairs` of each piece finds every near pair of a file.

    path: records of dtype `kind`, which has the field `hash` (uint64), all that agree in the blocks
    `within`; partitioned copies lie beside it meanwhile. A piece has at most ROWS rows. No pair is
    in two pieces, except within groups of more than ROWS rows that agree in EQUAL blocks.
    """
    blocks = _blocks(radius)
    rows, half = path.stat().st_size // kind.itemsize, ROWS // 2
    if rows <= ROWS:
        yield np.fromfile(path, kind), within
    elif len(within) == EQUAL:
        for starts in combinations(range(0, rows * kind.itemsize, half * kind.itemsize), 2):
            both = [np.fromfile(path, kind, half, offset=start) for start in starts]
            yield np.concatenate(both), within
    else:
        begin = within[-1] + 1 if within else 0
        for block in range(begin, len(blocks) - EQUAL + len(within) + 1):
            for group in _partition(path, kind, *blocks[block]):
                yield from pieces(group, kind, radius, (*within, block))
                group.unlink()


def _blocks(radius: int) -> list[tuple[int, int]]:
    """The (first, last + 1) bit of each of radius + EQUAL blocks."""
    edges = [round(BITS * block / (radius + EQUAL)) for block in range(radius + EQUAL + 1)]
    return list(pairwise(edges))


def _partition(path: Path, kind: np.dtype, start: int, end: int) -> list[Path]:
    """Files beside `path` of its rows: those that agree in the bits `start` to `end` - 1 together.

    Small groups share a file, up to ROWS rows.
    """

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with path.open("rb") as file:
            while len(chunk := np.fromfile(file, kind, max(1, ROWS // 4))):
                part = _bits(chunk["hash"], start, end) % np.uint64(PARTS)
                yield chunk, part.astype(np.int64)

    sizes = np.zeros(PARTS, np.int64)
    for _, part in chunks():
        sizes += np.bincount(part, minlength=PARTS)
    files: list[Path] = []
    file_of, rows = np.zeros(PARTS, np.int64), ROWS
    for number in np.flatnonzero(sizes).tolist():
        if rows + sizes[number] > ROWS:
            files.append(path.with_name(f"{path.name}-{len(files)}"))
            rows = 0
        file_of[number] = len(files) - 1
        rows += int(sizes[number])
    for chunk, part in chunks():
        for number in np.unique(file_of[part]).tolist():
            with files[number].open("ab") as file:
                file.write(chunk[file_of[part] == number].tobytes())
    return files


def _mask(blocks: list[tuple[int, int]]) -> np.uint64:
    return np.uint64(sum((1 << end) - (1 << start) for start, end in blocks))


def _bits(values: np.ndarray, start: int, end: int) -> np.ndarray:
    """Bits `start` to `end` - 1 of uint64 values, as the lowest bits."""
    return (values >> np.uint64(start)) & _mask([(0, end - start)])
