"""A JPEG's coded image without the rest of its file: not one pixel changes.

Segments are copied or left out (ITU-T T.81, annex B); the coded data is not changed. Left out are
EXIF with the place where a photo was shot, comments, profiles, small previews, and any data
behind the image.
"""

from typing import NamedTuple

import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
"""Declares the three components to be YCbCr."""
FRAMES = (0xC0, 0xC1)  # sequential, Huffman: what every reader supports and reads fastest
SCAN, TABLES = 0xDA, (0xDB, 0xC4, 0xDD)
FIRST_APP, EXIF, PROFILE, ADOBE, LAST_APP, COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
COMPONENTS = 3
STUFFED = bytes([0, *range(0xD0, 0xD8)])
"""What may follow 0xFF in coded data: a zero after a literal 0xFF, or a restart."""


class Coded(NamedTuple):
    """The coded image, its size, and whether EXIF or a profile that may change it was left out."""

    jpeg: bytes
    width: int
    height: int
    had_metadata: bool


def coded_picture(data: bytes, largest: int) -> Coded | None:
    """The image of an ordinary JPEG (sequential, 8 bits, YCbCr, one scan); None for any other.

    None also when its short side is more than `largest` pixels. The coded data itself is not
    checked for damage: decode what is returned.
    """
    if data[:2] != START:
        return None
    segments, size, had_metadata, at = [START, JFIF], (0, 0), False, 2
    while True:
        marker, length = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at : at + 2 + length]
        if data[at : at + 1] != b"\xff" or length < 2 or len(segment) != 2 + length:
            return None
        kind, at = marker[0], at + 2 + length
        if kind == SCAN:
            # The coded data must be of all components and followed by nothing but the end mark.
            end = len(data) - 2 if data.endswith(END) else data.find(END, at)
            if end < at or segment[4] != COMPONENTS or size == (0, 0):
                return None
            coded = np.frombuffer(data, np.uint8, end + 1 - at, at)
            followed = coded[np.flatnonzero(coded[:-1] == 0xFF) + 1].tobytes()
            if followed.strip(STUFFED):
                return None
            return Coded(b"".join([*segments, segment, data[at:end], END]), *size, had_metadata)
        if kind in FRAMES:
            if len(segment) != 10 + 3 * COMPONENTS or segment[4] != 8:
                return None
            # Three components under the names that YCbCr has in JFIF.
            if segment[9] != COMPONENTS or segment[10::3] != b"\x01\x02\x03":
                return None
            size = int.from_bytes(segment[7:9], "big"), int.from_bytes(segment[5:7], "big")
            if 0 in size or min(size) > largest:
                return None
            segments.append(segment)
        elif kind in TABLES:
            segments.append(segment)
        elif kind == ADOBE and segment[4:9] == b"Adobe" and segment[15:16] != b"\x01":
            return None  # RGB without a transform
        elif FIRST_APP <= kind <= LAST_APP or kind == COMMENT:
            had_metadata |= kind in (EXIF, PROFILE)
        else:
            return None
