"""Greys of more than 8 bits and floats are shown by the range of their values, never as black."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from shards.photos import decode
from shards.photos.decode import PhotoRefused, decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def saved(values: np.ndarray, kind: str = "TIFF") -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind)
    return out.getvalue()


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """A TIFF of 12 bits a pixel, two in three bytes (TIFF 6.0); Pillow reads but writes none."""
    one, other = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
    packed = np.stack([one >> 4, (one & 15) << 4 | other >> 8, other & 255], 1).astype(np.uint8)
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, height), (279, packed.size)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    body = packed.tobytes() + bytes(packed.size % 2)
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + ifd


KINDS = {
    "12 bits": tiff_of_12_bits(RAMP * 4095),
    "12 bits in 16": saved((RAMP * 4095).astype(np.uint16)),
    "12 bits in 16, PNG": saved((RAMP * 4095).astype(np.uint16), "PNG"),
    "10 bits in 16": saved((RAMP * 1023).astype(np.uint16)),
    "8 bits in 16": saved((RAMP * 255).astype(np.uint16)),
    "16 bits": saved((RAMP * 65535).astype(np.uint16)),
    "16 bits, PNG": saved((RAMP * 65535).astype(np.uint16), "PNG"),
    "32 bits": saved((RAMP * 2_000_000_000).astype(np.int32)),
    "negative": saved((RAMP * 4000 - 2000).astype(np.int32)),
    "0 to 1": saved(RAMP.astype(np.float32)),
    "0 to 255": saved((RAMP * 255).astype(np.float32)),
    "0 to 65535": saved((RAMP * 65535).astype(np.float32)),
    "high dynamic range": saved((RAMP * 1.3).astype(np.float32)),
    "dark floats": saved((RAMP * 0.02).astype(np.float32)),
    "-1 to 1": saved((RAMP * 2 - 1).astype(np.float32)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_a_ramp_is_a_ramp(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(decode, "LARGE", 1_000)
        monkeypatch.setattr(decode, "STRIP", 640)
    stored = Image.open(io.BytesIO(prepare_photo(KINDS[name], PackOptions(size=64)).jpeg))
    for photo in (stored, decode_photo(KINDS[name], 64), decode_photo(KINDS[name], 64, "exact")):
        assert np.abs(np.asarray(photo.convert("L"), float) - RAMP * 255).max() < 9


def test_16_bits_keep_their_levels_to_the_bit() -> None:
    draw = np.random.default_rng(0).integers(0, 65536, (64, 64), np.uint16)
    wanted = (draw / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decode_photo(saved(draw, kind), 64))[..., 1], wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    values = RAMP.astype(np.float32)
    values[3, 4] = value
    with pytest.raises(PhotoRefused, match="NaN or infinite"):
        decode_photo(saved(values), 32)


@pytest.mark.parametrize("value", [0, 7])
def test_one_value_everywhere_is_no_error(value: float) -> None:
    for kind in (np.uint16, np.int32, np.float32):
        decode_photo(saved(np.full((40, 40), value, kind)), 32)


def colours_of_16_bits(white: int) -> bytes:
    """A TIFF of three colours of 16 bits, which Pillow reads but does not write."""
    values = (np.stack([RAMP] * 3, -1) * white).astype("<u2")
    tags = [(256, 64), (257, 64), (258, 0), (259, 1), (262, 2), (273, 8), (277, 3), (278, 64),
            (279, values.nbytes), (284, 1)]  # fmt: skip
    bits, at = struct.pack("<3H", 16, 16, 16), 8 + values.nbytes
    fields = {258: (3, 3, at)}  # three numbers of two bytes, which lie behind the pixels
    entries = b"".join(
        struct.pack("<HHII", tag, *fields.get(tag, (4, 1, value))) for tag, value in tags
    )
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", at + len(bits)) + values.tobytes() + bits + ifd


def test_colours_of_12_bits_in_16_are_refused_where_pillow_keeps_the_upper_8() -> None:
    photo = np.asarray(decode_photo(colours_of_16_bits(65535), 64), float)
    assert np.abs(photo - RAMP[..., None] * 255).max() < 3
    with pytest.raises(PhotoRefused, match="16-bit colours of 12 bits or less"):
        decode_photo(colours_of_16_bits(4095), 64)
    decode_photo(colours_of_16_bits(0), 64)  # black is black
