"""One photo, from untrusted bytes to the sRGB JPEG that is stored."""

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from shards.coded import Coded, coded_picture
from shards.options import PackOptions
from shards.pixels import decode_jpeg, encode_jpeg
from shards.srgb import (
    MAX_PIXELS,
    PhotoRefused,
    bound_by,
    is_srgb,
    open_photo,
    orientation,
    refused,
    rgb_pixels,
)

MAX_BYTES = 256 * 2**20
NOT_FOUND = "file not found"
HASHED = 32
# Less is faster, but finds fewer copies with a logo in a corner: 0.838 at 64, 0.850 at 384.
LOOKED_AT = 384
"""Pixels of the short side, at least, from which the looks of a coded picture are told."""
GREY = np.array([77, 150, 29])
"""Weights of ITU-R BT.601 in 256ths."""
COSINES = np.cos(np.outer(np.arange(8), np.arange(HASHED) + 0.5) * np.pi / HASHED)
# Integers: a hash is stored in the tar, and sums of floats differ between processors.
DCT = np.round(COSINES * 2**12).astype(np.int64)


@dataclass(frozen=True)
class Photo:
    """A stored photo and its facts; sha256 is of the original bytes, width and height stored."""

    jpeg: bytes
    width: int
    height: int
    sha256: str
    phash: str
    colours: str


def load_photo(root: Path, name: str, options: PackOptions) -> Photo:
    """Read `name` below `root` and prepare it; raises PhotoRefused with the reason."""
    path = _plain(root, name) or _inside(root, name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PhotoRefused(f"file larger than {MAX_BYTES} bytes")
        return prepare_photo(path.read_bytes(), options)
    except OSError as error:
        raise PhotoRefused(f"cannot be read: {error.strerror}") from None


def is_there(root: Path, name: str) -> bool:
    """Whether `load_photo` would find a file, whatever it holds."""
    try:
        return bool(_plain(root, name) or _inside(root, name))
    except PhotoRefused:
        return False


def prepare_photo(data: bytes, options: PackOptions) -> Photo:
    """Decode, turn, convert to sRGB, reduce to the short side `options.size` and encode.

    A JPEG that needs none of it keeps its coded picture. PhotoRefused for what cannot be used.
    """
    if not data:
        raise PhotoRefused("file of zero bytes")
    try:
        with bound_by(options.max_pixels):
            return _prepare(data, options)
    except Exception as error:
        raise refused(error) from None


def _prepare(data: bytes, options: PackOptions) -> Photo:
    sha256 = hashlib.sha256(data).hexdigest()
    own = None if options.keep else _own_picture(data, options)
    if own is not None:
        coded, pixels = own
        return Photo(coded.jpeg, coded.width, coded.height, sha256, *_looks(pixels))
    image = open_photo(data, options.max_pixels)
    width, height = image.size
    # Readers refuse photos over their cap, however high the one is that packing was told.
    kept = options.keep and width * height <= MAX_PIXELS and not _needs_change(image)
    short = min(options.size, width, height)
    pixels = rgb_pixels(data, image, short, _least(min(width, height), short))
    if not kept:
        height, width = pixels.shape[:2]
    stored = data if kept else encode_jpeg(pixels, options.quality)
    return Photo(stored, width, height, sha256, *_looks(pixels))


def _own_picture(data: bytes, options: PackOptions) -> tuple[Coded, np.ndarray] | None:
    """The coded picture of a JPEG that may be stored as it is, and pixels that show its looks."""
    coded = coded_picture(data, options.size)
    if coded is None:
        return None
    if coded.width * coded.height > options.max_pixels:
        return None
    if coded.told and not _as_it_lies(open_photo(data, options.max_pixels)):
        return None
    try:
        # All coded data is read at whatever scale: a cut or a broken one is seen here.
        return coded, decode_jpeg(coded.jpeg, LOOKED_AT)
    except ValueError:
        return None  # damage that Pillow may look past, or not


def _as_it_lies(image: Image.Image) -> bool:
    return orientation(image) == 1 and is_srgb(image)


def _least(short: int, wanted: int) -> int:
    """Short side at which to decode: half where that leaves 5/4 of what is wanted, else twice.

    So the stored photo is as close to a full decode as without; figures in docs/photos.md.
    """
    half = short // 2
    return half if 5 * wanted <= 4 * half < 8 * wanted else 2 * wanted


def _looks(pixels: np.ndarray) -> tuple[str, str]:
    """The perceptual hash and the mean colours of RGB pixels (h, w, 3)."""
    sums = cv2.integral(pixels)
    return _perceptual_hash(sums), _mean_colours(sums)


def _perceptual_hash(sums: np.ndarray) -> str:
    """64-bit DCT hash, 16 hex digits: the 8 x 8 lowest frequencies above their median or not."""
    totals, areas = _cells(sums, HASHED)
    grey = totals.astype(np.int64) @ GREY // areas
    low = (DCT @ grey @ DCT.T).ravel()
    # The mean brightness is no feature: only the other 63 set the median.
    bits = np.packbits(low > np.sort(low[1:])[31])
    return bits.tobytes().hex()


def _mean_colours(sums: np.ndarray) -> str:
    """Mean colours of 3 × 3 cells of RGB pixels, row by row: 27 bytes in hex."""
    totals, areas = _cells(sums, 3)
    areas = areas[..., None]
    return ((totals.astype(np.int64) + areas // 2) // areas).astype(np.uint8).tobytes().hex()


def _cells(sums: np.ndarray, across: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums (across, across, 3) over the cells of a grid, and their areas in pixels.

    sums: (h + 1, w + 1, 3) int32, of all pixels above and to the left (cv2.integral).
    """
    rows, columns, areas = _grid(*sums.shape[:2], across)
    corners = sums.take(rows, 0).take(columns, 1)
    top, bottom = corners[:across], corners[across:]
    # Sums of a very long photo pass 32 bits and come back in the differences.
    both = bottom - top
    return both[:, across:] - both[:, :across], areas


@lru_cache(256)
def _grid(height: int, width: int, across: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the cells begin and then where they end, down and across; their areas."""
    places = np.arange(across + 1)
    ends = []
    for side in (height - 1, width - 1):
        ends.append((places[:-1] * side // across, -(-places[1:] * side // across)))
    (top, bottom), (left, right) = ends
    areas = np.outer(bottom - top, right - left)
    return np.concatenate([top, bottom]), np.concatenate([left, right]), areas


def _plain(root: Path, name: str) -> Path | None:
    """The path of a file below `root` without a link or `..` on the way; None for any other."""
    mode, path = 0, str(root)
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return None
        path = f"{path}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except (OSError, ValueError):
            return None
        if stat.S_ISLNK(mode):
            return None
    return Path(path) if stat.S_ISREG(mode) else None


def _inside(root: Path, name: str) -> Path:
    try:
        path = (root / name).resolve()
        inside, is_file = path.is_relative_to(root.resolve()), path.is_file()
    except (ValueError, OSError, RuntimeError):
        # A NUL, half a surrogate pair, a name too long, links in a circle.
        raise PhotoRefused("path cannot be used") from None
    if not inside:
        raise PhotoRefused("path leads out of the image folder")
    if not is_file:
        raise PhotoRefused(NOT_FOUND)
    return path


def _needs_change(image: Image.Image) -> bool:
    if image.format != "JPEG" or image.mode != "RGB" or image.info.get("icc_profile"):
        return True
    return orientation(image) != 1
