"""A generated catalogue to match in seconds: small photos, carried columns, and vectors by product.

The vectors stand for those of encoders, which a test could not train in seconds. They are written
as the stage embed writes them, by what it ends with; all other stages are run as they are.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from dist_train.config.options import EmbedConfig
from dist_train.config.training import result_options
from dist_train.distributed import stage
from dist_train.distributed.runtime import row_blocks
from dist_train.embedding import embed
from dist_train.embedding.store import part_path
from dist_train.synthetic.catalogue import generate
from shards.read.shard_set import ShardSet
from shards.storage import stage_files
from tests.support.verbs import Said, call

WIDTH = 24
"""D of both modalities."""
NOISE = {"image": 1.0, "text": 0.8}
"""Length of the noise beside a product's direction, which has length 1."""


def postings(folder: Path, items: int = 700, seed: int = 1) -> pd.DataFrame:
    """A generated catalogue without photos, with the columns brand and price, all texts.

    label_group is the truth. A brand makes several products; the price of a product differs by a
    few percent from seller to seller, and every tenth posting names neither.
    """
    generate(folder, items, seed=seed, photos=False)
    table = pd.read_csv(folder / "catalogue.csv", dtype=str, keep_default_na=False)
    rng, product = np.random.default_rng(seed), pd.factorize(table.label_group)[0]
    price = 5_000 * np.exp(rng.uniform(0, 4, product.max() + 1))[product]
    price *= 1 + 0.03 * rng.standard_normal(items)
    known = np.arange(items) % 10 > 0
    table["brand"] = np.where(known, [f"Brand {number % 60}" for number in product], "")
    table["price"] = np.where(known, price.round().astype(int).astype(str), "")
    return table


def add_photos(table: pd.DataFrame, images: Path, seed: int = 1) -> pd.DataFrame:
    """The same with a photo for each posting, below `images`; a third are like their product's."""
    rng, product = np.random.default_rng(seed), pd.factorize(table.label_group)[0]
    pattern = rng.integers(0, 256, (product.max() + 1, 6, 6, 3))[product]
    own = rng.random(len(table)) > 1 / 3
    pattern[own] = rng.integers(0, 256, (own.sum(), 6, 6, 3))
    pattern = np.clip(pattern + 25 * rng.standard_normal(pattern.shape), 0, 255)
    images.mkdir(parents=True)
    names = [f"{posting_id}.jpg" for posting_id in table.posting_id]
    for name, pixels in zip(names, pattern.astype(np.uint8), strict=True):
        Image.fromarray(pixels).resize((36, 36), Image.Resampling.BILINEAR).save(images / name)
    return table.assign(image=names)


def with_splits(table: pd.DataFrame) -> pd.DataFrame:
    """Two fifths of the products are val, so that a small catalogue has enough of them."""
    number = pd.factorize(table.label_group)[0]
    split = np.array(["val", "val", "test", "train", "train"])[number % 5]
    return table.assign(split=np.where(table.label_group == "", "", split))


def write_vectors(
    shards: Path,
    out: Path,
    product: Mapping[str, str],
    modalities: Iterable[str] = ("image", "text"),
    noise: Mapping[str, float] = NOISE,
) -> None:
    """An embedding set: unit vectors near the direction of each posting's product.

    product: of every posting id; directions and noise depend on the ids and products alone, not
    on the labels that the shard set knows.
    """
    packed, config = (shard_set := ShardSet(shards)).packed, EmbedConfig(device="cpu")
    parents = stage.parents_for(out, shards=shards)
    stage_files.begin(out, stage.EMBEDDING, result_options(config), parents)
    for modality in modalities:
        has = packed[f"has_{modality}"].to_numpy()
        rows = np.stack(
            [
                _direction(f"{modality} {product[one]}")
                + noise[modality] * _direction(f"{modality} {one} alone")
                for one in packed.posting_id
            ]
        )
        rows *= (has / np.linalg.norm(rows, axis=1))[:, None]
        for number, block in enumerate(row_blocks(len(packed))):
            np.save(part_path(out, modality, number), rows[block].astype(np.float16))
    embed._finish(shard_set, out, config)


def _direction(name: str) -> np.ndarray:
    """A unit vector (D,) that is drawn by a name."""
    rng = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    row = rng.standard_normal(WIDTH)
    return row / np.linalg.norm(row)


def joined(
    table: pd.DataFrame,
    folder: Path,
    images: Path | None = None,
    product: Mapping[str, str] | None = None,
    modalities: Iterable[str] = ("image", "text"),
    noise: Mapping[str, float] = NOISE,
) -> Path:
    """The pairs of a catalogue: packed, given vectors, indexed and joined below `folder`.

    product: the truth, by posting id, where it is not in label_group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "catalogue.csv", index=False)
    if product is None:
        product = dict(zip(table.posting_id, table.label_group, strict=True))
    photos = [] if images is None else ["--images", images]
    shards, embedding, index, pairs = (
        folder / name for name in ("shards", "embedding", "index", "pairs")
    )
    done("pack", folder / "catalogue.csv", *photos, "--out", shards, "--size", 32)
    write_vectors(shards, embedding, product, modalities, noise)
    done("index", embedding, "--out", index)
    done("join", embedding, "--index", index, "--out", pairs, "--device", "cpu")
    return pairs


def done(*words: object) -> Said:
    """Run a verb, which must be a success."""
    said = call(*words)
    assert said.code == 0, said.text
    return said
