"""A JPEG's own coded picture without what else its file holds: not one pixel changes.

Segments are copied or left out (ITU-T T.81, annex B); the coded data is not touched. Left out are
EXIF with the place where a photo was taken, comments, profiles, small previews, and whatever
stands behind the picture.
"""

from typing import NamedTuple

import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
"""Says that the three components are YCbCr."""
FRAMES = (0xC0, 0xC1)  # sequential, Huffman: what every reader knows and reads fastest
SCAN, TABLES = 0xDA, (0xDB, 0xC4, 0xDD)
FIRST_APP, EXIF, PROFILE, ADOBE, LAST_APP, COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
COMPONENTS = 3
STUFFED = bytes([0, *range(0xD0, 0xD8)])
"""What may follow 0xFF in coded data: it was 0xFF itself, or a restart."""


class Coded(NamedTuple):
    """The coded picture, its size, and whether metadata was left out that may turn or tint it."""

    jpeg: bytes
    width: int
    height: int
    told: bool


def coded_picture(data: bytes, largest: int) -> Coded | None:
    """The picture of an ordinary JPEG (sequential, 8 bits, YCbCr, one scan); None for any other.

    None too when its short side is more than `largest` pixels. Whether the coded data itself is
    whole is not looked at: decode what is returned.
    """
    if data[:2] != START:
        return None
    parts, size, told, at = [START, JFIF], (0, 0), False, 2
    while True:
        marker, length = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at : at + 2 + length]
        if data[at : at + 1] != b"\xff" or length < 2 or len(segment) != 2 + length:
            return None
        kind, at = marker[0], at + 2 + length
        if kind == SCAN:
            end = _scan_end(data, segment, at)
            if end is None or size == (0, 0):
                return None
            return Coded(b"".join([*parts, segment, data[at:end], END]), *size, told)
        if kind in FRAMES:
            if not _is_ordinary(segment):
                return None
            size = int.from_bytes(segment[7:9], "big"), int.from_bytes(segment[5:7], "big")
            if min(size) > largest:
                return None
            parts.append(segment)
        elif kind in TABLES:
            parts.append(segment)
        elif kind == ADOBE and segment[4:9] == b"Adobe" and segment[15:16] != b"\x01":
            return None  # RGB as it is
        elif FIRST_APP <= kind <= LAST_APP or kind == COMMENT:
            told |= kind in (EXIF, PROFILE)
        else:
            return None


def _is_ordinary(frame: bytes) -> bool:
    """8 bits a sample, three components under the names that YCbCr has in JFIF, and a size."""
    known = frame[4] == 8 and frame[9] == COMPONENTS and len(frame) == 10 + 3 * COMPONENTS
    return known and frame[10::3] == b"\x01\x02\x03" and 0 not in (frame[5:7], frame[7:9])


def _scan_end(data: bytes, scan: bytes, begin: int) -> int | None:
    """Where the coded data ends that begins at `begin`; None unless it is all of the picture."""
    end = len(data) - 2 if data.endswith(END) else data.find(END, begin)
    if end < begin or scan[4] != COMPONENTS:
        return None
    coded = np.frombuffer(data, np.uint8, end + 1 - begin, begin)
    followed = coded[np.flatnonzero(coded[:-1] == 0xFF) + 1].tobytes()
    return None if followed.strip(STUFFED) else end
