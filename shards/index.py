"""The .idx beside each tar: where every member lies, how long it is, its crc, the class.

Layout, little-endian: magic (8 bytes), length of the header (u32), header (JSON), one
record an item, crc32 (u32) of everything before it. Beside a tar that others made the header also
holds `splits` (items of each, as the records lie), `posting_ids` and `titles`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from shards.errors import Corrupt
from shards.files import write_atomic
from shards.layout import index_of
from shards.split import SPLITS

MAGIC = b"DTSHARD1"
MEMBERS = ("jpg", "json", "txt", "cls")
TOLD = ("posting_ids", "titles")
ABSENT = 0xFFFFFFFF
RECORD = np.dtype(
    [("slot", "<u4"), ("class_id", "<i4")]
    + [
        (f"{m}_{f}", t)
        for m in MEMBERS
        for f, t in (("at", "<u8"), ("size", "<u4"), ("crc", "<u4"))
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """The index of one tar: its header (counts, tar size and sha256, plan) and its records."""

    header: dict[str, Any]
    records: np.ndarray

    def fits(self, facts: dict[str, Any]) -> bool:
        """Whether it is the index of the tar that a manifest tells `facts` of."""
        return self.header.get("tar_sha256") == facts.get("sha256")

    def part(self, split: str) -> "ShardIndex":
        """That of one split; in a tar that was packed all items are of one."""
        splits: dict[str, int] | None = self.header.get("splits")
        if splits is None:
            return self
        names = list(splits)
        first = sum(splits[name] for name in names[: names.index(split)])
        rows = slice(first, first + splits[split])
        told = {name: self.header[name][rows] for name in TOLD}
        return ShardIndex(self.header | told, self.records[rows])


def write_index(path: Path, header: dict[str, Any], records: np.ndarray) -> None:
    """Write an index; its presence is the mark that the tar beside it is whole."""
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
        _check(header, records, path)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Corrupt(f"{path}: not a shard index of this version ({error})") from None
    return ShardIndex(header, records)


def misfit(where: str, tar: str, index: bytes, files: dict[str, Any]) -> str:
    """What is wrong when `tar`, whole by the manifest's `files`, is not the one of its `index`.

    Nothing is said beside an index that is not whole: that is another fault.
    """
    listed = files.get(index_of(tar), {}).get("sha256")
    if hashlib.sha256(index).hexdigest() != listed:
        return ""
    try:
        if parse_index(index, where).fits(files[tar]):
            return ""
    except Corrupt as fault:
        return str(fault)
    return f"{where}: had changed before the set was sealed (its index tells another); pack again"


def _check(header: Any, records: np.ndarray, path: str) -> None:
    """A crc proves no good will: what would be read must lie inside the tar."""
    if header["members"] != [*MEMBERS]:
        raise ValueError(f"members {header['members']}")
    counts = [len(records), *(len(header[name]) for name in TOLD if name in header)]
    if "splits" in header:
        counts += [sum(header["splits"][split] for split in SPLITS), len(header["titles"])]
    if set(counts) != {header["items"]}:
        raise Corrupt(f"{path}: its parts hold {counts} items; make it again")
    for name in MEMBERS:
        there = records[records[f"{name}_size"] != ABSENT]
        at, size = there[f"{name}_at"], there[f"{name}_size"]
        if (at > header["tar_bytes"]).any() or (at + size > header["tar_bytes"]).any():
            raise Corrupt(f"{path}: a member {name} that lies outside the tar; make it again")
