"""Photos that are the same or nearly: a copy saved again, resized, trimmed, brightened, stamped.

Two photos are twins when their bytes are equal, or when both their perceptual hashes and their
colours are close: the hash alone sees no colours and takes the red and the blue one of a product
for one photo. The bounds are measured, see docs/twins.md. Twins of twins stand in one photo
group: no pair of twins is ever cut, at the price that the ends of a chain may look less alike.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from shards.near import Pairs, near_pairs

RADIUS = 6
"""Bits of 64 in which the perceptual hashes of twins may differ."""
COLOURS = 3
"""Mean difference of the colours of twins, in levels of 256, once their brightness is equal."""
BRIGHTNESS = 16
"""Levels of 256 by which twins may differ in brightness."""

CHANNELS = 27
FINGERPRINT = np.dtype([("sha256", "<u8"), ("phash", "<u8"), ("colours", "u1", (CHANNELS,)),
                        ("has_photo", "?"), ("has_looks", "?")])  # fmt: skip
NO_PHOTO = -1

JOINS_AT_ONCE = 200_000
PAIRS_AT_ONCE = 50_000


def fingerprints(sha256: Sequence[str], phash: Sequence[str], colours: Sequence[str]) -> np.ndarray:
    """(n,) FINGERPRINT, 45 bytes a row, of three columns of hex digits; parts may be joined.

    An empty sha256 is a posting without a photo; an empty phash or colours is a photo of which
    the bytes alone are compared. Raises ValueError for text that is not hex of the right length.
    """
    prints = np.zeros(len(sha256), FINGERPRINT)
    # 64 bits of the 256: that two of a million photos agree by chance has odds of 1 in 37 million.
    prints["sha256"] = [int(text[:16] or "0", 16) for text in sha256]
    prints["phash"] = [int(text or "0", 16) for text in phash]
    blank = "00" * CHANNELS
    levels = bytes.fromhex("".join(text or blank for text in colours))
    prints["colours"] = np.frombuffer(levels, np.uint8).reshape(-1, CHANNELS)
    prints["has_photo"] = [text != "" for text in sha256]
    prints["has_looks"] = [a != "" and b != "" for a, b in zip(phash, colours, strict=True)]
    return prints


def photo_groups(prints: np.ndarray) -> np.ndarray:
    """(N,) int64: the first row of each row's photo group, NO_PHOTO for one without a photo.

    prints: (N,) FINGERPRINT in the order of the catalogue. The groups are the connected
    components of all pairs of twins, every pair found. Memory: some 100 bytes a row more.
    """
    groups = np.full(len(prints), NO_PHOTO, np.int64)
    rows = np.flatnonzero(prints["has_photo"])
    _, looks, look = np.unique(_looks(prints, rows), return_index=True, return_inverse=True)
    _, first, file = np.unique(prints["sha256"][rows], return_index=True, return_inverse=True)
    labels = np.arange(len(looks))
    _join(labels, look, look[first[file]])
    _join_twins(labels, prints[rows[looks]])
    start = np.full(len(looks), len(prints))
    np.minimum.at(start, labels[look], rows)
    groups[rows] = start[labels[look]]
    return groups


def _looks(prints: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A number (n,) uint64 of what each photo looks like; of its bytes, where that is unknown."""
    mixed = prints["phash"][rows]
    padded = np.zeros((len(rows), 32), np.uint8)
    padded[:, :CHANNELS] = prints["colours"][rows]
    for word in padded.view("<u8").T:
        mixed = (mixed ^ word) * np.uint64(0x9E3779B97F4A7C15)  # odd: nothing is lost
        mixed ^= mixed >> np.uint64(32)
    return np.where(prints["has_looks"][rows], mixed, ~prints["sha256"][rows])


def _join_twins(labels: np.ndarray, photos: np.ndarray) -> None:
    """Join the labels (n,) of twins among photos that all look different."""
    known = np.flatnonzero(photos["has_looks"])
    colours = photos["colours"]
    held, waiting = [(known[:0], known[:0])], 0
    for i, j in _near(photos["phash"][known]):
        i, j = known[i], known[j]
        apart = labels[i] != labels[j]
        i, j = i[apart], j[apart]
        alike = _alike(colours[i], colours[j])
        held.append((i[alike], j[alike]))
        waiting += 1 + int(alike.sum())
        if waiting >= JOINS_AT_ONCE:
            _join(labels, *_together(held))
            held, waiting = held[:1], 0
    _join(labels, *_together(held))


def _near(hashes: np.ndarray) -> Iterator[Pairs]:
    """Yield (i, j) of every two of the hashes (n,) within RADIUS, PAIRS_AT_ONCE and fewer."""
    # A crowd of alike photos has few hashes: they are compared, not its photos.
    distinct, which, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    members = np.argsort(which, kind="stable")
    start = np.cumsum(sizes) - sizes
    crowds = np.flatnonzero(sizes > 1)
    for a, b in chain([(crowds, crowds)], near_pairs(distinct, RADIUS)):
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


def _alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the colours (n, CHANNELS) are those of twins."""
    apart = one.astype(np.int16) - other
    # The median: a logo in one cell must not count as brightness of the others.
    middle = CHANNELS // 2
    brightness = np.partition(apart, middle, axis=1)[:, middle]
    rest = np.abs(apart - brightness[:, None]).sum(axis=1)
    return (rest <= COLOURS * CHANNELS) & (np.abs(brightness) <= BRIGHTNESS)


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
