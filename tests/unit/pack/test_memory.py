"""The memory of a pack, which neither the number of postings nor that of their photos sets."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Photos are invented records: no pixels are painted, all that follows them is the pack itself.
CHILD = """
import hashlib, json, sys
from pathlib import Path
from shards.pack import build
from shards.duplicates import hamming
from shards.pack import pack
from shards.storage import scratch
from shards.pack import seal
from shards.photos.options import PackOptions
from shards.photos.photo import Photo

def invented_photo(root, name, options):
    number = int(name.removesuffix(".jpg"))
    # One of four is a copy of another, a few bits and levels apart.
    source = number - number % 4 // 3
    digest = hashlib.blake2b(b"%d" % source, digest_size=35).digest()
    phash = int.from_bytes(digest[:8], "big") ^ (number != source) << number % 64
    colours = bytes(8 + level * 15 // 16 for level in digest[8:])
    sha256 = hashlib.sha256(b"%d" % number).hexdigest()
    return Photo(digest, 1, 1, sha256, f"{phash:016x}", colours.hex())

if len(sys.argv) > 4:
    build.load_photo, pack.check_survey = invented_photo, lambda *found: None
found = json.loads(sys.argv[3])
if found:
    scratch.CACHE, seal.ROW_GROUP, hamming.ROWS = found
images = Path(sys.argv[4]) if len(sys.argv) > 4 else None
counts = pack.pack(Path(sys.argv[1]), images, Path(sys.argv[2]), PackOptions(shard_items=1000))
lines = Path("/proc/self/status").read_text().splitlines()
print(counts["near_duplicates"]["photo_groups"])
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
SMALL = [1_000, 2**18, 2**12]
# Allocators that give back what is freed: what they keep else is chance, tens of megabytes of it.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "ARROW_DEFAULT_MEMORY_POOL": "system"}


def catalogue(folder: Path, postings: int, photos: bool) -> Path:
    path = folder / f"{postings}.csv"
    with path.open("w") as file:
        file.write("posting_id,title,label_group,price,image\n")
        for n in range(postings):
            image = f"{n}.jpg" if photos else ""
            file.write(f"posting {n},title of about fifty characters number {n},g{n // 3},{n},")
            file.write(f"{image}\n")
    return path


def peak(folder: Path, postings: int, *images: str, buffers: list[int] | None = None) -> int:
    """Bytes of the largest resident memory of a process that packs so many postings."""
    path = catalogue(folder, postings, photos=bool(images))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(folder / f"s{postings}"),
         json.dumps(buffers), *images],
        env=os.environ | GIVES_BACK, capture_output=True, text=True, check=True, timeout=1500,
    )  # fmt: skip
    groups, peaked = done.stdout.split()
    assert int(groups) == (postings // 4 if images else 0)
    return int(peaked) * 1024


@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_postings_and_their_photos(tmp_path: Path) -> None:
    # Buffers so small that 20,000 postings fill them: what grows then is of the postings.
    small, large = (peak(tmp_path, n, str(tmp_path), buffers=SMALL) for n in (20_000, 80_000))
    print(f"{small / 2**20:.0f} MB and {large / 2**20:.0f} MB")
    assert large - small < 140 * 60_000  # 50 to 100 seen; a table of photos took 245
    assert large < 250e6


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_million_postings_with_photos(tmp_path: Path) -> None:
    assert peak(tmp_path, 1_000_000, str(tmp_path)) < 300e6


def test_a_shard_of_a_larger_set_takes_no_more(tmp_path: Path) -> None:
    assert peak(tmp_path, 20_000) < 300e6


# ── one large photo

PHOTO = """
import sys
from pathlib import Path
from shards.photos.options import PackOptions
from shards.photos.photo import load_photo

path = Path(sys.argv[1])
photo = load_photo(path.parent, path.name, PackOptions())
lines = Path("/proc/self/status").read_text().splitlines()
print(photo.width, photo.height)
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["RGB", pytest.param("RGBA", marks=pytest.mark.full)])
def test_a_png_of_as_many_pixels_as_are_taken_stays_small(tmp_path: Path, mode: str) -> None:
    pattern = np.random.default_rng(0).integers(0, 255, (64, 64, len(mode)), np.uint8)
    image = Image.fromarray(np.tile(pattern, (125, 125, 1)))
    assert image.width * image.height == 64_000_000
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    (tmp_path / "a.png").write_bytes(out.getvalue())
    done = subprocess.run(
        [sys.executable, "-c", PHOTO, str(tmp_path / "a.png")],
        capture_output=True, text=True, check=True, timeout=500,
    )  # fmt: skip
    *size, peaked = map(int, done.stdout.split())
    print(f"{peaked / 1024:.0f} MB of {len(out.getvalue()) / 2**20:.0f} MB")
    assert size == [384, 384]
    assert peaked * 1024 < 300e6
