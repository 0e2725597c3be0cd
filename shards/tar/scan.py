"""The members of a tar from any tool, by a strict scan of its headers.

Python's tarfile takes a header it cannot read for the end of the archive and reports nothing. Here
every block is accounted for: the checksum of each header, each member inside the file, two zero
blocks at the end and only zeros behind them. Understood are USTAR and PAX (POSIX.1-2001,
path and size), GNU long names and base-256 sizes; all else is refused by name and offset.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from shards.storage.errors import Corrupt

BLOCK = 512
MAX_EXTENSION, MAX_NAME = 2**20, 4096
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REFUSED = {
    b"1": "a hard link; make the tar with --hard-dereference",
    b"2": "a symbolic link; make the tar with --dereference",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"K": "a link with a long name; make the tar with --dereference",
    b"M": "a part of a member in another volume",
    b"S": "a sparse file",
    b"V": "a volume label",
}
PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=\n]+)=")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, and the offsets of its header and data, in bytes."""

    name: str
    header_at: int
    at: int
    size: int


def members(tar: Path) -> Iterator[Member]:
    """Every regular file of `tar` in order; folders are skipped.

    Raises Corrupt naming the tar, the byte and the remedy for whatever is damaged, cut,
    compressed, a link, a device or sparse, and for names that lead out of a folder.
    """
    with tar.open("rb") as file:
        at = 0
        try:
            start = file.read(8)
            if not start:
                raise ValueError("an empty file; restore it")
            for magic, program in COMPRESSED.items():
                if start.startswith(magic):
                    raise ValueError(
                        f"compressed with {program}; decompress it first, photos gain nothing"
                    )
            length = os.fstat(file.fileno()).st_size
            extended: dict[str, bytes] = {}  # what extended headers set of the next member
            while (block := _read(file, at, BLOCK)) != bytes(BLOCK):
                kind, raw, size = _parse(block)
                if kind in b"xgL":
                    extended = _extended(kind, size, extended, file, at + BLOCK)
                    at += BLOCK + _padded(size)
                    continue
                name, size = _checked(kind, raw, size, extended)
                if at + BLOCK + _padded(size) > length:
                    raise ValueError(
                        f"{name!r} declares {size} bytes, more than is there: cut; restore it"
                    )
                # Before POSIX a folder was a file whose name ends in a slash.
                is_folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
                if is_folder and size:
                    raise ValueError(f"the folder {name!r} declares {size} bytes")
                if not is_folder:
                    yield Member(name, at, at + BLOCK, size)
                extended = {}
                at += BLOCK + _padded(size)
            if extended:
                raise ValueError("the archive ends behind an extended header, without its member")
            _check_end(file, at)
        except ValueError as error:
            raise Corrupt(f"{tar}: byte {at}: {error}") from None


def _read(file: BufferedReader, at: int, size: int) -> bytes:
    file.seek(at)
    data = file.read(size)
    if data and len(data) == size:
        return data
    if data:
        raise ValueError("cut inside a block or a member; restore it")
    raise ValueError(
        "ends without the two zero blocks of a complete tar, so it may be cut; restore it "
        "(if it is known to be complete: truncate --size=+1024 FILE)"
    )


def _check_end(file: BufferedReader, at: int) -> None:
    """Raise ValueError unless two zero blocks lie at byte `at` and only zero blocks follow."""
    _read(file, at, 2 * BLOCK)
    file.seek(at)
    while chunk := file.read(2**20):
        if rest := chunk.lstrip(b"\0"):
            behind = file.tell() - len(rest)
            raise ValueError(
                f"a zero block, where archives end, but byte {behind} holds data: a zeroed "
                "header or joined tars; restore it, or join tars with tar --concatenate"
            )
    if file.tell() % BLOCK:
        raise ValueError("cut inside the zeros at the end; restore it")


def _parse(block: bytes) -> tuple[bytes, bytes, int]:
    """Kind, name and size in a header."""
    others = block[:148] + b" " * 8 + block[156:]
    excess = _number(block[148:156]) - sum(others)
    # Some old programs summed signed characters.
    if excess and excess != -256 * sum(byte > 127 for byte in others):
        raise ValueError("no tar header, or a damaged one (its checksum differs); restore the tar")
    name = _until_nul(block[:100])
    # GNU's older format has other fields where POSIX has the first part of a long name.
    if block[257:263] == b"ustar\0" and (prefix := _until_nul(block[345:500])):
        name = prefix + b"/" + name
    return block[156:157], name, _number(block[124:136])


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or GNU's base 256 if the highest bit is set."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError("a negative number in a header; restore the tar")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = _until_nul(field).strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError("no tar header, or a damaged one (no octal number); restore the tar")
    return int(digits or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _extended(
    kind: bytes, size: int, extended: dict[str, bytes], file: BufferedReader, at: int
) -> dict[str, bytes]:
    """`extended` updated by the extended header whose data lies at byte `at`."""
    if size > MAX_EXTENSION:
        raise ValueError(f"an extended header of {size} bytes, over {MAX_EXTENSION}")
    data = _read(file, at, _padded(size))[:size] if size else b""
    if kind == b"L":
        return {"path": _until_nul(data)} | extended
    records, place = {}, 0
    while place < len(data):
        found = PAX_RECORD.match(data, place)
        end = place + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise ValueError("a broken record in an extended header; restore the tar")
        records[found[2].decode(errors="replace")] = data[found.end() : end - 1]
        place = end
    sparse = sorted(key for key in records if key.startswith("GNU.sparse"))
    if sparse:
        raise ValueError(f"a sparse file ({sparse[0]}); make the tar without --sparse")
    if kind == b"x":
        return extended | records
    if {"path", "size", "linkpath"} & records.keys():
        raise ValueError("a global header that gives all members one name or size")
    return extended


def _checked(kind: bytes, raw: bytes, size: int, extended: dict[str, bytes]) -> tuple[str, int]:
    """Name and size of a member by its header and the extended ones before it, checked."""
    raw = extended.get("path", raw)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the name {raw!r} is not UTF-8; make the tar with UTF-8 names") from None
    if not name or "\0" in name or len(raw) > MAX_NAME:
        raise ValueError(f"an empty name or one over {MAX_NAME} bytes: {name[:80]!r}")
    if kind not in b"0\x005":
        what = REFUSED.get(kind, f"of the unknown kind {kind!r}")
        raise ValueError(f"{name!r} is {what}; only files and folders are read")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"the name {name!r} leads out of the tar's folder")
    if "size" in extended:
        if not re.fullmatch(rb"\d{1,20}", extended["size"]):
            raise ValueError(f"a size that is not numeric: {extended['size'][:40]!r}")
        size = int(extended["size"])
    return name, size
