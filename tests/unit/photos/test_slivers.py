"""Photos far longer than wide: what is enlarged of them is bounded wherever photos are decoded."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.report.galleries import thumbnail
from shards.photos.decode import FORMATS, LONGEST, PhotoRefused, decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo
from tests.support.photos import encoded

RECIPES = ("exact", "balanced", "fast")
LINES = [(6000, 1), (1, 6000), (30_000, 1), (16_000, 3), (5, 9_000)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("size", LINES, ids=str)
def test_no_photo_is_enlarged_beyond_its_middle(
    size: tuple[int, int], kind: str, recipe: str
) -> None:
    if kind == "WEBP" and max(size) > 16_383:
        pytest.skip("no WebP is so long")
    image = decode_photo(encoded(Image.new("RGB", size, "red"), kind), 224, recipe)
    assert sorted(image.size) == [224, LONGEST * 224]
    assert (image.width > image.height) == (size[0] > size[1])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("turn", [1, 6])
def test_it_is_the_middle_that_is_used(recipe: str, turn: int) -> None:
    draw = Image.new("RGB", (2000, 8), "red")
    draw.paste("blue", (1000 - 32, 0, 1000 + 32, 8))
    exif = Image.Exif()
    exif[0x0112] = turn
    image = decode_photo(encoded(draw, "PNG", exif=exif), 32, recipe)
    assert (image.width > image.height) == (turn == 1)
    pixels = np.asarray(image.rotate(90, expand=True) if turn == 6 else image)
    middle, end = LONGEST * 32 // 2, LONGEST * 32
    assert tuple(pixels[16, middle]) == (0, 0, 255)
    assert tuple(pixels[16, 5]) == tuple(pixels[16, end - 5]) == (255, 0, 0)


@pytest.mark.parametrize("size", [(LONGEST * 20, 20), (20, LONGEST * 20), (300, 41)], ids=str)
def test_photos_that_are_not_longer_are_used_to_their_ends(size: tuple[int, int]) -> None:
    image = decode_photo(encoded(Image.new("RGB", size), "PNG"), 40)
    assert image.size == tuple(round(side * 40 / min(size)) for side in size)


CHILD = """
import sys
import zlib
from pathlib import Path
from dist_train.config.training import ImageTraining
from dist_train.encoders.batches import ImageInputs
from dist_train.report.galleries import thumbnail
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo
from shards.read.shard_set import Item
from shards.tar.foreign import PROBE

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024

def use(data, what):
    options = ImageTraining(rand_augment="rand-m9")
    stored = prepare_photo(data, PROBE if what == "probe" else PackOptions()).jpeg
    for recipe in ("exact", "balanced", "fast"):
        if what == "embed":
            ImageInputs(224, [0.5] * 3, [0.5] * 3, recipe)([Item("p", stored, "", -1)], [0])
        if what == "train":
            augmented = ImageInputs(224, [0.5] * 3, [0.5] * 3, recipe, options)
            augmented([Item("p", stored, "", 0)], [0])
    if what == "report":
        assert thumbnail(stored)

small = Path(sys.argv[1]).read_bytes()
use(small, sys.argv[3])
before = peak()
use(Path(sys.argv[2]).read_bytes(), sys.argv[3])
print(peak() - before)
"""


@pytest.mark.parametrize("what", ["pack", "probe", "embed", "train", "report"])
def test_a_line_takes_little_memory_in_every_stage(what: str, tmp_path: Path) -> None:
    for name, size in (("small", (300, 200)), ("line", (30_000, 1))):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", size, "red"), "JPEG"))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "line"), what],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert int(done.stdout) < 100  # megabytes; the line enlarged to 224 pixels took 14,000


def test_a_line_longer_than_any_jpeg_is_refused_with_the_reason() -> None:
    line = encoded(Image.new("L", (70_000, 2)), "PNG")
    with pytest.raises(PhotoRefused, match="70000 x 2 pixels, longer than a JPEG may be"):
        prepare_photo(line, PackOptions())
    assert decode_photo(line, 32).size == (32 * LONGEST, 32)


def test_thumbnails_are_small_and_of_photos_alone() -> None:
    for size in [(300, 200), (6000, 1), (1, 6000), (40, 30)]:
        assert thumbnail(encoded(Image.new("RGB", size), "JPEG"))
    assert thumbnail(None) is None
    assert thumbnail(b"%!PS-Adobe-3.0 EPSF-3.0\n") is None


# ── the worst photos that pack takes

WORST, WORST_OTHERS = 1_300, 1_000
"""Megabytes of a process that packs or decodes one photo of WebP, AVIF or TIFF, or of another
kind; stated in docs/design/photos.md."""
PIXELS = {
    "RGBA PNG": (8_000, 8_000), "long RGBA PNG": (64_000, 1_000), "RGB JPEG": (8_000, 8_000),
    "long RGB JPEG": (65_000, 984), "long RGB progressive": (65_000, 984),
    "long stored JPEG": (65_000, 384), "CMYK JPEG": (8_000, 8_000), "RGBA TIFF": (8_000, 8_000),
    "F TIFF": (8_000, 8_000), "RGB BMP": (8_000, 8_000), "P GIF": (8_000, 8_000),
    "RGBA WEBP": (8_000, 8_000), "RGBA AVIF": (8_000, 8_000),
}  # fmt: skip
ONE = """
import sys
import zlib
from pathlib import Path
from shards.photos.decode import decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo

data = Path(sys.argv[1]).read_bytes()
if sys.argv[2] == "pack":
    prepare_photo(data, PackOptions())
else:
    decode_photo(data, 224, sys.argv[2])
lines = Path("/proc/self/status").read_text().splitlines()
print(int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("F TIFF", "long RGBA PNG") else pytest.mark.full)
        for name in PIXELS
    ],
)
def test_the_largest_photos_take_no_more_than_the_docs_state(name: str, tmp_path: Path) -> None:
    *_, mode, kind = name.replace("stored", "RGB").split()
    options = {"progressive": True} if kind == "progressive" else {}
    kind = "JPEG" if kind == "progressive" else kind
    if kind not in FORMATS:
        pytest.skip(f"Pillow was built without {kind}")
    image = Image.new(mode, PIXELS[name])
    image.save(tmp_path / "photo", kind, **options)
    found = {}
    for what in ("pack", *RECIPES):
        done = subprocess.run(
            [sys.executable, "-c", ONE, str(tmp_path / "photo"), what],
            capture_output=True, text=True, check=True, timeout=500,
        )  # fmt: skip
        found[what] = int(done.stdout)
    print(name, found)
    worst = WORST if kind in ("WEBP", "AVIF", "TIFF") else WORST_OTHERS
    assert max(found.values()) <= worst
    if kind not in ("WEBP", "AVIF", "TIFF"):
        assert max(found[what] for what in ("pack", "balanced", "fast")) <= 600


def test_a_small_tiff_of_one_enormous_tile_is_refused_by_its_header() -> None:
    side = 16_384
    body = zlib.compress(bytes(side * side), 9)
    tags = [(256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side),
            (324, 8), (325, len(body))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8 + len(body)) + body + ifd
    for use in (lambda: decode_photo(data, 32), lambda: prepare_photo(data, PackOptions())):
        with pytest.raises(PhotoRefused, match="pieces of 16384 x 16384 pixels, over max_pixels"):
            use()
