"""Reading and decoding beside the peers: python -m benchmarks.decoding [--table]

The same photos of 1000 x 1000 pixels to normalised tensors of 224 x 224, by one thread, CPU time:
ours by each recipe, from originals (`--keep`) and from shards as packed by default; webdataset with
Pillow's full decode, and mosaicml-streaming, both with timm's transform.
With --table: what sizes and qualities of stored photos cost and give.
"""

import io
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import streaming
import torch
import webdataset
from PIL import Image
from timm.data import create_transform

from benchmarks.paired import faster, report, seconds
from benchmarks.pictures import catalogue, originals, psnr
from dist_train.encoders.batches import ImageInputs
from shards.pack.pack import pack
from shards.photos.decode import Recipe, decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo
from shards.read.shard_set import ItemReader, ShardSet

PHOTOS, ROUNDS, BATCH, SIZE = 64, 9, 16, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PEER = "webdataset, Pillow"
TRANSFORM = create_transform(SIZE, crop_pct=1.0, interpolation="bicubic", mean=MEAN, std=STD)


def main() -> None:
    """Measure and print, the last line as JSON."""
    torch.set_num_threads(1)
    if "--table" in sys.argv:
        table(list(originals(16)))
        return
    with TemporaryDirectory() as folder:
        photos = list(originals(PHOTOS))
        table_file = catalogue(Path(folder) / "catalogue", iter(photos))
        sets = {name: Path(folder) / name for name in ("kept", "default")}
        for name, out in sets.items():
            pack(table_file, table_file.parent / "images", out, PackOptions(keep=name == "kept"))
        ways: dict[str, Callable[[], Any]] = {PEER: lambda: by_webdataset(sets["kept"])}
        for recipe in ("exact", "balanced", "fast"):
            ways[recipe] = by_us(ShardSet(sets["kept"]).reader(), recipe)
        ways["balanced from default shards"] = by_us(ShardSet(sets["default"]).reader(), "balanced")
        write_mds(Path(folder) / "mds", photos)
        ways["mosaicml-streaming"] = by_streaming(Path(folder) / "mds")
        report("decoding", PHOTOS, seconds(ways, ROUNDS), rows(photos))


def rows(photos: list[bytes]) -> list[dict[str, Any]]:
    """What is compared, and what is wanted of it."""
    near = {recipe: nearness(photos, recipe) for recipe in ("balanced", "fast")}
    return [
        {"ours": "exact", "peer": PEER},
        {"ours": "balanced", "peer": PEER, "wanted": 1.9, "wanted_psnr": 47} | near["balanced"],
        {"ours": "fast", "peer": PEER, "wanted": 3, "wanted_psnr": 34} | near["fast"],
        {"ours": "balanced from default shards", "peer": PEER, "wanted": 5},
        {"ours": "balanced", "peer": "mosaicml-streaming", "wanted": 1.5},
    ]


def nearness(photos: list[bytes], recipe: Recipe) -> dict[str, float]:
    """PSNR to Pillow's full decode and bicubic: of the mean error, and of the worst photo."""
    ours = np.stack([np.asarray(decode_photo(photo, SIZE, recipe)) for photo in photos])
    theirs = np.stack([np.asarray(by_pillow(photo)) for photo in photos])
    worst = min(psnr(one, other) for one, other in zip(ours, theirs, strict=True))
    return {"psnr": psnr(ours, theirs), "psnr_of_the_worst": worst}


def by_pillow(photo: bytes) -> Image.Image:
    """Full decode and antialiased bicubic."""
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def by_us(reader: ItemReader, recipe: Recipe) -> Callable[[], None]:
    """Our reader and the image encoder's own inputs."""
    inputs = ImageInputs(image_size=SIZE, decode=recipe, mean=MEAN, std=STD)

    def run() -> None:
        for first in range(0, PHOTOS, BATCH):
            items = [reader[number] for number in range(first, first + BATCH)]
            check(inputs(items, [0] * BATCH)[0])

    return run


def by_webdataset(shards: Path) -> None:
    """webdataset's pipeline, decoding by Pillow."""
    tars = sorted(str(tar) for tar in shards.glob("*/*.tar"))
    pipeline = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    samples = pipeline.decode("pilrgb").to_tuple("jpg")
    stack(TRANSFORM(image) for (image,) in samples)


def write_mds(folder: Path, photos: list[bytes]) -> None:
    """The same bytes in mosaicml-streaming's format."""
    with streaming.MDSWriter(out=str(folder), columns={"jpg": "jpeg"}) as writer:
        for photo in photos:
            writer.write({"jpg": Image.open(io.BytesIO(photo))})


def by_streaming(folder: Path) -> Callable[[], None]:
    """mosaicml-streaming's dataset, which decodes by Pillow."""
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return lambda: stack(TRANSFORM(sample["jpg"].convert("RGB")) for sample in dataset)


def stack(tensors: Iterable[torch.Tensor]) -> None:
    """Batches, as a loader makes them."""
    found = iter(tensors)
    for _ in range(PHOTOS // BATCH):
        check(torch.stack(list(islice(found, BATCH))))
    assert next(found, None) is None


def check(batch: torch.Tensor) -> None:
    """The batch is what a model takes."""
    assert batch.shape == (BATCH, 3, SIZE, SIZE)
    assert batch.dtype == torch.float32


def table(photos: list[bytes]) -> None:
    """Bytes, nearness and speed of what is stored, by size and quality."""
    stored = {"originals": photos}
    for size in (256, 288, 384, 512):
        for quality in (90, 92, 95):
            options = PackOptions(size=size, quality=quality)
            stored[f"{size} q{quality}"] = [prepare_photo(p, options).jpeg for p in photos]
    ways: dict[str, Callable[[], Any]] = {"Pillow": lambda: [by_pillow(p) for p in photos]}
    for name, found in stored.items():
        ways |= {f"{name} {r}": decoding(found, r) for r in ("balanced", "fast")}
    taken = seconds(ways, 5)
    print("stored | kB | of the original | dB stored | dB balanced | x balanced | dB fast | x fast")
    exact = np.stack([np.asarray(by_pillow(photo)) for photo in photos])
    for name, found in stored.items():
        kilobytes = sum(map(len, found)) / len(found) / 1000
        share = sum(map(len, found)) / sum(map(len, photos))
        cells = [name, f"{kilobytes:.0f}", f"{share:.1%}", near(found, "exact", exact)]
        for recipe in ("balanced", "fast"):
            ratio = faster(taken, f"{name} {recipe}", "Pillow")
            cells += [near(found, recipe, exact), f"{ratio:.1f}"]
        print(" | ".join(cells))


def decoding(photos: list[bytes], recipe: Recipe) -> Callable[[], None]:
    """Decode them all."""

    def run() -> None:
        for photo in photos:
            decode_photo(photo, SIZE, recipe)

    return run


def near(photos: list[bytes], recipe: Recipe, exact: np.ndarray) -> str:
    """PSNR of what `recipe` makes of `photos` to `exact` (n, S, S, 3)."""
    ours = np.stack([np.asarray(decode_photo(photo, SIZE, recipe)) for photo in photos])
    return f"{psnr(ours, exact):.1f}"


if __name__ == "__main__":
    main()
