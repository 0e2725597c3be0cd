"""The .idx beside each tar: position, size and crc of every member, and the class of every item.

Layout, little-endian: magic (8 bytes), length of the header (u32), header (JSON), one
record an item, crc32 (u32) of everything before it. Beside a tar from another tool the header also
holds `splits` (items of each, in the order of the records), `posting_ids` and `titles`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from shards.catalogue.split import SPLITS
from shards.storage.errors import Corrupt
from shards.storage.files import write_atomic
from shards.storage.stage_files import FileFacts
from shards.tar.layout import index_of

MAGIC = b"DTSHARD1"
MEMBERS = ("jpg", "json", "txt", "cls")
TEXTS = ("posting_ids", "titles")
"""Texts of the items that the header of an indexed tar holds."""
ABSENT = 0xFFFFFFFF
"""The size of a member that an item lacks."""
PLACE = {"at": "<u8", "size": "<u4", "crc": "<u4"}
RECORD = np.dtype(
    [("slot", "<u4"), ("class_id", "<i4")]
    + [(f"{member}_{name}", kind) for member in MEMBERS for name, kind in PLACE.items()]
)


@dataclass(frozen=True)
class ShardIndex:
    """The index of one tar: its header (counts, tar size and sha256) and records (n,) of RECORD."""

    header: dict[str, Any]
    records: np.ndarray

    def of_split(self, split: str) -> "ShardIndex":
        """The index of the items of one split; a packed tar has items of one split only."""
        splits: dict[str, int] | None = self.header.get("splits")
        if splits is None:
            return self
        names = list(splits)
        first = sum(splits[name] for name in names[: names.index(split)])
        rows = slice(first, first + splits[split])
        texts = {name: self.header[name][rows] for name in TEXTS}
        return ShardIndex(self.header | texts, self.records[rows])


def write_index(path: Path, header: dict[str, Any], records: np.ndarray) -> None:
    """Write an index; its presence marks the tar beside it as complete."""
    head = json.dumps(header | {"members": MEMBERS, "items": len(records)}).encode()
    body = MAGIC + len(head).to_bytes(4, "little") + head + records.astype(RECORD).tobytes()
    write_atomic(path, body + crc32(body).to_bytes(4, "little"))


def read_index(path: Path) -> ShardIndex:
    """Read and check an index; raises Corrupt naming the file."""
    try:
        return parse_index(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise Corrupt(f"{path}: missing; pack again or restore it") from None


def parse_index(data: bytes, path: str) -> ShardIndex:
    """Check the bytes of the index at `path`; raises Corrupt naming it."""
    if len(data) < 16 or data[:8] != MAGIC:
        raise Corrupt(f"{path}: not a shard index of this version")
    if crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise Corrupt(f"{path}: checksum differs; the index is damaged")
    end = 12 + int.from_bytes(data[8:12], "little")
    try:
        header = json.loads(data[12:end])
        records = np.frombuffer(data[end:-4], RECORD)
        if header["members"] != [*MEMBERS]:
            raise ValueError(f"members {header['members']}")
        counts = [len(records), *(len(header[name]) for name in TEXTS if name in header)]
        if "splits" in header:
            counts += [sum(header["splits"][split] for split in SPLITS), len(header["titles"])]
        if set(counts) != {header["items"]}:
            raise Corrupt(f"{path}: its sections hold {counts} items; create it again")
        # A crc proves nothing of a forged index: every member must lie inside the tar.
        for name in MEMBERS:
            present = records[records[f"{name}_size"] != ABSENT]
            at, size = present[f"{name}_at"], present[f"{name}_size"]
            if (at > header["tar_bytes"]).any() or (at + size > header["tar_bytes"]).any():
                raise Corrupt(f"{path}: a member {name} that lies outside the tar; create it again")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Corrupt(f"{path}: not a shard index of this version ({error})") from None
    return ShardIndex(header, records)


def misfit(where: str, tar: str, index: bytes, files: Mapping[str, FileFacts]) -> str:
    """The fault when `tar`, intact by the manifest's `files`, has the intact `index` of another."""
    listed = files.get(index_of(tar))
    if listed is None or hashlib.sha256(index).hexdigest() != listed["sha256"]:
        return ""
    try:
        if parse_index(index, where).header.get("tar_sha256") == files[tar]["sha256"]:
            return ""
    except Corrupt as fault:
        return str(fault)
    return f"{where}: had changed before the set was sealed (its index differs); pack again"
