"""Photos whose pixels a test knows, and what packing makes of them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from shards.photos import decode
from shards.photos.decode import PhotoRefused
from shards.photos.options import PackOptions
from shards.photos.photo import Photo, prepare_photo

SMALL = PackOptions(size=48)
KEEP = PackOptions(size=48, keep=True)
ORIENTATION = 0x0112
"""The EXIF tag of a photo's orientation."""
RED, LIME, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""The stored pixels of an upright photo, by the orientation that a file names."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file of that kind."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(photo: Photo) -> Image.Image:
    """The stored photo, which must be an RGB JPEG of the size that is recorded."""
    image = Image.open(io.BytesIO(photo.jpeg))
    image.load()
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert image.size == (photo.width, photo.height)
    return image


def colour(photo: Photo, x: float = 0.5, y: float = 0.5) -> np.ndarray:
    """Mean colour of the 4 x 4 pixels at a place given as shares of width and height."""
    pixels = np.asarray(opened(photo), np.float64)
    row, column = int(y * (photo.height - 4)), int(x * (photo.width - 4))
    return pixels[row : row + 4, column : column + 4].mean((0, 1))


def quarters(width: int, height: int) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 2, height // 2))
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    return image


def assert_quarters(photo: Photo) -> None:
    """The photo shows `quarters` upright."""
    for place, wanted in {(0.1, 0.1): RED, (0.9, 0.1): LIME, (0.1, 0.9): BLUE}.items():
        assert np.abs(colour(photo, *place) - wanted).max() < 12


def swapped_profile() -> bytes:
    """An RGB profile whose red and green primaries are exchanged against sRGB's."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {
        bytes(srgb[at : at + 4]): at for at in range(132, 132 + 12 * int(srgb[131]), 12)
    }  # fmt: skip
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    one, other = srgb[red + 4 : red + 12], srgb[green + 4 : green + 12]
    srgb[red + 4 : red + 12], srgb[green + 4 : green + 12] = other, one
    return bytes(srgb)


def refusal(data: bytes, options: PackOptions = SMALL) -> str:
    """The reason for which a photo is refused."""
    with pytest.raises(PhotoRefused) as refused:
        prepare_photo(data, options)
    assert str(refused.value)
    return str(refused.value)


def through_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Photo:
    """The photo as stored where the fast decoder does not take it."""

    def decode_jpeg(data: bytes, least: int) -> np.ndarray:
        raise ValueError("not for the fast decoder")

    with monkeypatch.context() as patched:
        patched.setattr(decode, "decode_jpeg", decode_jpeg)
        return prepare_photo(data, PackOptions())
