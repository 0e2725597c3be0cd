"""A photo of any kind from untrusted bytes: opened by its header, then upright sRGB pixels."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from shards.pixels import decode_jpeg, resize
from shards.png import in_strips, told_beside

MAX_PIXELS = 64_000_000
LARGE = 8_000_000
"""Of a photo of more pixels that is no JPEG, STRIP pixels at a time are made sRGB and smaller."""
STRIP = 2_000_000
NEARLY = 2
ORIENTATION = 0x0112
TURNS = range(2, 9)
# Named, since others start programs on untrusted bytes: EPS runs Ghostscript. MPO is a JPEG here.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


class PhotoRefused(ValueError):
    """The photo cannot be used; the message is the reason that items.parquet keeps."""


@contextmanager
def bound_by(max_pixels: int) -> Iterator[None]:
    """Within it Pillow takes photos of so many pixels, and warns of nothing.

    Its own cap is one for the whole process, which may have other photos: it is raised only where
    it lies below, and put back. What raises it (packing) has no other thread that opens photos.
    """
    own = Image.MAX_IMAGE_PIXELS
    raised = own is not None and max_pixels > 2 * own  # Pillow refuses what is over twice its cap
    # It warns of broken EXIF, of palettes, of sizes: none of it stops a photo.
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
        raise PhotoRefused(f"{pixels[0] if pixels else 'pixels'}, over max_pixels") from None
    if image.width * image.height > max_pixels:
        raise PhotoRefused(f"{image.width} x {image.height} pixels, over max_pixels")
    return image


def refused(error: Exception) -> PhotoRefused:
    """What Pillow raised, which is nearly anything on hostile bytes, as a reason to keep."""
    if isinstance(error, PhotoRefused):
        return error
    if isinstance(error, UnidentifiedImageError):
        return PhotoRefused(f"not a readable photo: none of {', '.join(FORMATS)}")
    # The reason is stored in the tar: no address, which differs from run to run, may be in it.
    told = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error) or type(error).__name__)
    return PhotoRefused(f"not a readable photo: {told}")


def rgb_pixels(data: bytes, image: Image.Image, short: int, least: int) -> np.ndarray:
    """Upright sRGB pixels (h, w, 3) of the opened `image` of `data`, its short side `short`.

    A JPEG is decoded at the smallest size whose short side is `least`. An ordinary one takes the
    fast way; one that the fast way knows no answer to (another colour space or kind, a profile,
    damage) is Pillow's, which raises nearly anything when it cannot either. Another kind of photo
    that is LARGE is first reduced to means of squares, so that it never lies whole in memory.
    """
    if _is_ordinary(image):
        try:
            pixels = decode_jpeg(data, least)
        except ValueError:
            pass  # damage that Pillow may look past, or not: its word is the one that is told
        else:
            return _turned(_resized(pixels, short), orientation(image))
    factor = min(image.size) // least
    if image.format != "JPEG" and image.width * image.height > LARGE and factor > 1:
        return _resized(_reduced(data, image, factor), short)
    image.draft("RGB", (least, least))
    image.load()
    return exact_pixels(image, short)


def exact_pixels(image: Image.Image, short: int) -> np.ndarray:
    """Upright sRGB pixels (h, w, 3) of `image`, its short side `short`, by Pillow alone."""
    rgb = _to_srgb(_upright(image))
    if min(rgb.size) != short:
        rgb = rgb.resize(_with_short(rgb.size, short), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def is_srgb(image: Image.Image) -> bool:
    """Whether the colour profile of `image` is none, broken, or one that leaves colours alone."""
    profile = image.info.get("icc_profile")
    return not profile or _conversion(profile, "RGB") is None or _leaves_alone(profile)


def orientation(image: Image.Image) -> int | None:
    """How the photo is to be turned (EXIF, 1 to 8); None where its EXIF is broken."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return None


def _is_ordinary(image: Image.Image) -> bool:
    is_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
    return is_jpeg and not image.info.get("icc_profile")


def _with_short(size: tuple[int, int], short: int) -> tuple[int, int]:
    scale = short / min(size)
    width, height = (max(short, round(side * scale)) for side in size)
    return width, height


def _resized(pixels: np.ndarray, short: int) -> np.ndarray:
    size = pixels.shape[1], pixels.shape[0]
    return pixels if min(size) == short else resize(pixels, _with_short(size, short))


def _turned(pixels: np.ndarray, how: int | None) -> np.ndarray:
    if how not in TURNS:
        return pixels
    image = Image.fromarray(pixels)
    image.getexif()[ORIENTATION] = how
    return np.asarray(ImageOps.exif_transpose(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image  # broken EXIF, raising nearly anything: the photo is taken as it lies


def _to_srgb(image: Image.Image) -> Image.Image:
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith("I"):
        # 16-bit greys: Pillow's own convert clips at 255.
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype("uint8"))
    is_grey = image.mode in ("1", "L", "LA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if is_grey and profile and _conversion(profile, "L"):
        image = image.convert("L")  # a profile of greys knows no three colours
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    if profile:
        image = _through_profile(image, profile)
    return _on_white(image.convert("RGB"), alpha)


def _on_white(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    conversion = _conversion(profile, image.mode)
    return image if conversion is None else ImageCms.applyTransform(image, conversion) or image


@lru_cache(8)
def _conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None for a broken one: the numbers are taken as they are."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


@lru_cache(8)
def _leaves_alone(profile: bytes) -> bool:
    """Whether a profile moves no colour of a grid of all by more than NEARLY levels."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3)
    moved = np.asarray(_through_profile(Image.fromarray(grid), profile))
    return int(np.abs(grid.astype(int) - moved).max()) <= NEARLY


def _reduced(data: bytes, image: Image.Image, factor: int) -> np.ndarray:
    """Upright sRGB pixels of a LARGE photo, each the mean of a square of factor x factor."""
    rows = -(-STRIP // (image.width * factor)) * factor
    strips = in_strips(data, rows) if image.format == "PNG" else None
    if strips is None:
        image.load()  # which turns a TIFF
    turned = orientation(told_beside(data) if strips else image)
    small = [np.asarray(_to_srgb(strip).reduce(factor)) for strip in strips or _bands(image, rows)]
    return _turned(np.concatenate(small), turned)


def _bands(image: Image.Image, rows: int) -> Iterator[Image.Image]:
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))
