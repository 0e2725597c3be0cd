"""One tar of a shard set: plain USTAR under WebDataset's naming, written once and read back."""

import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from shards.storage.errors import Corrupt
from shards.storage.files import atomic_path, sha256_file
from shards.tar.index import ABSENT, MEMBERS, RECORD, write_index

TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
Sample = tuple[int, int, dict[str, bytes]]
"""(slot, class_id, members by suffix) of an item."""


def write_shard(tar: Path, samples: Iterable[Sample], before_mark: Callable[[], None]) -> None:
    """Write `tar`, read it back, then write its index, which marks it as complete.

    `before_mark` writes what must exist wherever the index does. Raises Corrupt when a member
    read back differs.
    """
    rows = []
    with atomic_path(tar) as temporary:
        with temporary.open("wb") as file:
            for slot, class_id, members in samples:
                record = {f"{name}_size": ABSENT for name in MEMBERS}
                record |= {"slot": slot, "class_id": class_id}
                for name in MEMBERS:
                    if name in members:
                        data = members[name]
                        # WebDataset's sample key: ASCII, without a dot, unique in its split.
                        key = f"{int(tar.stem):06d}_{slot:06d}"
                        file.write(_header(f"{key}.{name}", len(data)))
                        record[f"{name}_at"], record[f"{name}_size"] = file.tell(), len(data)
                        record[f"{name}_crc"] = crc32(data)
                        file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
                rows.append(tuple(record.get(name, 0) for name in RECORD.names or ()))
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
        records = np.array(rows, RECORD)
        check_members(temporary, records)
        header = {"tar_bytes": temporary.stat().st_size, "tar_sha256": sha256_file(temporary)}
    before_mark()
    write_index(tar.with_suffix(".idx"), header, records)


def _header(name: str, size: int) -> bytes:
    """The USTAR header of a member, without time and owner: tarfile's, but several times faster."""
    head = name.encode().ljust(100, b"\0") + TEMPLATE[100:124] + b"%011o" % size + TEMPLATE[135:148]
    tail = TEMPLATE[156:]
    # The checksum counts itself as eight blanks (POSIX.1, ustar).
    return head + b"%06o\0 " % (sum(head) + sum(tail) + 8 * ord(" ")) + tail


def check_members(tar: Path, records: np.ndarray) -> None:
    """Raise Corrupt, naming file and member, when the bytes of a member differ from its crc."""
    with tar.open("rb") as file:
        for record in records:
            for name in MEMBERS:
                if (size := int(record[f"{name}_size"])) == ABSENT:
                    continue
                file.seek(int(record[f"{name}_at"]))
                data = file.read(size)
                if len(data) != size or crc32(data) != int(record[f"{name}_crc"]):
                    raise Corrupt(
                        f"{tar}: slot {record['slot']}, member {name}: bytes differ from its crc"
                    )
