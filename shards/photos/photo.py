"""One photo, from untrusted bytes to the sRGB JPEG that is stored."""

import hashlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from shards.photos.decode import (
    MAX_PIXELS,
    bound_by,
    decode_jpeg,
    is_srgb,
    open_photo,
    orientation,
    refused,
    rgb_pixels,
)
from shards.photos.find import find_photo
from shards.photos.jpeg import Coded, coded_picture
from shards.photos.options import PackOptions
from shards.photos.remarks import EMPTY, LARGE_FILE, LONG, UNREADABLE_FILE, PhotoRefused

MAX_BYTES = 256 * 2**20
LONGEST_JPEG = 65_500
"""Pixels of the longest side that libjpeg encodes and decodes."""
HASHED = 32
# Less is faster, but finds fewer copies with a logo in a corner: 0.838 at 64, 0.850 at 384.
SIGNATURE_SIDE = 384
"""Least pixels of the short side from which the signature of a coded image is computed."""
GREY = np.array([77, 150, 29])
"""Weights of ITU-R BT.601 in 256ths."""
COSINES = np.cos(np.outer(np.arange(8), np.arange(HASHED) + 0.5) * np.pi / HASHED)
# Integers: a hash is stored in the tar, and sums of floats differ between processors.
DCT = np.round(COSINES * 2**12).astype(np.int64)


@dataclass(frozen=True)
class Photo:
    """A stored photo and its facts; sha256 is of the original bytes, width and height stored.

    `phash` (16 hex digits) and `colours` (54) are its signature: the perceptual hash and the mean
    colours of 3 × 3 cells.
    """

    jpeg: bytes
    width: int
    height: int
    sha256: str
    phash: str
    colours: str


def photo_facts(photo: Photo | None) -> dict[str, Any]:
    """What items.parquet holds of a posting's photo; empty and 0 where it has none."""
    facts: dict[str, Any] = asdict(photo or Photo(b"", 0, 0, "", "", ""))
    del facts["jpeg"]
    return facts | {"has_image": photo is not None}


def load_photo(root: Path, name: str, options: PackOptions) -> Photo:
    """Read `name` below `root` and prepare it; raises PhotoRefused with the reason."""
    path = find_photo(root, name, options.follow_links)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PhotoRefused(f"file larger than {MAX_BYTES} bytes", LARGE_FILE)
        return prepare_photo(path.read_bytes(), options)
    except OSError as error:
        raise PhotoRefused(f"cannot be read: {error.strerror}", UNREADABLE_FILE) from None


def prepare_photo(data: bytes, options: PackOptions) -> Photo:
    """Decode, turn, convert to sRGB, reduce to the short side `options.size` and encode.

    A JPEG that needs none of it keeps its coded image. Raises PhotoRefused for what cannot be used.
    """
    if not data:
        raise PhotoRefused(EMPTY)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        with bound_by(options.max_pixels):
            if not options.keep and (found := _unchanged(data, options)) is not None:
                coded, pixels = found
                return Photo(coded.jpeg, coded.width, coded.height, sha256, *_signature(pixels))
            image = open_photo(data, options.max_pixels)
            width, height = image.size
            is_rgb_jpeg = image.format == "JPEG" and image.mode == "RGB"
            is_final = is_rgb_jpeg and not image.info.get("icc_profile") and orientation(image) == 1
            # Readers refuse photos over their cap, however high the packer's own is.
            keep = options.keep and is_final and width * height <= MAX_PIXELS
            # Decoded at half the size where that leaves 5/4 of the stored size, else at twice the
            # stored size: as close to a full decode as without; figures in docs/design/photos.md.
            half, short = min(width, height) // 2, min(options.size, width, height)
            if not keep and max(width, height) * short > LONGEST_JPEG * min(width, height):
                raise PhotoRefused(f"{width} x {height} pixels, {LONG}", LONG)
            least = half if 5 * short <= 4 * half < 8 * short else 2 * short
            pixels = rgb_pixels(data, image, short, least)
            if keep:
                return Photo(data, width, height, sha256, *_signature(pixels))
            rgb, (height, width) = np.ascontiguousarray(pixels), pixels.shape[:2]
            jpeg = simplejpeg.encode_jpeg(rgb, options.quality, "RGB", "420", fastdct=False)
            return Photo(jpeg, width, height, sha256, *_signature(pixels))
    except Exception as error:
        raise refused(error) from None


def _unchanged(data: bytes, options: PackOptions) -> tuple[Coded, np.ndarray] | None:
    """The coded image of a JPEG that needs no change, and its pixels; None for any other."""
    coded = coded_picture(data, options.size)
    if coded is None or coded.width * coded.height > options.max_pixels:
        return None
    if coded.had_metadata:
        image = open_photo(data, options.max_pixels)
        if orientation(image) != 1 or not is_srgb(image.info.get("icc_profile")):
            return None
    # All coded data is read at any scale, so that damage or a missing end is found here.
    with suppress(ValueError):
        return coded, decode_jpeg(coded.jpeg, SIGNATURE_SIDE)
    return None  # Pillow may tolerate the damage or not


def _signature(pixels: np.ndarray) -> tuple[str, str]:
    """The perceptual hash and the mean colours of RGB pixels (h, w, 3), in hex.

    64-bit DCT hash: whether each of the 8 x 8 lowest frequencies is above their median. Colours:
    means of 3 × 3 cells, row by row, 27 bytes.
    """
    sums = cv2.integral(pixels)
    totals, areas = _cells(sums, HASHED)
    grey = totals.astype(np.int64) @ GREY // areas
    low = (DCT @ grey @ DCT.T).ravel()
    # The mean brightness is no feature: only the other 63 set the median.
    phash = np.packbits(low > np.sort(low[1:])[31])
    totals, areas = _cells(sums, 3)
    areas = areas[..., None]
    colours = ((totals.astype(np.int64) + areas // 2) // areas).astype(np.uint8)
    return phash.tobytes().hex(), colours.tobytes().hex()


def _cells(sums: np.ndarray, across: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums (across, across, 3) over the cells of a grid, and their areas in pixels.

    sums: (h + 1, w + 1, 3) int32, of all pixels above and to the left (cv2.integral).
    """
    places, sides = np.arange(across + 1), []
    for axis in (0, 1):
        pixels = sums.shape[axis] - 1
        first, end = places[:-1] * pixels // across, -(-places[1:] * pixels // across)
        # Sums of a very long photo overflow 32 bits, which the differences undo.
        sums = sums.take(end, axis) - sums.take(first, axis)
        sides.append(end - first)
    return sums, np.outer(*sides)
