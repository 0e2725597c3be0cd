"""What becomes of large photos in little memory, and of JPEGs that need nothing done."""

import contextlib
import io
import random

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from benchmarks.pictures import originals, psnr
from shards.photos import decode
from shards.photos.decode import PhotoRefused
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo
from shards.photos.png import in_strips
from tests.support.photos import (
    ORIENTATION,
    SMALL,
    TURNS,
    assert_quarters,
    encoded,
    opened,
    quarters,
    refusal,
    swapped_profile,
    through_pillow,
)

# ── large photos in strips


def large(mode: str, size: tuple[int, int]) -> Image.Image:
    """Smooth and noisy parts, so that a PNG of it tells its rows in every way."""
    draw = np.random.default_rng(7)
    channels = {"1": 1, "L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}[mode]
    coarse = draw.integers(0, 255, (9, 7, channels), np.uint8).squeeze()
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noisy = smooth.copy()
    noisy[: size[1] // 3] = draw.integers(0, 255, noisy[: size[1] // 3].shape, np.uint8)
    if mode == "I;16":
        return Image.fromarray(noisy.astype(np.uint16) * 257)
    return (
        Image.fromarray(noisy) if mode not in ("1", "P") else Image.fromarray(noisy).convert(mode)
    )


PNGS = {"1": {}, "L": {}, "P": {}, "P with alpha": {"transparency": 3}, "LA": {}, "RGB": {},
        "RGB with alpha": {"transparency": (1, 2, 3)}, "RGBA": {}, "I;16": {}}  # fmt: skip


@pytest.mark.parametrize("name", PNGS)
def test_a_png_in_strips_is_the_png(name: str) -> None:
    image = large(name.split()[0], (97, 61))
    data = encoded(image, "PNG", **PNGS[name])
    whole = decode._to_srgb(Image.open(io.BytesIO(data)))
    for rows in (1, 7, 61, 100):
        strips = [np.asarray(decode._to_srgb(strip)) for strip in in_strips(data, rows)]
        assert np.array_equal(np.concatenate(strips), np.asarray(whole))


@pytest.mark.parametrize("channels", [3, 4])
def test_a_png_of_16_bits_a_channel_in_strips_is_the_png(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 31, channels), np.uint16)
    done, data = cv2.imencode(".png", pixels)
    assert done
    whole = decode._to_srgb(Image.open(io.BytesIO(data.tobytes())))
    strips = [np.asarray(decode._to_srgb(strip)) for strip in in_strips(data.tobytes(), 9)]
    assert np.array_equal(np.concatenate(strips), np.asarray(whole))


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LARGE", 10_000)
    monkeypatch.setattr(decode, "STRIP", 700)


@pytest.mark.parametrize("orientation", [None, 6])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_large_photo_is_the_same_picture(
    kind: str, orientation: int | None, small_is_large: None
) -> None:
    image, more = quarters(403, 205), {}
    if orientation and kind not in ("BMP", "GIF"):  # these cannot tell how they are turned
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        image, more = image.transpose(TURNS[orientation]), {"exif": exif}
    photo = prepare_photo(encoded(image, kind, quality=95, **more), SMALL)
    assert (photo.width, photo.height) == (94, 48)
    assert_quarters(photo)


def test_a_large_photo_has_the_looks_of_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Image.open(io.BytesIO(next(iter(originals(1, 700)))))
    data = encoded(whole, "PNG")
    one = prepare_photo(data, SMALL)
    monkeypatch.setattr(decode, "LARGE", 10_000)
    monkeypatch.setattr(decode, "STRIP", 5_000)
    other = prepare_photo(data, SMALL)
    assert psnr(np.asarray(opened(one)), np.asarray(opened(other))) > 30
    assert (int(one.phash, 16) ^ int(other.phash, 16)).bit_count() <= 4


def test_a_large_png_that_is_cut_or_broken_is_refused(small_is_large: None) -> None:
    data = encoded(large("RGB", (200, 150)), "PNG")
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        assert refusal(data[: int(len(data) * share)])
    broken = bytearray(data)
    broken[len(data) // 2] ^= 255
    assert refusal(bytes(broken))


# ── JPEGs that need nothing done


def jpeg_of(size: tuple[int, int] = (48, 60), **options: object) -> bytes:
    noise = np.random.default_rng(3).integers(0, 255, (*size[::-1], 3), np.uint8)
    return encoded(Image.fromarray(noise), "JPEG", **{"quality": 80, **options})


def pixels_of(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def beside(data: bytes, marker: int, payload: bytes) -> bytes:
    """`data` with one more segment behind its first."""
    segment = bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload
    return data[:2] + segment + data[2:]


@pytest.mark.parametrize("options", [
    {}, {"quality": 100}, {"subsampling": 0}, {"subsampling": 1}, {"optimize": True},
    {"restart_marker_blocks": 2}, {"dpi": (72, 72)}, {"comment": b"mine"},
], ids=str)  # fmt: skip
def test_a_small_jpeg_keeps_its_coded_picture(options: dict) -> None:
    data = jpeg_of(**options)
    photo = prepare_photo(data, SMALL)
    assert np.array_equal(pixels_of(photo.jpeg), pixels_of(data))
    scan = data.index(b"\xff\xda")
    assert photo.jpeg.endswith(data[scan:])
    assert (photo.width, photo.height) == (48, 60)
    assert prepare_photo(photo.jpeg, SMALL).jpeg == photo.jpeg


def test_metadata_beside_a_small_jpeg_is_left_out() -> None:
    exif = Image.Exif()
    exif[0x8825], exif[0x010F] = {1: "N"}, "maker of the camera"
    data = jpeg_of(exif=exif, comment=b"a comment", icc_profile=ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB")).tobytes())  # fmt: skip
    data = beside(beside(data, 0xED, b"Photoshop 3.0"), 0xE0, b"JFXX\0\x10preview") + b"trailer"
    photo = prepare_photo(data, SMALL)
    assert np.array_equal(pixels_of(photo.jpeg), pixels_of(data))
    for segment in (
        b"Exif",
        b"maker",
        b"comment",
        b"ICC_PROFILE",
        b"Photoshop",
        b"JFXX",
        b"trailer",
    ):
        assert segment in data
        assert segment not in photo.jpeg


@pytest.mark.parametrize("change", ["turned", "profile", "progressive", "grey", "RGB", "large"])
def test_a_jpeg_that_needs_something_is_encoded_anew(change: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    data = {
        "turned": jpeg_of(exif=exif), "profile": jpeg_of(icc_profile=swapped_profile()),
        "progressive": jpeg_of(progressive=True), "large": jpeg_of((49, 60)),
        "grey": encoded(Image.new("L", (48, 60), 90), "JPEG"), "RGB": jpeg_of(keep_rgb=True),
    }[change]  # fmt: skip
    photo = prepare_photo(data, SMALL)
    assert photo.jpeg[-200:] != data[-200:]
    assert opened(photo).size in ((48, 60), (48, 59))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("exif", [False, True])
def test_a_small_jpeg_of_more_than_max_pixels_is_refused(keep: bool, exif: bool) -> None:
    """Also one that could be stored as it is, of which nothing would be decoded."""
    metadata = Image.Exif()
    metadata[0x010F] = "maker of the camera"
    data = jpeg_of((48, 60), **({"exif": metadata} if exif else {}))
    least = PackOptions(size=60, max_pixels=48 * 60, keep=keep)
    photo = prepare_photo(data, least)
    assert (photo.width, photo.height, photo.jpeg[-200:]) == (48, 60, data[-200:])
    fewer = PackOptions(size=60, max_pixels=48 * 60 - 1, keep=keep)
    assert refusal(data, fewer) == "48 x 60 pixels, over max_pixels"


def test_every_cut_of_a_small_jpeg_is_refused() -> None:
    data = jpeg_of()
    for end in range(1, len(data) - 1, 7):
        assert refusal(data[:end])


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
@pytest.mark.parametrize("side", [48, 300])
def test_a_small_jpeg_whose_coded_data_is_cut_is_refused(side: int, end: bytes) -> None:
    """With an end put behind it too; at 300 pixels it is looked at on a reduced scale."""
    data, options = jpeg_of((side, side)), PackOptions(size=side)
    scan = data.index(b"\xff\xda") + 14
    for share in (0.1, 0.5, 0.9, 0.99):
        cut = data[: scan + int(share * (len(data) - scan))].rstrip(b"\xff") + end
        before = None
        with contextlib.suppress(PhotoRefused):
            before = through_pillow(cut, pytest.MonkeyPatch())
        if before is None:
            assert refusal(cut, options)
        else:  # Pillow reads it as complete, so that it is encoded anew
            assert not prepare_photo(cut, options).jpeg.endswith(cut[-100:])


@pytest.mark.parametrize("trials", [300, pytest.param(20_000, marks=pytest.mark.full)])
def test_a_stored_coded_picture_always_decodes(trials: int) -> None:
    """What is stored decodes to the end, of damaged bytes too, or the photo is refused."""
    draw, whole = random.Random(trials), jpeg_of((40, 40), restart_marker_blocks=3)
    for _ in range(trials):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with contextlib.suppress(PhotoRefused):
            photo = prepare_photo(bytes(data), SMALL)
            assert simplejpeg.decode_jpeg(photo.jpeg, strict=True).shape[:2] == (
                photo.height, photo.width,
            )  # fmt: skip
