"""Photos that are equal or nearly: a copy saved again, resized, trimmed, brightened, stamped.

Two photos are near-duplicates when their bytes are equal, or when both their perceptual hashes and
their colours are close: the hash alone sees no colours and takes the red and the blue one of a
product for the same. The bounds are measured, see docs/design/near-duplicates.md.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from struct import Struct

import numpy as np

from shards.duplicates.hamming import Blocks, Pairs, near_pairs, pieces

RADIUS = 6
"""Bits of 64 in which the perceptual hashes of near-duplicates may differ."""
COLOURS = 3
"""Mean difference of the colours of near-duplicates, in levels of 256, at equal brightness."""
BRIGHTNESS = 16
"""Levels of 256 by which near-duplicates may differ in brightness."""

CHANNELS = 27
SIGNATURE_DTYPE = np.dtype([("row", "<i8"), ("hash", "<u8"), ("colours", "u1", (CHANNELS,))])
"""A photo's signature: its row, perceptual hash, and the mean colours of 3 × 3 cells."""
AS_BYTES = Struct(f"<qQ{CHANNELS}s")  # one of SIGNATURE_DTYPE
PAIRS_AT_ONCE = 50_000


def near_duplicate_pairs(photos: Path) -> Iterator[Pairs]:
    """Yield rows (i, j) that connect all near-duplicates among photos of different signatures.

    photos: a file of SIGNATURE_DTYPE. Not every pair of near-duplicates is yielded, but the
    yielded pairs have the same connected components. Files lie beside `photos` meanwhile; memory
    does not grow with them.
    """
    for piece, within in pieces(photos, SIGNATURE_DTYPE, RADIUS):
        labels, colours = np.arange(len(piece)), piece["colours"]
        for i, j in _near(piece["hash"], within):
            apart = labels[i] != labels[j]
            i, j = i[apart], j[apart]
            found = alike(colours[i], colours[j])
            _join(labels, i[found], j[found])
        joined = np.flatnonzero(labels != np.arange(len(piece)))
        yield piece["row"][joined], piece["row"][labels[joined]]


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the colours (n, CHANNELS) are those of near-duplicates."""
    apart = one.astype(np.int16) - other
    # The median: a logo in one cell must not count as brightness of the others.
    middle = CHANNELS // 2
    brightness = np.partition(apart, middle, axis=1)[:, middle]
    rest = np.abs(apart - brightness[:, None]).sum(axis=1)
    return (rest <= COLOURS * CHANNELS) & (np.abs(brightness) <= BRIGHTNESS)


def _near(hashes: np.ndarray, within: Blocks) -> Iterator[Pairs]:
    """Yield (i, j) of all pairs of the hashes (n,) within RADIUS, PAIRS_AT_ONCE at most at a time.

    `within` restricts them as in `near_pairs`.
    """
    # Many similar photos have few distinct hashes: the hashes are compared, not the photos.
    distinct, which, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    members = np.argsort(which, kind="stable")
    start = np.cumsum(sizes) - sizes
    repeated = np.flatnonzero(sizes > 1)
    if any(block != place for place, block in enumerate(within)):
        repeated = repeated[:0]  # equal hashes agree already in the first blocks
    for a, b in chain([(repeated, repeated)], near_pairs(distinct, RADIUS, within)):
        # All pairs of a member of hash a and a member of hash b, numbered 0 to total - 1.
        counts = sizes[a] * sizes[b]
        ends = np.cumsum(counts)
        total = int(counts.sum())
        for begin in range(0, total, PAIRS_AT_ONCE):
            number = np.arange(begin, min(begin + PAIRS_AT_ONCE, total))
            pair = np.searchsorted(ends, number, side="right")
            place = number - ends[pair] + counts[pair]
            one, other = a[pair], b[pair]
            i = start[one] + place // sizes[other]
            j = start[other] + place % sizes[other]
            once = i < j if a is b else slice(None)
            yield members[i[once]], members[j[once]]


def _join(labels: np.ndarray, i: np.ndarray, j: np.ndarray) -> None:
    """Give the components that the pairs (i, j) connect the smallest of their labels, in place.

    labels (n,): each names the smallest member of its component (Shiloach and Vishkin 1982).
    """
    while len(i):
        one, other = labels[i], labels[j]
        apart = one != other
        i, j, one, other = i[apart], j[apart], one[apart], other[apart]
        np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(further := labels[labels], labels):
            labels[:] = further
