"""A photo of any kind from untrusted bytes: opened by its header, then upright sRGB pixels.

Three recipes decode the stored bytes to an image of the requested size. Fast decoding and resizing
give the same bytes on every processor.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from shards.photos.png import in_strips, metadata_image
from shards.photos.remarks import (
    DAMAGED,
    LOST_BITS,
    MANY_PIXELS,
    PhotoRefused,
    unknown_photo,
)

# There are many packing and reading processes already; results and timings are those of one core.
cv2.setNumThreads(1)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # pyrefly: ignore[bad-assignment]
STEPS = 128
LARGEST = 5
"""Largest factor of reduction; beyond it the kernel's weights are lost in their rounding."""
MAX_PIXELS = 64_000_000
LARGE = 8_000_000
"""A photo of more pixels that is no JPEG is made sRGB and reduced STRIP pixels at a time."""
STRIP = 2_000_000
NEARLY = 2
"""Levels of 256 that a colour profile may move colours by and still count as sRGB."""
ORIENTATION, BITS, PIECE = 0x0112, 258, (322, 323)  # tags of TIFF
LONGEST = 32
"""Readers use the middle of a photo that is longer, in multiples of its short side.

Models see a square and the report a thumbnail, so the ends are not looked at, and enlarged to
the size of a model a line of 6000 x 1 pixels would take gigabytes.
"""
RANGES = (1, 255, 1023, 4095, 65535)
"""Largest values of floats, and of integers of 8, 10, 12 and 16 bits."""
# Listed, since other formats start programs on untrusted bytes: EPS runs Ghostscript. MPO is a
# JPEG here.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
if features.check("avif"):
    FORMATS += ("AVIF",)
if find_spec("pillow_heif"):  # an extra, as its codec is not free of patents everywhere
    import_module("pillow_heif").register_heif_opener(thumbnails=False, decode_threads=1)
    FORMATS += ("HEIF",)
Recipe = Literal["exact", "balanced", "fast"]
"""How photos are decoded; measured figures in docs/design/photos.md.

exact: at full size, then Pillow's antialiased bicubic. balanced: a JPEG at the smallest of 1/8,
1/4, 1/2 and 1/1 that is still twice the requested size, then bicubic; about 48 dB to exact.
fast: at the smallest that still is the requested size; about 36 dB.
"""
LEAST = {"balanced": 2, "fast": 1}
"""The least size to decode at, in multiples of the requested size."""


def decode_photo(data: bytes, short_side: int, recipe: Recipe = "balanced") -> Image.Image:
    """RGB image, upright, whose short side is `short_side` pixels and the long one LONGEST times
    that at most: of a longer photo it is the middle.

    Raises PhotoRefused (a ValueError) for damaged or cut bytes, and for a photo of more than
    MAX_PIXELS, of which only the header is read.
    """
    try:
        with bound_by(MAX_PIXELS):
            image = open_photo(data, MAX_PIXELS)
            if recipe == "exact":
                pixels, turn = _srgb_pixels(data, image, 1)
                pixels = _bicubic(_middle(_turned(pixels, turn)), short_side)
            else:
                least = LEAST[recipe] * short_side
                pixels = rgb_pixels(data, image, short_side, least, _middle)
            return Image.fromarray(pixels)
    except Exception as error:
        raise refused(error) from None


def _middle(pixels: np.ndarray) -> np.ndarray:
    """The middle of pixels (h, w, 3) that are longer than LONGEST, else all of them."""
    height, width = pixels.shape[:2]
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return pixels[top : top + longest, left : left + longest]


@contextmanager
def bound_by(max_pixels: int) -> Iterator[None]:
    """Inside the block Pillow opens photos of up to `max_pixels` and gives no warnings.

    Pillow's cap is one for the whole process, which may have other photos: it is raised only where
    it is lower, and restored. The caller that raises it (packing) has no other thread that opens
    photos.
    """
    own = Image.MAX_IMAGE_PIXELS
    raised = own is not None and max_pixels > 2 * own  # Pillow refuses what is over twice its cap
    # It warns of broken EXIF, of palettes, of sizes: none of it makes a photo unusable.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if raised:
            Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            if raised:
                Image.MAX_IMAGE_PIXELS = own


def open_photo(data: bytes, max_pixels: int) -> Image.Image:
    """The photo of `data`, its header read and nothing decoded; PhotoRefused over the cap."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # over Pillow's own cap, which is not below ours
        pixels = re.search(r"\d+ pixels", str(error))
        reason = f"{pixels[0] if pixels else 'pixels'}, over max_pixels"
        raise PhotoRefused(reason, MANY_PIXELS) from None
    except UnidentifiedImageError:
        raise unknown_photo(data, FORMATS) from None
    if isinstance(image, TiffImageFile):  # a piece is decoded in one, however small the photo
        piece = image.tag_v2.get(PIECE[0], 0), image.tag_v2.get(PIECE[1], 0)
        if piece[0] * piece[1] > max_pixels:
            raise PhotoRefused(
                f"pieces of {piece[0]} x {piece[1]} pixels, over max_pixels", MANY_PIXELS
            )
    if image.width * image.height > max_pixels:
        raise PhotoRefused(f"{image.width} x {image.height} pixels, over max_pixels", MANY_PIXELS)
    return image


def refused(error: Exception) -> PhotoRefused:
    """The reason to keep for an error of Pillow, which raises nearly anything on hostile bytes."""
    if isinstance(error, PhotoRefused):
        return error
    # The reason is stored in the tar: it must not hold an address, which differs between runs.
    reason = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error) or type(error).__name__)
    return PhotoRefused(f"not a readable photo: {reason}", DAMAGED)


def rgb_pixels(
    data: bytes,
    image: Image.Image,
    short: int,
    least: int,
    part: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
) -> np.ndarray:
    """Upright sRGB pixels (h, w, 3) of the opened `image` of `data`, its short side `short`.

    A JPEG is decoded at the smallest size whose short side is at least `least`. An ordinary one is
    decoded fast; one that the fast decoder does not support (another colour space or kind, a
    profile, damage) by Pillow, which raises nearly anything when it fails too. Another kind of
    photo that is LARGE is first reduced to means of squares, so that it is never completely in
    memory. `part` chooses what is used of the pixels before they are resized.
    """
    if image.format == "JPEG" and image.mode in ("RGB", "L") and not image.info.get("icc_profile"):
        # Damage that Pillow may tolerate or not: its message is the one that is kept.
        with suppress(ValueError):
            pixels = part(decode_jpeg(data, least))
            return _turned(_resized(pixels, short), orientation(image))
    factor = 1
    if image.format == "JPEG":
        image.draft("RGB", (least, least))
    elif image.width * image.height > LARGE:
        factor = max(1, min(image.size) // least)
    pixels, turn = _srgb_pixels(data, image, factor)
    pixels = part(_turned(pixels, turn))
    return _resized(pixels, short) if factor > 1 else _bicubic(pixels, short)


def _srgb_pixels(data: bytes, image: Image.Image, factor: int) -> tuple[np.ndarray, int | None]:
    """sRGB pixels (h, w, 3) of the opened `image`, each the mean of a square of factor x factor,
    and how they must be turned.

    Of a LARGE photo the conversions, which take many times its pixels, see STRIP pixels at a time.
    """
    is_png = image.format == "PNG" and not image.info.get("interlace")
    is_large = image.width * image.height > LARGE
    deep = _has_deep_colours(data, image)
    if is_large and is_png and not image.mode.startswith("I"):
        turn, (width, height) = orientation(metadata_image(data)), image.size
        strips = in_strips(data, rows := _rows(width, factor))
    else:
        image.load()  # which turns a TIFF
        turn = orientation(image)
        if image.mode.startswith(("I", "F")):
            image = _as_8_bits(image)
        width, height = image.size
        rows = _rows(width, factor) if is_large else height
        strips = (
            image.crop((0, y, width, min(y + rows, height))) if rows < height else image
            for y in range(0, height, rows)
        )
    pixels = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)
    for at, strip in enumerate(strips):
        rgb = _to_srgb(strip)
        small = np.asarray(rgb.reduce(factor) if factor > 1 else rgb)
        pixels[at * rows // factor :][: len(small)] = small
    if deep and 0 < pixels.max() < 16:
        raise PhotoRefused(f"not a readable photo: {LOST_BITS}, which would be black", LOST_BITS)
    return pixels, turn


def _rows(width: int, factor: int) -> int:
    """Rows of STRIP pixels, a multiple of `factor`."""
    return -(-STRIP // (width * factor)) * factor


def _has_deep_colours(data: bytes, image: Image.Image) -> bool:
    """Whether three colours have 16 bits each, of which Pillow keeps the upper 8."""
    if image.format == "PNG":
        return data[24] == 16 and image.mode.startswith("RGB")
    bits = image.tag_v2.get(BITS, ()) if isinstance(image, TiffImageFile) else ()
    return len(bits) >= 3 and max(bits) == 16


def decode_jpeg(jpeg: bytes, least: int) -> np.ndarray:
    """RGB pixels (h, w, 3), uint8, at the smallest of 1/8, 1/4, 1/2 and 1/1 of the size whose
    short side is at least `least` pixels.

    Raises ValueError for any damage, also a missing end. Scaled decoding is the inverse DCT of
    fewer coefficients (libjpeg-turbo); 3/8, 5/8 ... are possible too but slower than no scaling.
    """
    height, width = map(int, simplejpeg.decode_jpeg_header(jpeg)[:2])
    sizes = [((height * k + 7) // 8, (width * k + 7) // 8) for k in (1, 2, 4, 8)]
    h, w = next((size for size in sizes if min(size) >= least), sizes[-1])
    return simplejpeg.decode_jpeg(
        jpeg, "RGB", fastdct=False, min_height=h, min_width=w, min_factor=1
    )


@lru_cache(8)
def is_srgb(profile: bytes | None) -> bool:
    """Whether a colour profile is none, broken, or moves no colour by more than NEARLY levels."""
    if not profile or (conversion := _conversion(profile, "RGB")) is None:
        return True
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3)
    moved = ImageCms.applyTransform(Image.fromarray(grid), conversion)
    return int(np.abs(grid.astype(int) - np.asarray(moved)).max()) <= NEARLY


def orientation(image: Image.Image) -> int | None:
    """How the photo must be turned (EXIF, 1 to 8); None where its EXIF is broken."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return None


def _with_short(size: tuple[int, int], short: int) -> tuple[int, int]:
    scale = short / min(size)
    width, height = (max(short, round(side * scale)) for side in size)
    return width, height


def _resized(pixels: np.ndarray, short: int) -> np.ndarray:
    size = pixels.shape[1], pixels.shape[0]
    return pixels if min(size) == short else resize(pixels, _with_short(size, short))


def _bicubic(pixels: np.ndarray, short: int) -> np.ndarray:
    """Pixels (h, w, 3) with the short side `short`, by Pillow's antialiased bicubic."""
    size = pixels.shape[1], pixels.shape[0]
    if min(size) == short:
        return pixels
    image = Image.fromarray(pixels)
    return np.asarray(image.resize(_with_short(size, short), Image.Resampling.BICUBIC))


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (h, w, 3) at `size` (width, height), within 47 dB or better of Pillow's bicubic.

    Antialiased bicubic reduction is a convolution with the cubic kernel (Keys 1981) stretched by
    the factor, sampled at the new pixels' places. Convolving first and then sampling between the
    pixels with the plain bicubic kernel gives nearly the same, several times faster.
    """
    factors = [old / new for old, new in zip(pixels.shape[1::-1], size, strict=True)]
    if min(factors) < 1 or max(factors) > LARGEST:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    across, down = (_kernel(factor) for factor in factors)
    smooth = cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(smooth, size, interpolation=cv2.INTER_CUBIC)


@lru_cache(256)
def _kernel(factor: float) -> np.ndarray:
    """Keys's cubic kernel (a = -1/2, as in Pillow) stretched by `factor` (at least 1).

    Float32 weights in steps of 1/128 that sum to 1.
    """
    reach = math.ceil(2 * factor) - 1
    x = np.abs(np.arange(-reach, reach + 1) / factor)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    # Two passes over bytes then stay below 24 bits, so that float32 sums are exact in any order
    # and a processor with wider registers packs the same bytes.
    steps = np.round(weights / weights.sum() * STEPS)
    steps[reach] += STEPS - steps.sum()
    return (steps / STEPS).astype(np.float32)


def _turned(pixels: np.ndarray, turn: int | None) -> np.ndarray:
    if turn not in range(2, 9):
        return pixels
    image = Image.fromarray(pixels)
    image.getexif()[ORIENTATION] = turn
    return np.asarray(ImageOps.exif_transpose(image))


def _to_srgb(image: Image.Image) -> Image.Image:
    """The image of 8 bits in sRGB: its profile applied, transparency laid on white."""
    profile, alpha = image.info.get("icc_profile"), None
    is_grey = image.mode in ("1", "L", "LA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if is_grey and profile and _conversion(profile, "L"):
        image = image.convert("L")  # a profile of greys cannot convert three colours
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    if profile and (conversion := _conversion(profile, image.mode)) is not None:
        image = ImageCms.applyTransform(image, conversion) or image
    image = image.convert("RGB")
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _as_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or floats, as 8 bits; Pillow's own conversion clips at 255.

    White is the largest value of the range in RANGES that the values fill. Raises PhotoRefused
    for floats that are NaN or infinite.
    """
    values = np.asarray(image)
    low, high = min(0.0, float(values.min())), float(values.max())
    if not math.isfinite(high - low):
        raise PhotoRefused("not a readable photo: holds NaN or infinite values", DAMAGED)
    white = next((top for top in RANGES if high - low <= top), math.inf)
    if high - low <= white / 16:  # dark in every range: none is that of the values
        white = high - low or 1.0
    grey = np.empty(values.shape, np.uint8)
    rows = _rows(image.width, 1)
    for y in range(0, len(values), rows):
        levels = (values[y : y + rows].astype(np.float64) - low) / (white / 255)
        grey[y : y + rows] = levels.clip(0, 255)
    as_grey = Image.fromarray(grey)
    as_grey.info = {key: image.info[key] for key in ("icc_profile",) if key in image.info}
    return as_grey


@lru_cache(8)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None for a broken one: the pixels are used as they are."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
