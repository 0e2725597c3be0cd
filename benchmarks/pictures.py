"""The same pictures for every benchmark: mosaics of real photos, or generated ones."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

SIDE = 1000
TILE = 348


def originals(count: int, side: int = SIDE) -> Iterator[bytes]:
    """`count` JPEGs (quality 90) of side x side pixels with the detail of real photos.

    Mosaics of the photos below DIST_TRAIN_DATA; where it is not set, generated noise whose spectrum
    falls with frequency, as that of photos does.
    """
    photos = real_photos()
    for number in range(count):
        image = _mosaic(photos, number, side) if photos else _noise(number, side)
        yield encoded(image, quality=90)


def real_photos() -> list[Path]:
    """The photos below DIST_TRAIN_DATA in an order that mixes the products."""
    data = os.environ.get("DIST_TRAIN_DATA")
    photos = sorted(Path(data).glob("grocery/images/**/*.jpg")) if data else []
    return [photos[i] for i in np.random.default_rng(0).permutation(len(photos))]


def catalogue(folder: Path, photos: Iterator[bytes], each: int = 1) -> Path:
    """Write `photos` and a catalogue that names each of them `each` times; the catalogue."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, photo in enumerate(photos):
        (folder / "images" / f"{number:06d}.jpg").write_bytes(photo)
        rows += [(f"{number:06d}.jpg", f"title of photo {number}", f"product {number // 2}")] * each
    table = pd.DataFrame(rows, columns=["image", "title", "label_group"])
    table.insert(0, "posting_id", [f"posting-{number:06d}" for number in range(len(rows))])
    table.to_csv(folder / "catalogue.csv", index=False)
    return folder / "catalogue.csv"


def encoded(image: Image.Image, quality: int) -> bytes:
    """`image` as a JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of bytes, infinite for equal ones."""
    error = np.square(one.astype(np.float64) - other).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _mosaic(photos: list[Path], number: int, side: int) -> Image.Image:
    across = -(-side // TILE)
    picture = Image.new("RGB", (across * TILE, across * TILE))
    for place in range(across**2):
        photo = Image.open(photos[(number * across**2 + place) % len(photos)]).convert("RGB")
        corner = (TILE * (place % across), TILE * (place // across))
        picture.paste(photo.crop((0, 0, TILE, TILE)), corner)
    margin = (across * TILE - side) // 2
    return picture.crop((margin, margin, margin + side, margin + side))


def _noise(number: int, side: int) -> Image.Image:
    draw = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    spectrum = (
        np.fft.rfft2(draw.normal(size=(3, side, side))) / np.maximum(frequency, 1 / side) ** 1.5
    )
    noise = np.fft.irfft2(spectrum, (side, side))
    noise /= noise.std((1, 2), keepdims=True)
    # Brightness varies more than colour: the three channels of a photo go together.
    pixels = 128 + 40 * noise[:1] + 12 * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
