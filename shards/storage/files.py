"""Files that are complete or absent: temporary name, fsync, rename. JSON, Parquet and sha256."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.storage.errors import BadInput, Corrupt

MINUTE, DAY = 60.0, 86_400.0

AGAIN = "restore it, or remove its folder and run the command again that made it"
"""What to do about a damaged file of a finished stage directory."""


def temporary_name(path: Path) -> Path:
    """The name beside `path` that this process writes under; it holds the host and process id."""
    return path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; renamed to it only when the block ends normally."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def names_in(folder: Path) -> set[str]:
    """Names in a folder, without those that `temporary_name` gives."""
    return {path.name for path in folder.iterdir() if not path.match(".*.tmp-*")}


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files below `folder` whose writers have ended.

    Of a writer on another host that is not known: its files are removed a day after they were last
    written to. Call it where this process has none open below the folder.
    """
    for path in folder.rglob(".*.tmp-*"):
        host, _, pid = path.name.rpartition(".tmp-")[2].rpartition("-")
        with suppress(OSError):  # another process has removed it, or nothing can be written here
            written = path.stat().st_mtime
            if host == os.uname().nodename and pid.isdigit():
                ended = not _may_write(int(pid), written)
            else:
                ended = bool(host) and pid.isdigit() and time.time() - written > DAY
            if ended:
                path.unlink()


def _may_write(pid: int, written: float) -> bool:
    """Whether the process `pid` of this host may be writing a file last written to at `written`."""
    # This process has none open here. Process 1 wrote in a container that is gone: else it is
    # init, which writes none.
    if pid in (1, os.getpid()):
        return False
    try:
        with suppress(PermissionError):  # it runs, for another user
            os.kill(pid, 0)
        # Field 22 of proc(5): when it started, in clock ticks since the machine did.
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except ProcessLookupError:
        return False
    except OSError:
        return True
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    started += ticks / os.sysconf("SC_CLK_TCK")
    # Else it has been given the number of the writer. The clock of a file server may differ.
    return started < written + MINUTE


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees the old file or the new one, never a partial one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises BadInput when it cannot be read, Corrupt when it is not JSON."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(data: bytes, where: str) -> Any:
    """The value of JSON bytes. Raises Corrupt, which names the file `where`, if they are none."""
    try:
        return json.loads(data.decode())
    except ValueError as error:
        raise Corrupt(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise Corrupt(f"{where}: not JSON of ours (nested too deeply)") from None


def write_parquet(path: Path, table: Any) -> None:
    """Write a pandas table as Parquet without its row index, atomically."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


@contextmanager
def corrupt_error(path: Path) -> Iterator[Path]:
    """Raise Corrupt, which names `path`, for a table or array that a library cannot read there."""
    try:
        yield path
    # The readers of Parquet and NumPy raise all of these, MemoryError for what a header claims.
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Corrupt(f"{path}: cannot be read ({reason}); {AGAIN}") from None


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def format_bytes(size: float) -> str:
    """A number of bytes for people: 1 MB is 10^6 bytes, 1 GB is 10^9."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def sync(path: Path) -> None:
    """Write a file's data, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # read-only: nothing waits for the disk
            raise
    finally:
        os.close(descriptor)
