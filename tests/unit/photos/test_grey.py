"""Grey photos with a profile of greys: their numbers are not sRGB's, whatever kind holds them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from shards.photos import decode
from shards.photos.decode import decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo

WHITE = struct.pack(">3i", *(round(x * 2**16) for x in (0.9642, 1.0, 0.8249)))
DARK, AS_SRGB = 55, 128
"""A linear grey, and sRGB's number for it."""


def linear_profile() -> bytes:
    """A monochrome ICC profile whose curve is a straight line (ICC.1:2001-04)."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"x\0\0\0",
        b"wtpt": b"XYZ " + bytes(4) + WHITE,
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IHxx", 1, 256),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        at = 128 + 4 + 12 * len(tags) + len(body)
        table, body = table + name + struct.pack(">II", at, len(data)), body + data
    size = struct.pack(">I", 128 + len(table) + len(body))
    head = size + b"lcms" + struct.pack(">I", 0x02400000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp"
    return (head.ljust(68, b"\0") + WHITE).ljust(128, b"\0") + table + body


def grey(mode: str, kind: str, size: tuple[int, int] = (64, 64), **options: object) -> bytes:
    value = {"L": DARK, "LA": (DARK, 255), "I;16": DARK * 257}[mode]
    out = io.BytesIO()
    Image.new(mode, size, value).save(out, kind, **({"icc_profile": linear_profile()} | options))
    return out.getvalue()


def middle(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), int)[picture.height // 2, picture.width // 2]


KINDS = [("L", "JPEG"), ("L", "PNG"), ("L", "TIFF"), ("LA", "PNG"), ("I;16", "PNG")]


@pytest.mark.parametrize(("mode", "kind"), KINDS)
@pytest.mark.parametrize("keep", [False, True])
def test_it_is_packed_and_decoded_as_it_looks(mode: str, kind: str, keep: bool) -> None:
    data = grey(mode, kind)
    stored = Image.open(io.BytesIO(prepare_photo(data, PackOptions(size=48, keep=keep)).jpeg))
    for picture in (stored, decode_photo(data, 32, "exact"), decode_photo(data, 32)):
        assert np.abs(middle(picture) - AS_SRGB).max() <= 3


def test_a_large_one_in_strips_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGE", 1_000)
    monkeypatch.setattr(decode, "STRIP", 4_000)
    assert np.abs(middle(decode_photo(grey("L", "PNG", (400, 300)), 32)) - AS_SRGB).max() <= 3


def test_alpha_and_a_transparent_grey_are_still_laid_on_white() -> None:
    out = io.BytesIO()
    Image.new("LA", (40, 40), (DARK, 0)).save(out, "PNG", icc_profile=linear_profile())
    for data in (out.getvalue(), grey("L", "PNG", transparency=DARK)):
        assert middle(decode_photo(data, 32)).min() >= 254


def test_without_a_profile_of_greys_its_numbers_stay() -> None:
    for profile in (b"", b"junk"):
        picture = decode_photo(grey("L", "PNG", icc_profile=profile), 32)
        assert np.abs(middle(picture) - DARK).max() <= 1
