"""One tar of a shard set: plain USTAR under WebDataset's naming, written once and read back."""

import io
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from shards.errors import Corrupt
from shards.files import atomic_path, sha256_file
from shards.index import ABSENT, MEMBERS, RECORD, write_index

Sample = tuple[int, int, dict[str, bytes]]


def key_of(shard: int, slot: int) -> str:
    """WebDataset's sample key: ASCII, without a dot, unique in its split."""
    return f"{shard:06d}_{slot:06d}"


def write_shard(tar: Path, samples: Iterable[Sample], before_mark: Callable[[], None]) -> None:
    """Write `tar` from (slot, class_id, members), read it back, then its index as the mark.

    `before_mark` runs between the two: what must exist wherever the index does.
    """
    with atomic_path(tar) as temporary:
        records = _write(temporary, int(tar.stem), samples)
        _read_back(temporary, records)
        header = {"tar_bytes": temporary.stat().st_size, "tar_sha256": sha256_file(temporary)}
    before_mark()
    write_index(tar.with_suffix(".idx"), header, records)


def _write(path: Path, shard: int, samples: Iterable[Sample]) -> np.ndarray:
    rows = []
    # Fixed time, owner and mode (tarfile's defaults): the same plan gives the same bytes.
    with (
        path.open("wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for slot, class_id, members in samples:
            record = np.zeros((), RECORD)
            record["slot"], record["class_id"] = slot, class_id
            for name in MEMBERS:
                record[f"{name}_size"] = ABSENT
                if name in members:
                    _add(tar, f"{key_of(shard, slot)}.{name}", members[name], name, record)
            rows.append(record)
    return np.array(rows, RECORD)


def _add(tar: tarfile.TarFile, name: str, data: bytes, member: str, record: np.ndarray) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    record[f"{member}_at"] = tar.offset + tarfile.BLOCKSIZE
    record[f"{member}_size"] = len(data)
    record[f"{member}_crc"] = zlib.crc32(data)
    tar.addfile(info, io.BytesIO(data))


def _read_back(path: Path, records: np.ndarray) -> None:
    with path.open("rb") as file:
        for record in records:
            for name in MEMBERS:
                check_member(file, record, name, path)


def check_member(file: io.BufferedReader, record: np.ndarray, name: str, path: Path) -> None:
    """Raise Corrupt, naming file and member, when a member's bytes differ from its crc."""
    size = int(record[f"{name}_size"])
    if size == ABSENT:
        return
    file.seek(int(record[f"{name}_at"]))
    data = file.read(size)
    if len(data) != size or zlib.crc32(data) != int(record[f"{name}_crc"]):
        raise Corrupt(f"{path}: slot {record['slot']}, member {name}: bytes differ from its crc")
