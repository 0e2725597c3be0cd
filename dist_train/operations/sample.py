"""A catalogue in numbers, and a sample of it packed as all of it will be."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import pandas as pd

from dist_train.config import Config, View
from dist_train.runtime import Clock
from shards.carried import Carried
from shards.catalogue import COLUMNS, Catalogue
from shards.packer import pack
from shards.split import split_of

POSTINGS = 256
"""Of the sample, about; whole products, so that there is something to train on."""


@dataclass(frozen=True)
class Counts:
    """Of a whole catalogue: postings, products to train on, items by split and part."""

    postings: int
    classes: int
    items: Counter[tuple[str, View]]

    def all_with(self, view: View) -> int:
        """Items that have the part, of all splits."""
        return sum(number for (_, name), number in self.items.items() if name == view)


@dataclass(frozen=True)
class Packed:
    """A packed sample: what a posting of it took."""

    shards: Path
    postings: int
    bytes_each: float
    seconds_each: float


def count(config: Config) -> Counts:
    """Read the catalogue once, chunk by chunk. Raises BadInput for one that cannot be read."""
    items: Counter[tuple[str, View]] = Counter()
    postings, groups = 0, set()
    for chunk in _chunks(config):
        postings += len(chunk)
        split = chunk.label_group.map(split_of)
        groups |= set(chunk.label_group[split == "train"])
        parts: dict[View, str] = {"image": "image", "text": "title"}
        for view, column in parts.items():
            for name, number in split[chunk[column] != ""].value_counts().items():
                items[str(name), view] += int(number)
    return Counts(postings, len(groups), items)


def packed_sample(config: Config, postings: int, folder: Path) -> Packed:
    """Pack about POSTINGS of the `postings` into `folder`, chosen by a hash of their product."""
    one_of = max(1, postings // POSTINGS)
    table = folder / "sample.csv"
    taken = 0
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for chunk in _chunks(config):
            names = chunk.label_group.where(chunk.label_group != "", chunk.posting_id)
            rows = chunk[list(COLUMNS)][[_hash(name) % one_of == 0 for name in names]]
            writer.writerows(rows.itertuples(index=False))
            taken += len(rows)
    clock, out = Clock(), folder / "shards"
    pack(table, config.images, out, replace(config.pack, workers=1))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Packed(out, taken, size / taken, clock.seconds() / taken)


def _chunks(config: Config) -> Iterator[pd.DataFrame]:
    return Catalogue(config.catalogue, config.columns).postings(Carried())


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8, salt=b"sample").digest(), "big")
