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
    Raises ValueError for a radius outside 0 to 32.
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
    path: Path,
    kind: np.dtype,
    radius: int,
    within: Blocks = (),
    first: int = 0,
    rows: int | None = None,
) -> Iterator[tuple[np.ndarray, Blocks]]:
    """Yield (rows, within) such that `near_pairs` of each piece finds every near pair of a file.

    path: records of dtype `kind`, which has the field `hash` (uint64); partitioned copies of it
    lie beside it meanwhile. A piece has at most ROWS rows. No pair is in two pieces, except within
    groups of more than ROWS rows that agree in EQUAL blocks. The recursion narrows the file to
    `rows` rows from row `first` on, which agree in the blocks `within`.
    """
    blocks = _blocks(radius)
    rows = path.stat().st_size // kind.itemsize if rows is None else rows
    if rows <= ROWS:
        yield _read(path, kind, first, rows), within
    elif len(within) == EQUAL:
        half = ROWS // 2
        for starts in combinations(range(first, first + rows, half), 2):
            sizes = (min(half, first + rows - start) for start in starts)
            both = [_read(path, kind, start, n) for start, n in zip(starts, sizes, strict=True)]
            yield np.concatenate(both), within
    else:
        begin = within[-1] + 1 if within else 0
        for block in range(begin, len(blocks) - EQUAL + len(within) + 1):
            apart = path.with_name(f"{path.name}-{block}")
            for start, size in _partition(path, kind, first, rows, blocks[block], apart):
                yield from pieces(apart, kind, radius, (*within, block), start, size)
            apart.unlink()


def _blocks(radius: int) -> list[tuple[int, int]]:
    """The (first, last + 1) bit of each of radius + EQUAL blocks."""
    if not 0 <= radius <= BITS // 2:
        raise ValueError(f"radius: {radius}, must be 0 to {BITS // 2}")
    edges = [round(BITS * block / (radius + EQUAL)) for block in range(radius + EQUAL + 1)]
    return list(pairwise(edges))


def _partition(
    path: Path, kind: np.dtype, first: int, rows: int, block: tuple[int, int], out: Path
) -> list[tuple[int, int]]:
    """Write the rows to `out` so that those which agree in a block lie together.

    Returns the (first row, rows) of each group; small groups are joined up to ROWS rows.
    """

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = max(1, ROWS // 4)
        for begin in range(0, rows, step):
            chunk = _read(path, kind, first + begin, min(step, rows - begin))
            yield chunk, (_bits(chunk["hash"], *block) % np.uint64(PARTS)).astype(np.int64)

    sizes = np.zeros(PARTS, np.int64)
    for _, part in chunks():
        sizes += np.bincount(part, minlength=PARTS)
    ends = np.cumsum(sizes)
    places = ends - sizes
    with out.open("wb") as file:
        for chunk, part in chunks():
            chunk, counts = chunk[np.argsort(part, kind="stable")], np.bincount(part)
            begin = 0
            for number in np.flatnonzero(counts):
                file.seek(int(places[number]) * kind.itemsize)
                file.write(chunk[begin : begin + counts[number]].tobytes())
                begin += counts[number]
                places[number] += counts[number]
    spans: list[tuple[int, int]] = []
    for end, size in zip(ends.tolist(), sizes.tolist(), strict=True):
        if spans and spans[-1][1] + size <= ROWS:
            spans[-1] = (spans[-1][0], spans[-1][1] + size)
        else:
            spans.append((end - size, size))
    return spans


def _read(path: Path, kind: np.dtype, first: int, rows: int) -> np.ndarray:
    return np.fromfile(path, kind, rows, offset=first * kind.itemsize)


def _mask(blocks: list[tuple[int, int]]) -> np.uint64:
    return np.uint64(sum((1 << end) - (1 << start) for start, end in blocks))


def _bits(values: np.ndarray, start: int, end: int) -> np.ndarray:
    """Bits `start` to `end` - 1 of uint64 values, as the lowest bits."""
    return (values >> np.uint64(start)) & _mask([(0, end - start)])
