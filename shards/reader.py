"""A shard set read by position: one pread a member, its crc checked."""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from shards import stage_files
from shards.errors import BadInput, Corrupt
from shards.index import ABSENT, MEMBERS, RECORD, read_index
from shards.packer import KIND, shard_path
from shards.split import SPLITS


@dataclass(frozen=True)
class Item:
    """One packed posting: what its members hold; class_id is -1 outside the train split."""

    posting_id: str
    photo: bytes | None
    title: str
    class_id: int


class ShardSet:
    """A finished shard set on disk."""

    def __init__(self, path: Path) -> None:
        """Open `path`; raises BadInput when it is not a finished shard set."""
        self.path = path
        self.manifest = stage_files.open_finished(path, KIND)
        self.fingerprint: str = self.manifest["fingerprint"]

    @cached_property
    def items(self) -> pd.DataFrame:
        """items.parquet: one row a catalogue row, in the catalogue's order."""
        return pd.read_parquet(self.path / "items.parquet")

    @cached_property
    def packed(self) -> pd.DataFrame:
        """The packed rows in the order of `reader(SPLITS)`: by split, shard and slot."""
        rank = {split: number for number, split in enumerate(SPLITS)}
        packed = self.items[self.items.status == "packed"]
        order = np.lexsort((packed.slot, packed.shard, packed.split.map(rank)))
        return packed.iloc[order].reset_index(drop=True)

    def reader(self, splits: Sequence[str] = SPLITS) -> "ItemReader":
        """The items of `splits` by position, in the order split, shard, slot."""
        unknown = set(splits) - set(SPLITS)
        if unknown:
            raise BadInput(f"{self.path}: no split {', '.join(unknown)}; there are {SPLITS}")
        files = sorted(name for name in self.manifest["files"] if name.endswith(".tar"))
        return ItemReader([self.path / f for s in splits for f in files if f.startswith(f"{s}/")])

    def photo(self, posting_id: str) -> bytes | None:
        """The stored JPEG of a posting; None when it has none or is not in the set."""
        if posting_id not in self._row_of:
            return None
        row = self.packed.iloc[self._row_of[posting_id]]
        reader = ItemReader([shard_path(self.path, row.split, row.shard)])
        at = int(np.searchsorted(reader.records["slot"], row.slot))
        return reader[at].photo

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {posting_id: row for row, posting_id in enumerate(self.packed.posting_id)}


class ItemReader:
    """Items of some tars by position; safe to copy into worker processes."""

    def __init__(self, tars: Sequence[Path]) -> None:
        """Open the indices of `tars`; raises Corrupt naming a file that does not fit its index."""
        self.tars = list(tars)
        parts = [_checked_records(tar) for tar in self.tars]
        self.records = np.concatenate([np.zeros(0, RECORD), *parts])
        self.tar_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> Item:
        """Read the item at `position` (0 to len - 1); raises Corrupt naming file and slot."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        about: dict[str, Any] = json.loads(self._member(position, "json") or b"{}")
        return Item(
            posting_id=about["posting_id"],
            photo=self._member(position, "jpg"),
            title=about["title"],
            class_id=int(self.records["class_id"][position]),
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def _member(self, position: int, name: str) -> bytes | None:
        record = self.records[position]
        size = int(record[f"{name}_size"])
        if size == ABSENT:
            return None
        data = os.pread(self._file(int(self.tar_of[position])), size, int(record[f"{name}_at"]))
        if zlib.crc32(data) != record[f"{name}_crc"]:
            tar = self.tars[self.tar_of[position]]
            raise Corrupt(f"{tar}: slot {record['slot']}, member {name}: bytes differ from its crc")
        return data

    def _file(self, tar: int) -> int:
        if tar not in self._open:
            self._open[tar] = os.open(self.tars[tar], os.O_RDONLY)
        return self._open[tar]


def _checked_records(tar: Path) -> np.ndarray:
    index = read_index(tar.with_suffix(".idx"))
    if not tar.exists():
        raise Corrupt(f"{tar}: missing; restore it or pack again")
    if tar.stat().st_size != index.header["tar_bytes"] or index.header["members"] != [*MEMBERS]:
        raise Corrupt(f"{tar}: does not fit its index; restore it or pack again")
    return index.records
