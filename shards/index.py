"""The .idx beside each tar: where every member lies, how long it is, its crc, the class.

Layout, little-endian: magic (8 bytes), length of the header (u32), header (JSON), one
record an item, crc32 (u32) of everything before it.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import Corrupt
from shards.files import write_atomic

MAGIC = b"DTSHARD1"
MEMBERS = ("jpg", "json", "txt", "cls")
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


def write_index(path: Path, header: dict[str, Any], records: np.ndarray) -> None:
    """Write an index; its presence is the mark that the tar beside it is whole."""
    head = json.dumps(header | {"members": MEMBERS, "items": len(records)}).encode()
    body = MAGIC + len(head).to_bytes(4, "little") + head + records.astype(RECORD).tobytes()
    write_atomic(path, body + zlib.crc32(body).to_bytes(4, "little"))


def read_index(path: Path) -> ShardIndex:
    """Read and check an index; raises Corrupt naming the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Corrupt(f"{path}: missing; pack again or restore it") from None
    if len(data) < 16 or data[:8] != MAGIC:
        raise Corrupt(f"{path}: not a shard index of this version")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise Corrupt(f"{path}: checksum differs; the index is damaged")
    end = 12 + int.from_bytes(data[8:12], "little")
    header = json.loads(data[12:end])
    return ShardIndex(header, np.frombuffer(data[end:-4], RECORD))
