"""One photo, from untrusted bytes to the sRGB JPEG that is stored."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps
from scipy.fft import dctn

from shards.options import PackOptions

MAX_BYTES = 256 * 2**20


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
        raise PhotoRefused(f"cannot be read: {error.strerror or error}") from None


def prepare_photo(data: bytes, options: PackOptions) -> Photo:
    """Decode, turn, convert to sRGB, reduce to the short side `options.size` and encode."""
    if not data:
        raise PhotoRefused("file of zero bytes")
    image = _decode(data, options)
    kept = options.keep and image.format == "JPEG" and not _needs_change(image)
    upright = _to_srgb(ImageOps.exif_transpose(image))
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


def _inside(root: Path, name: str) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise PhotoRefused("path leads out of the image folder")
    if not path.is_file():
        raise PhotoRefused("file not found")
    return path


def _decode(data: bytes, options: PackOptions) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > options.max_pixels:
                raise PhotoRefused(f"{image.width} x {image.height} pixels, over max_pixels")
            if not options.keep:
                # A JPEG decoded at 1/2, 1/4, ... of its size is 2-4 times faster; twice the
                # target keeps about 48 dB.
                image.draft("RGB", (2 * options.size, 2 * options.size))
            image.load()
        except PhotoRefused:
            raise
        except Exception as error:
            # Pillow's plugins raise nearly anything on hostile bytes.
            raise PhotoRefused(f"not a readable photo: {error}") from None
    return image


def _needs_change(image: Image.Image) -> bool:
    turned = image.getexif().get(0x0112, 1) != 1
    return turned or image.mode != "RGB" or bool(image.info.get("icc_profile"))


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    elif image.mode.startswith("I"):
        # 16-bit greys: Pillow's own convert clips at 255.
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype("uint8"))
    elif profile and image.mode in ("RGB", "CMYK"):
        image = _through_profile(image, profile)
    return image.convert("RGB")


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
