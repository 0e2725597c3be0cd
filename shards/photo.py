"""One photo, from untrusted bytes to the sRGB JPEG that is stored."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from shards.options import PackOptions
from shards.pixels import encode_jpeg
from shards.srgb import PhotoRefused, open_photo, orientation, refused, rgb_pixels

MAX_BYTES = 256 * 2**20
HASHED = 32
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
    path = _inside(root, name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PhotoRefused(f"file larger than {MAX_BYTES} bytes")
        return prepare_photo(path.read_bytes(), options)
    except OSError as error:
        raise PhotoRefused(f"cannot be read: {error.strerror}") from None


def prepare_photo(data: bytes, options: PackOptions) -> Photo:
    """Decode, turn, convert to sRGB, reduce to the short side `options.size` and encode."""
    if not data:
        raise PhotoRefused("file of zero bytes")
    try:
        # Pillow warns of broken EXIF, of palettes, of sizes: none of it stops a photo.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _prepare(data, options)
    except Exception as error:
        raise refused(error) from None


def _prepare(data: bytes, options: PackOptions) -> Photo:
    image = open_photo(data, options.max_pixels)
    kept = options.keep and not _needs_change(image)
    width, height = image.size
    short = min(options.size, width, height)
    pixels = rgb_pixels(data, image, short, _least(min(width, height), short))
    if not kept:
        height, width = pixels.shape[:2]
    stored = data if kept else encode_jpeg(pixels, options.quality)
    sha256 = hashlib.sha256(data).hexdigest()
    looks = perceptual_hash(pixels), mean_colours(pixels)
    return Photo(stored, width, height, sha256, *looks)


def _least(short: int, wanted: int) -> int:
    """Short side at which to decode: half where that leaves 5/4 of what is wanted, else twice.

    So the stored photo is as close to a full decode as without; figures in docs/photos.md.
    """
    half = short // 2
    return half if 5 * wanted <= 4 * half < 8 * wanted else 2 * wanted


def perceptual_hash(pixels: np.ndarray) -> str:
    """64-bit DCT hash, 16 hex digits: the 8 x 8 lowest frequencies above their median or not."""
    low = (DCT @ _box_means(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)) @ DCT.T).ravel()
    # The mean brightness is no feature: only the other 63 set the median.
    bits = np.packbits(low > np.sort(low[1:])[31])
    return bits.tobytes().hex()


def mean_colours(pixels: np.ndarray) -> str:
    """Mean colours of 3 × 3 cells of RGB pixels (h, w, 3), row by row: 27 bytes in hex."""
    down, across = ([slice(side * k // 3, -(-side * (k + 1) // 3)) for k in range(3)]
                    for side in pixels.shape[:2])  # fmt: skip
    means = [cv2.mean(pixels[y, x])[:3] for y in down for x in across]
    return bytes(round(level) for cell in means for level in cell).hex()


def _box_means(grey: np.ndarray) -> np.ndarray:
    """Means (32, 32) of the boxes that a grid cuts grey pixels (h, w) into, in 256ths."""
    total = cv2.integral(grey)
    places = np.arange(HASHED + 1)
    starts = [places[:-1] * side // HASHED for side in grey.shape]
    ends = [-(-places[1:] * side // HASHED) for side in grey.shape]
    (top, left), (bottom, right) = starts, ends
    sums = total[np.ix_(bottom, right)] - total[np.ix_(top, right)]
    sums += total[np.ix_(top, left)] - total[np.ix_(bottom, left)]
    return sums.astype(np.int64) * 256 // np.outer(bottom - top, right - left)


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
        raise PhotoRefused("file not found")
    return path


def _needs_change(image: Image.Image) -> bool:
    if image.format != "JPEG" or image.mode != "RGB" or image.info.get("icc_profile"):
        return True
    return orientation(image) != 1
