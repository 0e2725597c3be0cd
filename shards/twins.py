"""Photos that are the same or nearly: a copy saved again, resized, trimmed, brightened, stamped.

Two photos are twins when their bytes are equal, or when both their perceptual hashes and their
colours are close: the hash alone sees no colours and takes the red and the blue one of a product
for one photo. The bounds are measured, see docs/twins.md.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from shards.near import Blocks, Pairs, near_pairs, pieces

RADIUS = 6
"""Bits of 64 in which the perceptual hashes of twins may differ."""
COLOURS = 3
"""Mean difference of the colours of twins, in levels of 256, once their brightness is equal."""
BRIGHTNESS = 16
"""Levels of 256 by which twins may differ in brightness."""

CHANNELS = 27
LOOKS = np.dtype([("row", "<i8"), ("hash", "<u8"), ("colours", "u1", (CHANNELS,))])
NO_PHOTO = -1

JOINS_AT_ONCE = 200_000
PAIRS_AT_ONCE = 50_000


def looks(rows: Sequence[int], phash: Sequence[str], colours: Sequence[str]) -> np.ndarray:
    """(n,) LOOKS, 43 bytes a photo, of two columns of hex digits.

    Raises ValueError for text that is not hex of the right length.
    """
    found = np.zeros(len(rows), LOOKS)
    found["row"] = rows
    found["hash"] = [int(text, 16) for text in phash]
    levels = bytes.fromhex("".join(colours))
    found["colours"] = np.frombuffer(levels, np.uint8).reshape(-1, CHANNELS)
    return found


def twins(photos: Path) -> Iterator[Pairs]:
    """Yield rows (i, j) that connect all twins among photos that all look different.

    photos: a file of LOOKS. Not every two twins are told, but all that are connected by pairs of
    twins are connected by what is yielded. Files lie beside `photos` meanwhile; memory does not
    grow with them.
    """
    for piece, within in pieces(photos, LOOKS, RADIUS):
        labels = np.arange(len(piece))
        _join_twins(labels, piece, within)
        joined = np.flatnonzero(labels != np.arange(len(piece)))
        yield piece["row"][joined], piece["row"][labels[joined]]


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the colours (n, CHANNELS) are those of twins."""
    apart = one.astype(np.int16) - other
    # The median: a logo in one cell must not count as brightness of the others.
    middle = CHANNELS // 2
    brightness = np.partition(apart, middle, axis=1)[:, middle]
    rest = np.abs(apart - brightness[:, None]).sum(axis=1)
    return (rest <= COLOURS * CHANNELS) & (np.abs(brightness) <= BRIGHTNESS)


def _join_twins(labels: np.ndarray, photos: np.ndarray, within: Blocks) -> None:
    """Join the labels (n,) of twins among `photos` (n,), as far as `within` leaves them."""
    colours = photos["colours"]
    none = np.zeros(0, np.int64)
    held, waiting = [(none, none)], 0
    for i, j in _near(photos["hash"], within):
        apart = labels[i] != labels[j]
        i, j = i[apart], j[apart]
        found = alike(colours[i], colours[j])
        held.append((i[found], j[found]))
        waiting += 1 + int(found.sum())
        if waiting >= JOINS_AT_ONCE:
            _join(labels, *_together(held))
            held, waiting = held[:1], 0
    _join(labels, *_together(held))


def _near(hashes: np.ndarray, within: Blocks) -> Iterator[Pairs]:
    """Yield (i, j) of every two of the hashes (n,) within RADIUS, PAIRS_AT_ONCE and fewer."""
    # A crowd of alike photos has few hashes: they are compared, not its photos.
    distinct, which, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    members = np.argsort(which, kind="stable")
    start = np.cumsum(sizes) - sizes
    crowds = np.flatnonzero(sizes > 1)
    if any(block != place for place, block in enumerate(within)):
        crowds = crowds[:0]  # equal hashes agree in the first blocks already
    for a, b in chain([(crowds, crowds)], near_pairs(distinct, RADIUS, within)):
        for pair, place in _in_parts(sizes[a] * sizes[b]):
            one, other = a[pair], b[pair]
            i = start[one] + place // sizes[other]
            j = start[other] + place % sizes[other]
            once = i < j if a is b else slice(None)
            yield members[i[once]], members[j[once]]


def _in_parts(counts: np.ndarray) -> Iterator[Pairs]:
    """Yield (k, place) for all places 0 to counts[k] - 1 of every k, PAIRS_AT_ONCE at a time."""
    ends = np.cumsum(counts)
    for begin in range(0, int(ends[-1]) if len(ends) else 0, PAIRS_AT_ONCE):
        flat = np.arange(begin, min(begin + PAIRS_AT_ONCE, int(ends[-1])))
        k = np.searchsorted(ends, flat, side="right")
        yield k, flat - ends[k] + counts[k]


def _together(pairs: list[Pairs]) -> list[np.ndarray]:
    return [np.concatenate(side) for side in zip(*pairs, strict=True)]


def _join(labels: np.ndarray, i: np.ndarray, j: np.ndarray) -> None:
    """Give the components that the pairs connect the smallest of their labels, in place.

    labels (n,): each names the smallest member of its component (Shiloach and Vishkin 1982).
    """
    while len(i):
        one, other = labels[i], labels[j]
        apart = one != other
        i, j, one, other = i[apart], j[apart], one[apart], other[apart]
        np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(further := labels[labels], labels):
            labels[:] = further
