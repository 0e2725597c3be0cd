"""The location of a stage directory that is read: a folder, or any URL that fsspec opens."""

import hashlib
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from shards.read.cache import Cache, Content
from shards.read.remote import Remote, is_url
from shards.storage import stage_files
from shards.storage.errors import Corrupt, Unreachable
from shards.tar.index import misfit
from shards.tar.layout import index_of, is_tar

Location = str | Path


def open_files(location: Location, kind: str) -> "Folder | Mirror":
    """The finished stage directory of `kind` at a path or URL; raises BadInput, or Unreachable."""
    if not isinstance(location, str) or not is_url(location):
        return Folder(Path(location), kind)
    if location.startswith("file://"):
        return Folder(Path(unquote(urlsplit(location).path)), kind)
    return Mirror(location, kind)


class Folder:
    """A finished stage directory on disk."""

    def __init__(self, path: Path, kind: str) -> None:
        """Raises as `stage_files.open_finished` does."""
        self.path = path
        self.manifest = stage_files.open_finished(path, kind)

    def where(self, name: str = "") -> str:
        """The path of a file below the folder, or the folder's, for messages."""
        return str(self.path / name)

    def size(self, name: str) -> int:
        """Bytes of a file; raises Corrupt when it is missing."""
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; raises Corrupt when it is missing or not below the folder."""
        if not stage_files.lies_below(name):
            raise Corrupt(f"{self.path}: names {name}, which does not lie below it; restore it")
        try:
            return (self.path / name).open("rb")
        except FileNotFoundError:
            raise Corrupt(f"{self.where(name)}: missing; restore it or pack again") from None


class Mirror(Remote):
    """A finished stage directory at a URL; each file is copied to this node at its first use."""

    def __init__(self, url: str, kind: str) -> None:
        """Raises BadInput, Corrupt or Unreachable, naming the URL."""
        super().__init__(url)
        self.cache = Cache()
        stage, self.manifest = stage_files.read_finished(kind, self.where, self.read)
        where, files = self.where(stage_files.MANIFEST), self.manifest["files"]
        if stage_files.fingerprint_of(stage, files) != self.manifest["fingerprint"]:
            raise Corrupt(f"{where}: does not fit its fingerprint; copy the set there again")
        for name, facts in files.items():
            # Name and sha256 become parts of paths.
            match facts:
                case {"bytes": int(size), "sha256": str(sha256)}:
                    is_valid = size >= 0 and re.fullmatch(r"[0-9a-f]{64}", sha256)
                case _:
                    is_valid = False
            if not is_valid:
                raise Corrupt(
                    f"{where}: file {name!r} has no path below it, size and sha256; "
                    "copy the set there again"
                )
        stage_files.check_manifest(self.manifest, where)

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
        found, where = [], self.where(stage_files.STAGE)
        stage = self.read(stage_files.STAGE) or b""
        if hashlib.sha256(stage).hexdigest() != self.manifest["stage_sha256"]:
            found.append(f"{where}: content differs from what was written; restore it")
        name, where = stage_files.STATUS, self.where(stage_files.STATUS)
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
