"""Copies of remote files on this node, named by their sha256: two files never share a name.

One process downloads a file, under a lock, and the others wait for it; a killed one frees the lock
and leaves what it has for the next. A copy gets its name only when its size and sha256 are right.
An open copy has a shared lock, and a locked copy is never removed to make space.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from shards.storage.errors import BadInput, CacheFull, Corrupt
from shards.storage.files import sha256_file, sync
from shards.storage.lock import open_locked

FOLDER, LIMIT = "DIST_TRAIN_CACHE", "DIST_TRAIN_CACHE_BYTES"
DOWNLOADS = 3
"""Downloads with a wrong sha256 before a file is refused."""


@dataclass(frozen=True)
class Content:
    """A file to copy; `where` is for messages, `fetch(start)` yields its bytes from `start` on."""

    where: str
    sha256: str
    bytes: int
    fetch: Callable[[int], Iterable[bytes]]


class Cache:
    """This node's folder of copies, of at most `limit` bytes if it is not None."""

    def __init__(self) -> None:
        """Take folder and limit from the environment; BadInput if malformed."""
        folder, limit = os.environ.get(FOLDER), os.environ.get(LIMIT)
        if limit and not limit.isdecimal():
            raise BadInput(f"{LIMIT}={limit}: write a number of bytes")
        where = Path(folder) if folder else Path.home() / ".cache" / "dist_train"
        self.folder, self.limit = where.absolute(), int(limit) if limit else None

    def open(self, content: Content) -> BinaryIO:
        """Open the copy for reading, downloading it if need be; it stays while it is open.

        Raises Corrupt when the content differs from its sha256, CacheFull when there is no space,
        BadInput when the folder cannot be written, and what `content.fetch` raises.
        """
        path = self._path(content)
        try:
            while True:
                with suppress(FileNotFoundError):
                    file = path.open("rb")
                    fcntl.flock(file, fcntl.LOCK_SH)
                    found = os.fstat(file.fileno())
                    if found.st_nlink and found.st_size == content.bytes:
                        os.utime(file.fileno())  # the time of the last use
                        return file
                    file.close()
                    if found.st_nlink:
                        path.unlink()
                # A separate lock file: waiting here must not be for readers of the copy.
                with open_locked(path.with_name(f"{path.name}.lock"), fcntl.LOCK_EX) as lock:
                    try:
                        if not path.exists():  # no other process was faster
                            self._download(content, path)
                    finally:
                        os.unlink(lock.name)
        except OSError as error:
            raise BadInput(
                f"{self.folder}: cannot be written ({error.strerror}); "
                f"name a folder on this node in {FOLDER}"
            ) from None

    def discard_if_damaged(self, content: Content) -> None:
        """Remove a copy that was damaged on this disk; the next `open` downloads it again."""
        path = self._path(content)
        try:
            found = sha256_file(path)
        except OSError:  # there is no copy, or `open` will raise the reason
            return
        if found != content.sha256:
            path.unlink(missing_ok=True)

    def _path(self, content: Content) -> Path:
        return self.folder / "shards" / content.sha256[:2] / content.sha256

    def _download(self, content: Content, path: Path) -> None:
        """Complete the partial file beside `path`, check its sha256 and rename it to `path`."""
        with open_locked(path.with_name(f"{path.name}.part"), fcntl.LOCK_SH) as part:
            for _ in range(DOWNLOADS):
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
        raise Corrupt(
            f"{content.where}: sha256 {found}, in its manifest {content.sha256}; "
            f"downloaded {DOWNLOADS} times; restore the file there"
        )

    def _fill(self, content: Content, part: FileIO) -> None:
        """Download what `part` lacks, removing other copies where space is short."""
        if (start := part.seek(0, os.SEEK_END)) > content.bytes:
            start = part.truncate(0)
            part.seek(0)
        if self.limit is not None:
            used = sum(size for _, size, _ in self._copies())
            over = used + content.bytes - start - self.limit
            if over > 0 and self._evict(over) < over:
                raise CacheFull(
                    f"{content.where}: {self.folder} is {LIMIT}={self.limit} bytes at most, and to "
                    f"hold {content.bytes} more there is nothing to remove that no process reads; "
                    f"raise {LIMIT}"
                )
        for piece in content.fetch(start):
            rest = memoryview(piece)
            while rest:
                try:
                    rest = rest[part.write(rest) :]
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    if not self._evict(len(rest)):
                        raise CacheFull(
                            f"{content.where}: {self.folder} has no room for its {content.bytes} "
                            f"bytes ({error.strerror}); free some there or name another disk in "
                            f"{FOLDER}"
                        ) from None

    def _evict(self, need: int) -> int:
        """Free `need` bytes: copies nobody reads go, least recently used first; the bytes freed."""
        freed = 0
        for _, size, path in sorted(self._copies()):
            if freed >= need:
                break
            with suppress(FileNotFoundError, BlockingIOError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                freed += size
        return freed

    def _copies(self) -> Iterator[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of every copy, complete or partial."""
        for path in (self.folder / "shards").glob("??/*"):
            with suppress(FileNotFoundError):  # another process made space
                found = path.stat()
                yield found.st_mtime_ns, found.st_size, path
