"""Decoding for reading: three recipes, every kind of photo, and bytes that are refused."""

import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.pictures import originals, psnr
from shards.photos import decode
from shards.photos.decode import ORIENTATION, PhotoRefused, decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo

RECIPES = ("exact", "balanced", "fast")
SIZE = 224


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pillow(data: bytes, short: int) -> np.ndarray:
    """What Pillow alone makes of a plain square photo: full decoding, antialiased bicubic."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.resize((short, short), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return list(originals(4))


# ── the recipes


def test_exact_is_pillows_full_decode_to_the_bit(photos: list[bytes]) -> None:
    for photo in photos:
        assert np.array_equal(decode_photo(photo, SIZE, "exact"), pillow(photo, SIZE))


@pytest.mark.parametrize(("recipe", "wanted"), [("balanced", 47), ("fast", 34)])
def test_recipes_are_as_close_to_exact_as_they_promise(
    photos: list[bytes], recipe: str, wanted: float
) -> None:
    for photo in photos:
        found = np.asarray(decode_photo(photo, SIZE, recipe))
        assert wanted <= psnr(found, pillow(photo, SIZE)) < float("inf")


@pytest.mark.parametrize("stored", [230, 300, 384, 447, 448, 500])
def test_balanced_is_close_to_exact_for_small_stored_photos_too(
    photos: list[bytes], stored: int
) -> None:
    small = encoded(Image.open(io.BytesIO(photos[0])).resize((stored, stored)), quality=92)
    assert psnr(np.asarray(decode_photo(small, SIZE)), pillow(small, SIZE)) >= 47


@pytest.mark.parametrize("size", [(300, 200), (48, 48), (1000, 37), (37, 1000), (20, 30), (1, 1)])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_short_side_is_as_requested(size: tuple[int, int], recipe: str, kind: str) -> None:
    image = decode_photo(encoded(Image.new("RGB", size, "red"), kind), 32, recipe)
    assert (min(image.size), image.mode) == (32, "RGB")
    assert abs(image.width / image.height / (size[0] / size[1]) - 1) < 0.03
    assert np.abs(np.asarray(image, np.float64) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("how", ["grey", "cmyk", "progressive", "png", "webp", "444", *range(2, 9)])
def test_every_kind_is_decoded_alike(photos: list[bytes], recipe: str, how: str | int) -> None:
    image = Image.open(io.BytesIO(photos[0])).convert("RGB").resize((500, 500))
    exif = Image.Exif()
    exif[ORIENTATION] = how if isinstance(how, int) else 1
    data = {
        "grey": lambda: encoded(image.convert("L"), quality=95),
        "cmyk": lambda: encoded(image.convert("CMYK"), quality=95),
        "progressive": lambda: encoded(image, quality=95, progressive=True),
        "png": lambda: encoded(image, "PNG"),
        "webp": lambda: encoded(image, "WEBP", lossless=True),
        "444": lambda: encoded(image, quality=95, subsampling="4:4:4"),
    }.get(str(how), lambda: encoded(image, quality=95, exif=exif))()
    wanted = {"exact": 60, "balanced": 47, "fast": 34}[recipe]
    assert psnr(np.asarray(decode_photo(data, 200, recipe)), pillow(data, 200)) >= wanted


def test_alpha_lies_on_white() -> None:
    clear = encoded(Image.new("RGBA", (60, 40), (0, 0, 0, 0)), "PNG")
    assert np.asarray(decode_photo(clear, 32)).min() == 255


# ── what is refused


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_photos_are_refused(photos: list[bytes], recipe: str, kind: str) -> None:
    image = Image.open(io.BytesIO(photos[0])).resize((300, 300))
    data = encoded(image, kind)
    for share in (0, 0.01, 0.3, 0.6, 0.9, 0.99):
        with pytest.raises(ValueError, match="not a readable photo"):
            decode_photo(data[: int(len(data) * share)], 64, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_progressive_jpegs_cut_between_their_scans_are_refused(recipe: str) -> None:
    draw = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    data = encoded(Image.fromarray(draw), progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 4
    for at in scans[1:]:
        with pytest.raises(ValueError, match="not a readable photo"):
            decode_photo(data[:at], 64, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bomb_is_refused_by_its_header(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bombs = [encoded(Image.new("1", (9000, 8000)), "PNG")]
    small = encoded(Image.new("RGB", (16, 16)))
    at = small.index(b"\xff\xc0") + 5
    for side in (9000, 60_000):  # a JPEG that says it is larger than its bytes could ever fill
        bombs.append(small[:at] + side.to_bytes(2, "big") * 2 + small[at + 4 :])
    for bomb in bombs:
        with pytest.raises(ValueError, match="pixels"):
            decode_photo(bomb, 64, recipe)
    monkeypatch.setattr(decode, "MAX_PIXELS", 256)
    decode_photo(small, 8, recipe)
    monkeypatch.setattr(decode, "MAX_PIXELS", 255)
    with pytest.raises(ValueError, match="16 x 16 pixels, over max_pixels"):
        decode_photo(small, 8, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_photo_is_refused(recipe: str) -> None:
    for data in (b"", b"text", b"\x80\x04cos\nsystem\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(ValueError, match="not a readable photo: none of JPEG"):
            decode_photo(data, 32, recipe)


def test_what_the_packer_takes_the_reader_takes() -> None:
    # Bytes that libjpeg warns of and goes on: damage to the fast way, none to Pillow.
    whole = encoded(Image.effect_noise((200, 200), 40).convert("RGB"), quality=90)
    doubtful = 0
    for at in range(1000, len(whole) - 1000, 200):
        data = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        with contextlib.suppress(ValueError):
            decode.decode_jpeg(data, 64)
            continue
        try:
            photo = prepare_photo(data, PackOptions(keep=True))
        except PhotoRefused:
            continue
        doubtful += 1
        for recipe in RECIPES:
            assert decode_photo(photo.jpeg, 64, recipe).size == (64, 64)
    assert doubtful


# ── the pixels


def test_jpegs_are_decoded_at_halves_only(photos: list[bytes]) -> None:
    sides = {least: decode.decode_jpeg(photos[0], least).shape for least in (1, 125, 126, 500, 501)}
    wanted = {1: 125, 125: 125, 126: 250, 500: 500, 501: 1000}
    assert sides == {least: (side, side, 3) for least, side in wanted.items()}
    assert decode.decode_jpeg(photos[0], 5000).shape == (1000, 1000, 3)


@pytest.mark.parametrize(
    "size",
    [(990, 999), (812, 700), (500, 500), (301, 384), (200, 220), (90, 31), (7, 5), (1500, 900)],
)
def test_resize_is_pillows_bicubic(photos: list[bytes], size: tuple[int, int]) -> None:
    image = Image.open(io.BytesIO(photos[1])).convert("RGB")
    wanted = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    found = decode.resize(np.asarray(image), size)
    assert found.shape == wanted.shape
    assert psnr(found, wanted) >= 47


@pytest.mark.parametrize("factor", np.arange(1, decode.LARGEST + 0.01, 0.05))
def test_weights_are_few_bits_so_that_their_sums_are_exact(factor: float) -> None:
    steps = decode._kernel(factor) * decode.STEPS
    assert np.array_equal(steps, np.round(steps))
    assert steps.sum() == decode.STEPS
    # Two passes over a byte: the largest sum must fit float32's 24 bits.
    assert 255 * np.abs(steps).sum() ** 2 < 2**24


HASHES = """
import hashlib, sys
from shards.photos.decode import decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo
from benchmarks.pictures import originals
digest = hashlib.sha256()
for side in (1000, 777):
    for photo in originals(2, side):
        digest.update(repr(prepare_photo(photo, PackOptions())).encode())
        digest.update(decode_photo(photo, 224).tobytes())
        digest.update(decode_photo(photo, 224, "fast").tobytes())
print(digest.hexdigest())
"""


def test_processors_with_other_registers_pack_the_same_bytes() -> None:
    found = set()
    for without in ("", "AVX512_SKX", "AVX512_SKX,AVX2,FP16,AVX"):
        environment = {"OPENCV_CPU_DISABLE": without, "JSIMD_FORCENONE": str(int(bool(without)))}
        done = subprocess.run(
            [sys.executable, "-c", HASHES], env=os.environ | environment, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1
