"""The location of a stage directory that is read: a folder, or any URL that fsspec opens."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from shards.read.cache import Cache, Content
from shards.read.remote import Remote, is_url
from shards.storage import stage_files
from shards.storage.errors import Corrupt, Unreachable
from shards.storage.files import AGAIN, read_json, sha256_file
from shards.tar.index import misfit
from shards.tar.layout import index_of, is_tar

Location = str | Path
HASHED_AT_ONCE = 4
"""Files whose sha256 a process computes at a time: a thread reads about a gigabyte a second."""
_compared: dict[str, tuple[object, ...]] = {}
"""Files found as their manifest lists them, by path: their sha256, and what `stat` said of them."""


def open_files(location: Location, kind: str) -> "Folder | Mirror":
    """The finished stage directory of `kind` at a path or URL; raises BadInput, or Unreachable."""
    if not isinstance(location, str) or not is_url(location):
        return Folder(Path(location), kind)
    if location.startswith("file://"):
        return Folder(Path(unquote(urlsplit(location).path)), kind)
    return Mirror(location, kind)


class Folder:
    """A finished stage directory on disk.

    What is read of it goes through here: a file is compared with the manifest's sha256 when this
    process first uses it, and again only if it was written since. Of tars, which are read by
    member, readers check the crc of every member instead.
    """

    def __init__(self, path: Path, kind: str) -> None:
        """Raises as `stage_files.open_finished` does."""
        self.path = path
        self.stage, self.manifest = stage_files.read_folder(path, kind)

    def where(self, name: str = "") -> str:
        """The path of a file below the folder, or the folder's, for messages."""
        return str(self.path / name)

    def size(self, name: str) -> int:
        """Bytes of a file; raises Corrupt when it is missing."""
        return self._stat(name).st_size

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading, a tar as it is; raises Corrupt as `compare` does."""
        if is_tar(name):
            self._stat(name)
            return (self.path / name).open("rb")
        return self.file(name).open("rb")

    def names(self, pattern: str) -> list[str]:
        """The listed files that match a pattern such as pairs/*.parquet, in order."""
        return sorted(name for name in self.manifest["files"] if fnmatchcase(name, pattern))

    def file(self, name: str) -> Path:
        """The path of a listed file, compared; raises Corrupt as `compare` does."""
        self.compare([name])
        return self.path / name

    def json(self, name: str) -> Any:
        """The content of a listed JSON file, compared; raises Corrupt as `compare` does."""
        return read_json(self.file(name))

    def compare(self, names: Iterable[str]) -> None:
        """Compare files with the manifest, those that this process has not compared yet.

        Raises Corrupt naming the first that is missing, not listed, or not as it was written.
        """
        todo = [name for name in names if _compared.get(str(self.path / name)) != self._facts(name)]
        if len(todo) < 2:
            for name in todo:
                self._compare(name)
            return
        with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
            for _ in threads.map(self._compare, todo):
                pass

    def trust(self, names: Iterable[str]) -> None:
        """Count files as compared: another process of the same work has just done so."""
        _compared.update((str(self.path / name), self._facts(name)) for name in names)

    def _compare(self, name: str) -> None:
        facts, path = self._facts(name), self.path / name
        try:
            found = sha256_file(path)
        except OSError as error:
            raise Corrupt(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None
        if found != self.manifest["files"][name]["sha256"]:
            raise Corrupt(f"{path}: differs from the sha256 in {stage_files.MANIFEST}; {AGAIN}")
        _compared[str(path)] = facts

    def _facts(self, name: str) -> tuple[object, ...]:
        if name not in self.manifest["files"]:
            raise Corrupt(f"{self.where(name)}: not listed in {stage_files.MANIFEST}; {AGAIN}")
        found = self._stat(name)
        times = found.st_mtime_ns, found.st_ctime_ns
        return self.manifest["files"][name]["sha256"], found.st_ino, found.st_size, *times

    def _stat(self, name: str) -> os.stat_result:
        try:
            return (self.path / name).stat()
        except OSError as error:
            what = "missing" if isinstance(error, FileNotFoundError) else error.strerror
            raise Corrupt(f"{self.where(name)}: {what}; {AGAIN}") from None


class Mirror(Remote):
    """A finished stage directory at a URL; each file is copied to this node at its first use."""

    def __init__(self, url: str, kind: str) -> None:
        """Raises BadInput, Corrupt or Unreachable, naming the URL."""
        super().__init__(url)
        self.cache = Cache()
        self.manifest = stage_files.read_finished(kind, self.where, self.read)[1]

    def size(self, name: str) -> int:
        """Bytes of a file by the manifest."""
        return self.content(name).bytes

    def open(self, name: str) -> BinaryIO:
        """Open this node's copy of a file, its sha256 compared; raises as `Cache.open` does."""
        if not is_tar(name):  # every read of a tar checks a crc
            self.cache.discard_if_damaged(self.content(name))
        return self.cache.open(self.content(name))

    def content(self, name: str) -> Content:
        """A file as the cache takes it; raises Corrupt when the manifest does not list it."""
        facts = self.manifest["files"].get(name)
        if facts is None:
            raise Corrupt(
                f"{self.where(name)}: not in {stage_files.MANIFEST}; copy the set there again"
            )
        fetch = partial(self.pieces, name, size=facts["bytes"])
        return Content(self.where(name), facts["sha256"], facts["bytes"], fetch)

    def faults(self) -> list[str]:
        """Every listed file that differs at the URL (HTTP lists no others); no copy is kept."""
        found, name, where = [], stage_files.STATUS, self.where(stage_files.STATUS)
        try:
            status = stage_files.parsed(self.read(name) or b'{"status": ""}', name, where)["status"]
            if status != "done":
                found.append(f"{where}: is {status!r} although the stage is finished")
        except Corrupt as fault:
            found.append(str(fault))
        return found + [fault for name in self.manifest["files"] if (fault := self._fault(name))]

    def _fault(self, name: str) -> str:
        content, found = self.content(name), hashlib.sha256()
        try:
            size = self.size_there(name)
            if size not in (None, content.bytes):
                return f"{content.where}: {size} bytes, packed with {content.bytes}"
            for piece in content.fetch(0):
                found.update(piece)
        except (Corrupt, Unreachable) as fault:
            return str(fault)
        if found.hexdigest() != content.sha256:
            return f"{content.where}: content differs from what was packed"
        if not is_tar(name):
            return ""
        if (listed := self.manifest["files"].get(index_of(name))) is None:
            return ""
        with suppress(Corrupt):  # an index that is too long is another fault
            index = self.read(index_of(name), listed["bytes"]) or b""
            return misfit(content.where, name, index, self.manifest["files"])
        return ""
