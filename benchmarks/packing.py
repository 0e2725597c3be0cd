"""Packing beside a webdataset ShardWriter with Pillow: python -m benchmarks.packing

Photos of 1000 x 1000 pixels to JPEGs of 384 pixels on the short side at quality 92, and small ones
that need no reduction (ours keeps their coded pictures), one process each, CPU time. Ours is the
whole of `pack` with one worker: plan, sha256 and perceptual hash of each photo, every tar read
back, seal. The peer's loop does none of that. Peak memory is that of a process that does nothing
else, its imports in it.
"""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import webdataset
from PIL import Image, ImageOps

from benchmarks.paired import report, seconds
from benchmarks.pictures import catalogue, originals, real_photos
from shards.pack.pack import pack
from shards.photos.options import PackOptions

PHOTOS, EACH, ROUNDS, SIZE, QUALITY = 100, 4, 3, 384, 92
POSTINGS = PHOTOS * EACH
PACK = """
import sys
from pathlib import Path
from shards.photos.options import PackOptions
from shards.pack.pack import pack
pack(*map(Path, sys.argv[1:]), PackOptions())
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
FILTERS = {"BICUBIC": Image.Resampling.BICUBIC, "LANCZOS": Image.Resampling.LANCZOS}


def main() -> None:
    """Measure and print; each kind of photo ends in a line of JSON."""
    with TemporaryDirectory() as folder:
        large = catalogue(Path(folder) / "large", originals(PHOTOS), EACH)
        compare("packing 1000-pixel photos", large, Path(folder) / "out", wanted=2.5)
        small = (path.read_bytes() for path in islice(real_photos(), PHOTOS))
        found = small if real_photos() else originals(PHOTOS, 348)
        few = catalogue(Path(folder) / "small", found, EACH)
        compare("packing small photos", few, Path(folder) / "out", wanted=2.5)
        print(f"peak memory of our packer: {peak(large, Path(folder) / 'out'):.0f} MB")


def compare(title: str, table: Path, out: Path, wanted: float | None) -> None:
    """Time ours beside the peer's two filters."""
    ways: dict[str, Callable[[], Any]] = {"pack": lambda: ours(table, out)}
    for name in FILTERS:
        ways[f"ShardWriter, {name}"] = lambda name=name: theirs(table, out, name)
    print(title)
    rows = [{"ours": "pack", "peer": peer, "wanted": wanted} for peer in ways if peer != "pack"]
    report(title, POSTINGS, seconds(ways, ROUNDS), rows)


def ours(table: Path, out: Path) -> None:
    """`dist-train pack` with its defaults and one worker."""
    shutil.rmtree(out, ignore_errors=True)
    counts = pack(table, table.parent / "images", out, PackOptions(size=SIZE, quality=QUALITY))
    assert counts["photos"] == POSTINGS


def theirs(table: Path, out: Path, resampling: str = "BICUBIC") -> None:
    """The loop that users of webdataset write."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=5000, verbose=0) as sink:
        for number, row in enumerate(pd.read_csv(table).itertuples()):
            about = {"id": row.posting_id, "title": row.title, "label": row.label_group}
            jpeg = reduced(table.parent / "images" / str(row.image), FILTERS[resampling])
            key = f"{number:09d}"
            sink.write({"__key__": key, "jpg": jpeg, "json": about, "txt": str(row.title)})


def reduced(path: Path, resampling: Image.Resampling) -> bytes:
    """Turned upright, RGB, its short side at most SIZE."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    scale = SIZE / min(image.size)
    if scale < 1:
        size = round(image.width * scale), round(image.height * scale)
        image = image.resize(size, resampling)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def peak(table: Path, out: Path) -> float:
    """Peak resident memory in MB of a process that packs `table` and imports nothing else."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", PACK, str(table), str(table.parent / "images"), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1000


if __name__ == "__main__":
    main()
