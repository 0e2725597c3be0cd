"""Which bounds find copies of a photo and leave other photos alone: docs/design/near-duplicates.md.

    python -m benchmarks.near_duplicates CATALOGUE.csv IMAGES [--copies 800]

Every photo of the catalogue goes through the packer; copies of some are made, changed and packed
too. Prints, for each radius with and without the colours, the share of the copies that are found,
the pairs across label groups that count as near-duplicates, and how many test items scores would
leave out. The last line is JSON.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance

from dist_train.evaluation.labelled import near_duplicates_across_splits
from shards.catalogue.split import split_of
from shards.duplicates import near_duplicates
from shards.duplicates.hamming import near_pairs
from shards.pack.items import create_items, group_photos
from shards.photos.options import PackOptions
from shards.photos.photo import Photo, prepare_photo
from shards.storage.scratch import scratch

RADII = (0, 2, 4, 6, 8)
NO_BOUND = 256


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """The image as JPEG bytes."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def trimmed(image: Image.Image, left: float, right: float) -> Image.Image:
    """Without parts of its width at both sides and the same parts of its height."""
    w, h = image.size
    return image.crop((int(left * w), int(left * h), int((1 - right) * w), int((1 - left) * h)))


def stamped(image: Image.Image, place: tuple, ink: tuple, text: str) -> Image.Image:
    """With a coloured bar and a text at `place` (left, top, right, bottom in parts)."""
    image = image.copy()
    draw = ImageDraw.Draw(image, "RGBA")
    box = [part * side for part, side in zip(place, image.size * 2, strict=True)]
    draw.rectangle(box, fill=ink)
    draw.text((box[0], box[1]), text, fill=(0, 0, 0, 160), font_size=image.height // 12)
    return image


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "quality 60": lambda image: jpeg(image, 60),
    "quality 30": lambda image: jpeg(image, 30),
    "resized 0.6": lambda image: jpeg(image.resize([side * 3 // 5 for side in image.size])),
    "trimmed 1 % each side": lambda image: jpeg(trimmed(image, 0.01, 0.01)),
    "trimmed 2 % each side": lambda image: jpeg(trimmed(image, 0.02, 0.02)),
    "trimmed 2 % right": lambda image: jpeg(trimmed(image, 0, 0.02)),
    "5 % brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.05)),
    "logo in a corner": lambda image: jpeg(
        stamped(image, (0.7, 0.88, 0.98, 0.97), (200, 30, 30, 255), "TOKO")
    ),
    "pale bar across": lambda image: jpeg(
        stamped(image, (0.3, 0.44, 0.7, 0.56), (255, 255, 255, 90), "watermark")
    ),
}


def signatures_of(photos: list[Photo]) -> np.ndarray:
    """(n,) SIGNATURE_DTYPE of packed photos."""
    packed = (
        near_duplicates.AS_BYTES.pack(row, int(photo.phash, 16), bytes.fromhex(photo.colours))
        for row, photo in enumerate(photos)
    )
    return np.frombuffer(b"".join(packed), near_duplicates.SIGNATURE_DTYPE)


def are_near_duplicates(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n,) bool: whether photos one by one are near-duplicates under the bounds as they are set."""
    near = np.bitwise_count(one["hash"] ^ other["hash"]) <= near_duplicates.RADIUS
    return near & near_duplicates.alike(one["colours"], other["colours"])


def photo_groups(photos: Iterable[tuple[str, str, str]]) -> np.ndarray:
    """(n,) int64: the photo groups of (sha256, phash, colours), as they are found at the seal."""
    with TemporaryDirectory() as folder, scratch(Path(folder) / "items") as database:
        create_items(database)
        database.executemany("INSERT INTO item (sha256, phash, colours) VALUES (?, ?, ?)", photos)
        group_photos(database, Path(folder))
        found = database.execute("SELECT photo_group FROM item ORDER BY rowid").fetchall()
    return np.array(found, np.int64).reshape(-1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--copies", type=int, default=800)
    args = parser.parse_args()
    table = pd.read_csv(args.catalogue, dtype=str, keep_default_na=False)
    options = PackOptions()
    files = [(args.images / name).read_bytes() for name in table.image]
    photos = [prepare_photo(data, options) for data in files]
    some = np.random.default_rng(0).permutation(len(files))[: args.copies]
    images = [Image.open(io.BytesIO(files[k])).convert("RGB") for k in some]
    copies = {
        name: signatures_of([prepare_photo(change(image), options) for image in images])
        for name, change in COPIES.items()
    }
    rows = [
        _row(radius, colours, table, photos, [photos[k] for k in some], copies)
        for colours in (NO_BOUND, 4, 3.5, 3, 2.5)
        for radius in RADII
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    print(json.dumps(rows))


def _row(
    radius: int, colours: float, table: pd.DataFrame, photos: list[Photo], some: list[Photo],
    copies: dict[str, np.ndarray],
) -> dict[str, float]:  # fmt: skip
    near_duplicates.RADIUS, near_duplicates.COLOURS = radius, colours
    near_duplicates.BRIGHTNESS = NO_BOUND if colours == NO_BOUND else 16
    labels = table.label_group.to_numpy()
    prints = signatures_of(photos)
    across = sum(_across(labels, prints, i, j) for i, j in near_pairs(prints["hash"], radius))
    splits = pd.Series([split_of(group) for group in table.label_group])
    groups = photo_groups((photo.sha256, photo.phash, photo.colours) for photo in photos)
    test = splits == "test"
    items = pd.DataFrame({"photo_group": groups, "split": splits})
    left_out = test & near_duplicates_across_splits(items)
    found = {
        name: round(float(are_near_duplicates(signatures_of(some), c).mean()), 3)
        for name, c in copies.items()
    }
    return {
        "radius": radius, "colours": colours, **found, "pairs across groups": int(across),
        "left out of test": int(left_out.sum()), "of": int(test.sum()),
        "largest group": int(np.unique(groups, return_counts=True)[1].max()),
    }  # fmt: skip


def _across(labels: np.ndarray, prints: np.ndarray, i: np.ndarray, j: np.ndarray) -> int:
    apart = labels[i] != labels[j]
    return int(are_near_duplicates(prints[i[apart]], prints[j[apart]]).sum())


if __name__ == "__main__":
    main()
