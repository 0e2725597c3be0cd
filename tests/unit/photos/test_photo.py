"""One photo: every kind of file ends in an RGB JPEG, upright and small, or in a reason."""

import contextlib
import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.pictures import originals, psnr
from shards.photos.decode import PhotoRefused
from shards.photos.options import PackOptions
from shards.photos.photo import Photo, load_photo, prepare_photo
from tests.support.photos import (
    BLUE,
    KEEP,
    LIME,
    ORIENTATION,
    RED,
    SMALL,
    TURNS,
    WHITE,
    assert_quarters,
    colour,
    encoded,
    opened,
    quarters,
    refusal,
    swapped_profile,
    through_pillow,
)

# ── size


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (97, 97), (3001, 49), (1600, 1200)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_short_side_is_reduced_to_size(size: tuple[int, int], kind: str) -> None:
    photo = prepare_photo(encoded(quarters(*size), kind, quality=95), SMALL)
    assert min(photo.width, photo.height) == 48
    assert abs(photo.width / photo.height / (size[0] / size[1]) - 1) < 0.02
    assert_quarters(photo)


@pytest.mark.parametrize("size", [(48, 48), (47, 90), (10, 300), (1, 1), (5, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photos_are_never_enlarged(size: tuple[int, int], kind: str) -> None:
    photo = prepare_photo(encoded(Image.new("RGB", size, "red"), kind), SMALL)
    assert (photo.width, photo.height) == size
    opened(photo)


def test_a_strip_longer_than_jpeg_can_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (70_000, 3)), "PNG"))
    with pytest.raises(PhotoRefused):
        load_photo(tmp_path, "a.png", SMALL)


# ── orientation


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("options", [SMALL, KEEP])
def test_exif_orientation_is_applied_once(
    orientation: int, kind: str, options: PackOptions
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x8825] = {1: "N"}
    # The stored pixels are turned so that a viewer, after turning, shows the quarters upright.
    turned = quarters(400, 200).transpose(TURNS[orientation])
    photo = prepare_photo(encoded(turned, kind, quality=95, exif=exif), options)
    assert (photo.width, photo.height) == (96, 48)
    assert_quarters(photo)
    # Another turn by a reader, and the place where it was taken, would both be wrong.
    assert not opened(photo).getexif()


BROKEN_EXIF = {
    "another byte order": b"Exif\0\0MY\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0",
    "too many entries": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(200)),
    "outside the data": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "text": b"Exif\0\0no exif at all",
    "empty": b"Exif\0\0",
}


@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("options", [SMALL, KEEP], ids=["small", "keep"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_stop_a_photo(exif: bytes, kind: str, options: PackOptions) -> None:
    photo = prepare_photo(encoded(quarters(200, 100), kind, quality=95, exif=exif), options)
    assert_quarters(photo)


# ── modes


def in_every_mode() -> dict[str, bytes]:
    """A picture of 60 x 90 pixels in each mode of each kind that has it."""
    found = {}
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"):
        for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"):
            with contextlib.suppress(OSError, ValueError):
                found[f"{kind} {mode}"] = encoded(Image.new(mode, (60, 90)), kind)
    return found


@pytest.mark.filterwarnings("ignore:Saving I mode images as PNG")
def test_every_mode_of_every_kind_becomes_rgb() -> None:
    pictures = in_every_mode()
    assert len(pictures) > 40
    for name, data in pictures.items():
        photo = prepare_photo(data, SMALL)
        assert (photo.width, photo.height) == (48, 72), name
        opened(photo)


@pytest.mark.parametrize("value", [0, 12_850, 40_092, 65_535])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_brightness(value: int, kind: str) -> None:
    image = Image.fromarray(np.full((60, 60), value, np.uint16))
    photo = prepare_photo(encoded(image, kind), SMALL)
    assert np.abs(colour(photo) - value / 257).max() < 3


def test_16_bit_grey_with_a_transparent_value_keeps_its_brightness() -> None:
    image = Image.fromarray(np.full((60, 60), 12_850, np.uint16))
    photo = prepare_photo(encoded(image, "PNG", transparency=7), SMALL)
    assert np.abs(colour(photo) - 50).max() < 3


def test_cmyk_jpeg_has_the_colours_of_its_inks() -> None:
    cyan = Image.new("CMYK", (60, 60), (255, 0, 0, 0))
    photo = prepare_photo(encoded(cyan, "JPEG", quality=95), SMALL)
    assert np.abs(colour(photo) - (0, 255, 255)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    image = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 100, 100))
    image.paste((0, 0, 0, 128), (100, 50, 200, 100))
    photo = prepare_photo(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})),
                          SMALL)  # fmt: skip
    assert np.abs(colour(photo, 0.1, 0.5) - RED).max() < 12
    assert np.abs(colour(photo, 0.9, 0.1) - WHITE).max() < 4
    assert np.abs(colour(photo, 0.9, 0.9) - 127).max() < 4


def test_grey_with_alpha_is_composited_on_white() -> None:
    image = Image.new("LA", (60, 60), (0, 0))
    assert np.abs(colour(prepare_photo(encoded(image, "PNG"), SMALL)) - 255).max() < 4


def test_palette_and_its_transparent_colour() -> None:
    image = quarters(200, 100).convert("P", palette=Image.Palette.ADAPTIVE)
    assert_quarters(prepare_photo(encoded(image, "PNG"), SMALL))
    blue = image.getpixel((10, 90))
    photo = prepare_photo(encoded(image, "PNG", transparency=blue), SMALL)
    assert np.abs(colour(photo, 0.1, 0.9) - WHITE).max() < 4
    assert np.abs(colour(photo, 0.1, 0.1) - RED).max() < 12


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [quarters(200, 100), Image.new("RGB", (200, 100), "black")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        photo = prepare_photo(data, SMALL)
        assert (photo.width, photo.height) == (96, 48)
        for place, wanted in {(0.1, 0.1): RED, (0.9, 0.1): LIME, (0.1, 0.9): BLUE}.items():
            assert np.abs(colour(photo, *place) - wanted).max() < 40


# ── colour profiles


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("options", [SMALL, KEEP])
def test_a_profile_is_converted_to_srgb_and_dropped(kind: str, options: PackOptions) -> None:
    red = Image.new("RGB", (60, 60), "red")
    photo = prepare_photo(encoded(red, kind, icc_profile=swapped_profile()), options)
    assert np.abs(colour(photo) - LIME).max() < 20
    assert "icc_profile" not in opened(photo).info


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_profile_counts_beside_alpha_and_palettes_too(mode: str) -> None:
    red = Image.new("RGB", (60, 60), "red").convert(mode)
    photo = prepare_photo(encoded(red, "PNG", icc_profile=swapped_profile()), SMALL)
    assert np.abs(colour(photo) - LIME).max() < 20


@pytest.mark.parametrize("profile", [b"junk", b"\0" * 128, swapped_profile()[:300]])
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_a_broken_profile_is_passed_over(profile: bytes, mode: str) -> None:
    image = quarters(200, 100).convert(mode)
    photo = prepare_photo(encoded(image, "JPEG", quality=95, icc_profile=profile), SMALL)
    if mode != "L":
        assert_quarters(photo)
    assert (photo.width, photo.height) == (96, 48)


# ── refusals


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encoded(Image.new("1", (9000, 8000)), "PNG")
    assert len(bomb) < 50_000
    assert "9000 x 8000" in refusal(bomb)
    assert "over max_pixels" in refusal(
        encoded(Image.new("L", (11, 10)), "PNG"), PackOptions(max_pixels=109)
    )
    prepare_photo(encoded(Image.new("L", (11, 10)), "PNG"), PackOptions(max_pixels=110))


def test_zero_bytes_text_and_html_are_refused() -> None:
    assert "zero bytes" in refusal(b"")
    assert "not a readable photo" in refusal(b"I am no photo, whatever my name says.\n")
    assert "not a readable photo" in refusal(b"<html><body>404</body></html>")


def test_reasons_are_the_same_every_time() -> None:
    # They are stored in the tars, whose bytes must not change from run to run.
    broken = [b"no photo", encoded(quarters(200, 100), "PNG")[:150], b"GIF89a", b"II*\0"]
    for data in broken:
        reasons = {refusal(bytearray(data)) for _ in range(3)} | {refusal(bytes(data))}
        assert len(reasons) == 1
        assert " at 0x" not in reasons.pop()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("options", [SMALL, KEEP])
def test_truncated_photos_are_refused(kind: str, options: PackOptions) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.02, 0.3, 0.6, 0.9):
        assert refusal(data[: int(len(data) * share)], options)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg", "a/../../secret.jpg", "link.jpg", "out/secret.jpg", "{root}/../secret.jpg",
        "none.jpg", "", ".", "..", "a", "loop", "a\0b.jpg", "x" * 300, "y/" * 3000, "\ud800.jpg",
        "pipe",
    ],
)  # fmt: skip
def test_names_that_lead_nowhere_or_out_of_the_folder_are_refused(
    tmp_path: Path, name: str
) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(encoded(quarters(60, 60), "JPEG"))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    with pytest.raises(PhotoRefused) as refused:
        load_photo(root, name.format(root=root), SMALL)
    assert str(refused.value)


def test_names_that_stay_inside_are_read(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "fóto 1.jpg").write_bytes(encoded(quarters(60, 60), "JPEG"))
    (root / "link.jpg").symlink_to(root / "a" / "fóto 1.jpg")
    alias = tmp_path / "alias"
    alias.symlink_to(root)
    names = ["a/fóto 1.jpg", "a/../a/fóto 1.jpg", "link.jpg", str(root / "a" / "fóto 1.jpg")]
    photos = [load_photo(folder, name, SMALL) for folder in (root, alias) for name in names]
    assert len({photo.jpeg for photo in photos}) == 1


KINDS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]


def assert_photo_or_reason(data: bytes) -> None:
    reason = ""
    try:
        photo = prepare_photo(data, PackOptions(size=16, max_pixels=10_000))
    except PhotoRefused as refused:
        reason = str(refused)
    # Any other exception would stop the pack of a whole catalogue.
    assert reason or opened(photo)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trials", [60, pytest.param(5000, marks=pytest.mark.full)])
def test_damaged_bytes_end_in_a_photo_or_a_reason(kind: str, trials: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = quarters(40, 24)
    more = {} if kind in ("GIF", "BMP") else {"exif": exif, "icc_profile": swapped_profile()}
    whole = encoded(image, kind, **more)
    draw = random.Random(f"{kind} {trials}")
    for _ in range(trials):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        assert_photo_or_reason(bytes(data))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0"]),
       st.binary(max_size=200))  # fmt: skip
def test_any_bytes_end_in_a_photo_or_a_reason(magic: bytes, rest: bytes) -> None:
    assert_photo_or_reason(magic + rest)


# ── keep


def test_keep_stores_the_very_bytes_of_a_plain_jpeg() -> None:
    data = encoded(quarters(300, 200), "JPEG", quality=80)
    photo = prepare_photo(data, KEEP)
    assert (photo.jpeg, photo.width, photo.height) == (data, 300, 200)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_keep_still_re_encodes_what_is_no_rgb_jpeg(mode: str) -> None:
    data = encoded(quarters(300, 200).convert(mode), "JPEG")
    photo = prepare_photo(data, KEEP)
    assert photo.jpeg != data
    assert (photo.width, photo.height) == (72, 48)


def test_keep_re_encodes_other_kinds() -> None:
    photo = prepare_photo(encoded(quarters(300, 200), "PNG"), KEEP)
    assert (photo.width, photo.height) == (72, 48)
    opened(photo)


# ── facts and bytes


def test_the_same_bytes_give_the_same_photo_and_quality_shows() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "PNG")
    assert prepare_photo(data, SMALL) == prepare_photo(data, SMALL)
    low, high = (prepare_photo(data, PackOptions(size=48, quality=q)) for q in (40, 95))
    assert len(low.jpeg) < len(high.jpeg) / 2
    assert low.sha256 == high.sha256


def test_hash_is_of_the_original_bytes_and_phash_of_the_picture() -> None:
    coarse = np.random.default_rng(5).integers(0, 255, (6, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
    one = prepare_photo(encoded(image, "JPEG", quality=90), SMALL)
    other = prepare_photo(encoded(image.resize((80, 60)), "JPEG", quality=70), SMALL)
    unlike = prepare_photo(encoded(image.rotate(180), "JPEG"), SMALL)
    assert one.sha256 != other.sha256

    def bits(a: Photo, b: Photo) -> int:
        return (int(a.phash, 16) ^ int(b.phash, 16)).bit_count()

    assert len(one.phash) == 16
    assert bits(one, other) <= 6 < 12 <= bits(one, unlike)


def test_reduced_decoding_is_close_to_full_decoding() -> None:
    draw = np.random.default_rng(1)
    coarse = Image.fromarray(draw.integers(0, 255, (12, 16, 3), np.uint8))
    image = coarse.resize((1600, 1200), Image.Resampling.BICUBIC)
    jpeg, png = (encoded(image, kind, quality=95) for kind in ("JPEG", "PNG"))
    one, other = (np.asarray(opened(prepare_photo(d, SMALL)), np.float64) for d in (jpeg, png))
    assert np.square(one - other).mean() < 65.025  # 30 dB: the same picture, no shift


# ── the fast way


def test_the_fast_way_stores_photos_as_good_as_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (500, 1000, 1300):
        for data in originals(2, side):
            whole = np.asarray(opened_at(data, 224))
            fast, slow = prepare_photo(data, PackOptions()), through_pillow(data, monkeypatch)
            assert (fast.width, fast.height, fast.sha256) == (slow.width, slow.height, slow.sha256)
            assert fast.jpeg != slow.jpeg
            near = [psnr(np.asarray(opened_at(p.jpeg, 224)), whole) for p in (fast, slow)]
            assert near[0] >= near[1] - 0.2
            assert (int(fast.phash, 16) ^ int(slow.phash, 16)).bit_count() <= 2


def opened_at(data: bytes, side: int) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", [1, *TURNS])
def test_the_fast_way_turns_photos_as_pillow_does(
    orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(quarters(1000, 800), "JPEG", quality=95, exif=exif)
    one, other = prepare_photo(data, PackOptions()), through_pillow(data, monkeypatch)
    assert psnr(np.asarray(opened(one)), np.asarray(opened(other))) > 40


def test_kept_and_reduced_photos_have_one_hash() -> None:
    for data in originals(3):
        assert prepare_photo(data, KEEP).phash == prepare_photo(data, SMALL).phash


def test_the_hash_of_a_flat_photo_is_the_same_at_every_size() -> None:
    sizes = [(40, 30), (48, 48), (320, 200)]
    flat = [encoded(Image.new("RGB", size, "white"), "PNG") for size in sizes]
    assert len({prepare_photo(data, SMALL).phash for data in flat}) == 1
