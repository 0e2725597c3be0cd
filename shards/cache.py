"""Copies of remote files on this node, named by their sha256: two files never share a name.

One process downloads a file, under a lock, and the others wait for it; a killed one frees the lock
and leaves what it has for the next. A copy gets its name only when its size and sha256 are right.
An open copy has a shared lock, and what has one is never removed to make room.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from shards.errors import BadInput, CacheFull, Corrupt
from shards.files import sync

FOLDER, LIMIT = "DIST_TRAIN_CACHE", "DIST_TRAIN_CACHE_BYTES"
WRONG = 3
"""Downloads of other content than promised before a file is refused."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Content:
    """A file to have: its address for messages, what it must be, and its bytes from one on."""

    where: str
    sha256: str
    bytes: int
    fetch: Callable[[int], Iterable[bytes]]


@dataclass(frozen=True)
class Cache:
    """A folder of copies; at most `limit` bytes of them where one is given."""

    folder: Path
    limit: int | None = None

    def open(self, content: Content) -> BinaryIO:
        """The copy, downloaded if need be, open for reading and kept while it is open.

        Raises Corrupt when the content is another than promised, CacheFull when there is no room,
        and what `content.fetch` raises.
        """
        path = self.path(content.sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while (file := _open_whole(path, content.bytes)) is None:
                self._have(content, path)
        except OSError as error:
            raise BadInput(f"{self.folder}: cannot be written ({error.strerror}); "
                           f"name a folder on this node in {FOLDER}") from None  # fmt: skip
        return file

    def path(self, sha256: str) -> Path:
        """Where a copy lies."""
        return self.folder / "shards" / sha256[:2] / sha256

    def discard_if_damaged(self, content: Content) -> None:
        """Remove a copy whose bytes rotted on this disk; the next `open` downloads it again."""
        path = self.path(content.sha256)
        try:
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == content.sha256
        except OSError:  # none here, or `open` will say why not
            return
        if not whole:
            path.unlink(missing_ok=True)

    def _have(self, content: Content, path: Path) -> None:
        # A lock file of its own: who waits here must not wait for those that read the copy.
        with _open_locked(path.with_name(f"{path.name}.lock"), fcntl.LOCK_EX) as lock:
            try:
                if not path.exists():  # no other process was faster
                    part = path.with_name(f"{path.name}.part")
                    with _open_locked(part, fcntl.LOCK_SH) as file:
                        self._download(content, file, path)
            finally:
                os.unlink(lock.name)

    def _download(self, content: Content, part: FileIO, path: Path) -> None:
        for _ in range(WRONG):
            self._fill(content, part)
            part.seek(0)
            found = hashlib.file_digest(part, "sha256").hexdigest()
            if found == content.sha256:
                os.fsync(part.fileno())
                os.replace(part.name, path)
                sync(path.parent)
                return
            part.truncate(0)
        os.unlink(part.name)
        raise Corrupt(f"{content.where}: sha256 {found}, its manifest says {content.sha256}; "
                      f"downloaded {WRONG} times; restore the file there")  # fmt: skip

    def _fill(self, content: Content, part: FileIO) -> None:
        if (start := part.seek(0, os.SEEK_END)) > content.bytes:
            start = part.truncate(0)
            part.seek(0)
        self._make_room(content, content.bytes - start)
        for piece in content.fetch(start):
            rest = memoryview(piece)
            while rest:
                rest = rest[self._write(part, rest, content) :]

    def _write(self, part: FileIO, data: memoryview, content: Content) -> int:
        try:
            return part.write(data)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if not self._evict(len(data)):
                raise CacheFull(f"{content.where}: {self.folder} has no room for its "
                                f"{content.bytes} bytes ({error.strerror}); free some there or "
                                f"name another disk in {FOLDER}") from None  # fmt: skip
            return 0

    def _make_room(self, content: Content, need: int) -> None:
        if self.limit is None:
            return
        over = sum(size for _, size, _ in self._copies()) + need - self.limit
        if over > 0 and self._evict(over) < over:
            raise CacheFull(
                f"{content.where}: {self.folder} is {LIMIT}={self.limit} bytes at most, and to "
                f"hold {content.bytes} more there is nothing to remove that no process reads; "
                f"raise {LIMIT}"
            )

    def _evict(self, need: int) -> int:
        """Remove copies, those not used for longest first, for `need` bytes; the bytes freed."""
        freed = 0
        for _, size, path in sorted(self._copies()):
            if freed >= need:
                break
            freed += size if _removed_unless_open(path) else 0
        return freed

    def _copies(self) -> Iterator[tuple[int, int, Path]]:
        """(last use, bytes, path) of every copy, finished or not."""
        for path in (self.folder / "shards").glob("??/*"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            yield found.st_mtime_ns, found.st_size, path


def cache_here() -> Cache:
    """The cache of this node: its folder and limit as the environment says."""
    folder, limit = os.environ.get(FOLDER), os.environ.get(LIMIT)
    if limit and not limit.isdecimal():
        raise BadInput(f"{LIMIT}={limit}: write a number of bytes")
    where = Path(folder) if folder else Path.home() / ".cache" / "dist_train"
    return Cache(where.absolute(), int(limit) if limit else None)


def _open_whole(path: Path, size: int) -> BinaryIO | None:
    """The copy at `path` under a shared lock; None where there is none, or a cut one."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    found = os.fstat(file.fileno())
    if found.st_nlink and found.st_size == size:
        os.utime(file.fileno())
        return file
    if found.st_nlink:
        path.unlink(missing_ok=True)
    file.close()
    return None


def _open_locked(path: Path, kind: int) -> FileIO:
    """`path`, made if need be, open under a lock, and still what lies there when that is had."""
    while True:
        file = open(path, "r+b", buffering=0, opener=_made)  # noqa: SIM115
        fcntl.flock(file, kind)
        if _lies_at(file.fileno(), path):
            return file
        file.close()


def _made(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _removed_unless_open(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
