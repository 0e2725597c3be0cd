"""One photo, from untrusted bytes to the sRGB JPEG that is stored."""

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from scipy.fft import dctn

from shards.options import PackOptions

MAX_BYTES = 256 * 2**20
ORIENTATION = 0x0112
# Named, since others start programs on untrusted bytes: EPS runs Ghostscript. MPO is a JPEG here.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


class PhotoRefused(Exception):
    """The photo cannot be used; the message is the reason that items.parquet keeps."""


@dataclass(frozen=True)
class Photo:
    """A stored photo and its facts; sha256 is of the original bytes, width and height stored."""

    jpeg: bytes
    width: int
    height: int
    sha256: str
    phash: str


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
    except PhotoRefused:
        raise
    except Exception as error:
        # Pillow's plugins raise nearly anything on hostile bytes.
        raise PhotoRefused(f"not a readable photo: {_told(error)}") from None


def _prepare(data: bytes, options: PackOptions) -> Photo:
    image = _decode(data, options)
    kept = options.keep and image.format == "JPEG" and not _needs_change(image)
    upright = _to_srgb(_upright(image))
    small = upright if kept else _reduce(upright, options.size)
    stored = data if kept else _encode(small, options.quality)
    sha256 = hashlib.sha256(data).hexdigest()
    return Photo(stored, small.width, small.height, sha256, perceptual_hash(small))


def perceptual_hash(image: Image.Image) -> str:
    """64-bit DCT hash, 16 hex digits: the 8 x 8 lowest frequencies above their median or not."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    # The mean brightness is no feature: only the other 63 set the median.
    bits = np.packbits(low > np.median(low[1:]))
    return bits.tobytes().hex()


def _told(error: Exception) -> str:
    # The reason is stored in the tar: no address, which differs from run to run, may be in it.
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(error) or type(error).__name__)


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


def _decode(data: bytes, options: PackOptions) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > options.max_pixels:
        raise PhotoRefused(f"{image.width} x {image.height} pixels, over max_pixels")
    if not options.keep:
        # A JPEG decoded at 1/2, 1/4, ... of its size is 2-4 times faster; twice the
        # target keeps about 48 dB.
        image.draft("RGB", (2 * options.size, 2 * options.size))
    image.load()
    return image


def _needs_change(image: Image.Image) -> bool:
    if image.mode != "RGB" or image.info.get("icc_profile"):
        return True
    try:
        return image.getexif().get(ORIENTATION, 1) != 1
    except Exception:
        return True  # broken EXIF, which another reader may take otherwise


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image  # broken EXIF, raising nearly anything: the photo is taken as it lies


def _to_srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit greys: Pillow's own convert clips at 255.
        grey = (np.asarray(image, np.float64) / 257).clip(0, 255).astype("uint8")
        return Image.fromarray(grey).convert("RGB")
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if image.mode != "CMYK":
        image = image.convert("RGB")
    if profile:
        image = _through_profile(image, profile)
    return _on_white(image.convert("RGB"), alpha)


def _on_white(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a broken profile: the numbers are taken as they are


def _reduce(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    if short <= size:
        return image
    scale = size / short
    to = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(to, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()
