"""What the tests of foreign tars share: small photos, and tars written member by member."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def photo(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A photo of noise, another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_tar(
    path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> Path:
    """A tar of (name, bytes) in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """Photo, title and label of `count` items, two of each label."""
    files = []
    for number in range(first, first + count):
        key = f"{number:09d}"
        files += [
            (f"{key}.jpg", photo(number)),
            (f"{key}.txt", f"title {number}".encode()),
            (f"{key}.cls", str(number // 2).encode()),
        ]
    return files
