"""All pairs of 64-bit hashes within a Hamming distance: exact, in memory that N alone sets.

Pigeonhole: cut the 64 bits into radius + EQUAL blocks. Two hashes that differ in at most
`radius` bits agree in at least EQUAL whole blocks, so it is enough to compare, for every choice
of EQUAL blocks, the hashes that agree in them (Manku, Jain, Sarma: Detecting near-duplicates for
web crawling, WWW 2007, §3).
"""

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

BITS = 64
# Blocks that have to agree: at radius 6 they hold 21 bits, so that a million hashes that have
# nothing to do with one another give buckets of one.
EQUAL = 3

Pairs = tuple[np.ndarray, np.ndarray]


def near_pairs(hashes: np.ndarray, radius: int) -> Iterator[Pairs]:
    """Yield (i, j), int64 positions in `hashes` (N,) uint64: every pair within `radius` bits, once.

    No yielded array is longer than N. Time grows with the pairs that agree in EQUAL blocks, so
    with the square of the largest crowd of alike hashes; equal ones should be merged before.
    Raises ValueError for a radius outside 0 to 32.
    """
    if not 0 <= radius <= BITS // 2:
        raise ValueError(f"radius: {radius}, must be 0 to {BITS // 2}")
    edges = [round(BITS * block / (radius + EQUAL)) for block in range(radius + EQUAL + 1)]
    blocks = list(pairwise(edges))
    for chosen in combinations(range(len(blocks)), EQUAL):
        together = _mask([blocks[b] for b in chosen])
        # A pair is reported where its first agreeing blocks are the chosen ones, nowhere else.
        others = [_mask([blocks[b]]) for b in range(chosen[-1]) if b not in chosen]
        for i, j in _sharing(_key(hashes, [blocks[b] for b in chosen])):
            differing = hashes[i] ^ hashes[j]
            found = np.flatnonzero(np.bitwise_count(differing) <= radius)
            differing = differing[found]
            first = (differing & together) == 0
            for other in others:
                first &= (differing & other) != 0
            if first.any():
                yield i[found[first]], j[found[first]]


def _mask(blocks: list[tuple[int, int]]) -> np.uint64:
    return np.uint64(sum((1 << end) - (1 << start) for start, end in blocks))


def _key(hashes: np.ndarray, blocks: list[tuple[int, int]]) -> np.ndarray:
    """(N,) uint64: the bits of the blocks side by side, the last ones first."""
    key = np.zeros_like(hashes)
    width = 0
    for start, end in blocks:
        key |= ((hashes >> np.uint64(start)) & _mask([(0, end - start)])) << np.uint64(width)
        width += end - start
    return key


def _sharing(keys: np.ndarray) -> Iterator[Pairs]:
    """Every pair of positions with equal low bits of their keys, as many as fit beside N."""
    # One sort of (key, position) in a word: a quarter of the time of an argsort.
    bits = np.uint64(max(1, len(keys).bit_length()))
    ordered = np.sort(keys << bits | np.arange(len(keys), dtype=np.uint64))
    position = (ordered & _mask([(0, int(bits))])).astype(np.int64)
    ordered >>= bits
    left = np.flatnonzero(ordered[:-1] == ordered[1:])
    ends = np.searchsorted(ordered, ordered[left], side="right")
    step = 1
    while len(left):  # neighbours in the sorted order first, then those further apart
        yield position[left], position[left + step]
        step += 1
        further = left + step < ends
        left, ends = left[further], ends[further]
