"""A shard set read by position: one pread a member, its crc checked."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from isal.isal_zlib import crc32

from shards.catalogue.split import SPLITS
from shards.read.location import Folder, Location, Mirror, open_files
from shards.storage.errors import BadInput, CacheFull, Corrupt, Failed, Unreadable
from shards.storage.files import corrupt_error
from shards.tar.index import ABSENT, MEMBERS, RECORD, TEXTS, ShardIndex, parse_index
from shards.tar.layout import ITEMS, KIND, index_of, is_tar, shard_path

FIELDS = {name: (RECORD.names or ()).index(f"{name}_at") for name in MEMBERS}
"""Where in a record the offset, the size and the crc of each member begin."""
MAX_OPEN = 256
"""Tars that a reader holds open at a time: a fourth of what a process may open by default."""


@dataclass(frozen=True)
class Item:
    """One packed posting; `photo` is a JPEG or None, class_id is -1 outside the train split."""

    posting_id: str
    photo: bytes | None
    title: str
    class_id: int


class ShardSet:
    """A finished shard set, in a folder or at a URL."""

    def __init__(self, location: Location) -> None:
        """Raises BadInput for what is no finished shard set, Unreachable as `open_files` does."""
        self.files = open_files(location, KIND)
        self.location = self.files.where()
        self.manifest = self.files.manifest
        self.fingerprint: str = self.manifest["fingerprint"]
        # A tar from another tool may hold items of every split.
        self._mixed = "indexed_tars" in self.manifest["counts"]

    @cached_property
    def items(self) -> pd.DataFrame:
        """items.parquet: one row a catalogue row, in the catalogue's order."""
        with self.files.open(ITEMS) as file, corrupt_error(Path(self.files.where(ITEMS))):
            return pd.read_parquet(file.name)

    @cached_property
    def packed(self) -> pd.DataFrame:
        """The packed rows in the order of `reader(SPLITS)`: by split, shard and slot."""
        rank = {split: number for number, split in enumerate(SPLITS)}
        packed = self.items[self.items.status == "packed"]
        order = np.lexsort((packed.slot, packed.shard, packed.split.map(rank)))
        return packed.iloc[order].reset_index(drop=True)

    def reader(self, splits: Sequence[str] = SPLITS) -> "ItemReader":
        """The items of `splits` by position, ordered by split, shard, slot."""
        unknown = set(splits) - set(SPLITS)
        if unknown:
            raise BadInput(f"{self.location}: no split {', '.join(unknown)}; there are {SPLITS}")
        tars = sorted(name for name in self.manifest["files"] if is_tar(name))
        sources = [(t, s) for s in splits for t in tars if self._mixed or t.startswith(f"{s}/")]
        return ItemReader(self.files, sources)

    def photo(self, posting_id: str) -> bytes | None:
        """The stored JPEG of a posting; None when it has none or is not in the set."""
        if posting_id not in self._row_of:
            return None
        row = self.packed.iloc[self._row_of[posting_id]]
        tar = row.tar if self._mixed else str(shard_path(Path(), row.split, row.shard))
        reader = ItemReader(self.files, [(tar, row.split)])
        return reader[int(np.searchsorted(reader.records["slot"], row.slot))].photo

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {posting_id: row for row, posting_id in enumerate(self.packed.posting_id)}


class ItemReader:
    """Items of some tars by position; safe to copy into worker processes."""

    def __init__(self, files: Folder | Mirror, sources: Sequence[tuple[str, str]]) -> None:
        """Open the indices of `sources` (tar, split); Corrupt names one that does not fit."""
        self._open: dict[int, int] = {}
        self.files, self.tars = files, [tar for tar, _ in sources]
        indices: dict[str, ShardIndex] = {}
        for tar in dict.fromkeys(self.tars):
            name, facts = index_of(tar), files.manifest["files"].get(tar)
            with files.open(name) as file:
                indices[tar] = index = parse_index(file.read(), files.where(name))
            # A tar and index exchanged together with another shard's would fit each other.
            is_ours = facts is not None and index.header.get("tar_sha256") == facts.get("sha256")
            if not is_ours or files.size(tar) != index.header["tar_bytes"]:
                raise Corrupt(
                    f"{files.where(tar)}: does not fit its index; restore it or pack again"
                )
        found = [indices[tar].of_split(split) for tar, split in sources]
        self.records = np.concatenate([np.zeros(0, RECORD), *(index.records for index in found)])
        self.tar_of = np.repeat(np.arange(len(found)), [len(index.records) for index in found])
        # Only the indices of tars from other tools hold texts; packed tars have them in json.
        text = np.dtypes.StringDType()
        self._posting_ids, self._titles = (
            np.array([one for index in found for one in index.header.get(name, ())], text)
            for name in TEXTS
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> Item:
        return self.read(position)

    def read(self, position: int, photo: bool = True) -> Item:
        """The item at `position`; raises Unreadable naming file and slot, Failed for the disk."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        # All fields of the record at once: one by one is slow.
        record, tar = self.records[position].item(), self.tar_of.item(position)
        has_texts = len(self._titles) > 0
        wanted = MEMBERS[0 if photo else 1 : 1 if has_texts else 2]
        found = self._members(tar, record, [m for m in wanted if record[FIELDS[m] + 1] != ABSENT])
        if has_texts:
            posting_id, title = self._posting_ids[position], self._titles[position]
        else:
            # The form of json is checked, since a matching crc proves nothing of it.
            try:
                about = json.loads(found.get("json", b"{}").decode())
                posting_id, title = about["posting_id"], about["title"]
            except (ValueError, TypeError, LookupError, RecursionError):
                posting_id = title = None
            if not isinstance(posting_id, str) or not isinstance(title, str):
                raise Unreadable(
                    f"{self._where(tar, record)}, member json: holds no posting_id and title as "
                    "text; pack again or restore it"
                )
        return Item(posting_id, found.get("jpg"), title, record[1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        self._close()

    def _where(self, tar: int, record: tuple) -> str:
        return f"{self.files.where(self.tars[tar])}: slot {record[0]}"

    def _members(
        self, tar: int, record: tuple, names: list[str], is_renewed: bool = False
    ) -> dict[str, bytes]:
        """The members `names` of the item of `record`; a damaged copy is renewed once."""
        file, found = self._file(tar), {}
        for name in names:
            # One call for all of them would cost more: their bytes would have to be copied apart.
            field = FIELDS[name]
            try:
                found[name] = os.pread(file, record[field + 1], record[field])
            except OSError as error:
                raise Failed(
                    f"{self._where(tar, record)}, member {name}: cannot be read "
                    f"({error.strerror}); look at its disk"
                ) from None
            if crc32(found[name]) != record[field + 2]:
                if isinstance(self.files, Mirror) and not is_renewed:
                    self.files.cache.discard_if_damaged(self.files.content(self.tars[tar]))
                    self._close()
                    return self._members(tar, record, names, is_renewed=True)
                raise Unreadable(
                    f"{self._where(tar, record)}, member {name}: bytes differ from its crc"
                )
        return found

    def _file(self, tar: int) -> int:
        """The descriptor of a tar, opened when it is first needed."""
        if tar not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            try:
                file = self.files.open(self.tars[tar])
            except CacheFull:  # perhaps because of the copies that this reader holds open
                self._close()
                file = self.files.open(self.tars[tar])
            with file:
                self._open[tar] = os.dup(file.fileno())
        return self._open[tar]

    def _close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
