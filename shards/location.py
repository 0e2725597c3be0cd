"""Where a stage directory that others made lies: a folder, or any URL that fsspec opens."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from shards import stage_files
from shards.cache import Content, cache_here
from shards.errors import Corrupt, Unreachable
from shards.index import misfit
from shards.layout import index_of, is_tar
from shards.remote import Remote, is_url

Location = str | Path


def open_files(location: Location, kind: str) -> "Folder | Mirror":
    """The files of the finished stage directory of `kind` at a path or URL.

    Raises BadInput for anything else, Unreachable when a URL does not answer.
    """
    if isinstance(location, str) and location.startswith("file://"):
        return Folder(Path(unquote(urlsplit(location).path)), kind)
    if isinstance(location, str) and is_url(location):
        return Mirror(location, kind)
    return Folder(Path(location), kind)


class Folder:
    """A finished stage directory on disk."""

    def __init__(self, path: Path, kind: str) -> None:
        """Open it; raises BadInput when it is not one."""
        self.path = path
        self.manifest = stage_files.open_finished(path, kind)

    def __str__(self) -> str:
        return str(self.path)

    def where(self, name: str) -> str:
        """What messages call a file."""
        return str(self.path / name)

    def size(self, name: str) -> int:
        """Bytes of a file; raises Corrupt when it is missing."""
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            raise Corrupt(f"{self.where(name)}: missing; restore it or pack again") from None

    def open(self, name: str) -> BinaryIO:
        """A file, open for reading; raises Corrupt when it is missing."""
        try:
            return (self.path / name).open("rb")
        except FileNotFoundError:
            raise Corrupt(f"{self.where(name)}: missing; restore it or pack again") from None

    def renew(self, name: str) -> bool:
        """Whether there is another copy to read a damaged file from: none here."""
        return False


class Mirror:
    """A finished stage directory at a URL, each file copied to this node when it is first used."""

    def __init__(self, url: str, kind: str) -> None:
        """Open it; raises BadInput, Corrupt or Unreachable, naming the URL."""
        self.remote, self.cache = Remote(url), cache_here()
        stage, self.manifest = stage_files.read_finished(str(self), kind, self._read_json)
        files: dict[str, Any] = self.manifest["files"]
        if stage_files.fingerprint_of(stage, files) != self.manifest["fingerprint"]:
            raise Corrupt(f"{self.where(stage_files.MANIFEST)}: does not fit its fingerprint; "
                          "copy the whole set there again")  # fmt: skip
        for name, facts in files.items():
            _check_facts(self.where(stage_files.MANIFEST), name, facts)
        stage_files.check_manifest(self.manifest, self.where(stage_files.MANIFEST))

    def __str__(self) -> str:
        return self.remote.where()

    def where(self, name: str) -> str:
        """What messages call a file: its URL without secrets."""
        return self.remote.where(name)

    def size(self, name: str) -> int:
        """Bytes of a file as its manifest says."""
        return self._content(name).bytes

    def open(self, name: str) -> BinaryIO:
        """This node's copy of a file, open for reading; raises as `Cache.open` does.

        Its sha256 is compared here, but of a tar, whose members have a crc that every read checks.
        """
        if not is_tar(name):
            self.cache.discard_if_damaged(self._content(name))
        return self.cache.open(self._content(name))

    def renew(self, name: str) -> bool:
        """Give up this node's copy if it is damaged: the next `open` has a whole one."""
        self.cache.discard_if_damaged(self._content(name))
        return True

    def faults(self) -> list[str]:
        """Every file at the URL that is not what the manifest says; nothing is kept here.

        What lies there beside those is not looked for: HTTP knows no listing.
        """
        found = [self._fault_of_stage(), self._fault_of_status()]
        return [fault for fault in [*found, *map(self._fault, self.manifest["files"])] if fault]

    def _fault_of_stage(self) -> str:
        data = self.remote.read(stage_files.STAGE) or b""
        if hashlib.sha256(data).hexdigest() == self.manifest["stage_sha256"]:
            return ""
        where = self.where(stage_files.STAGE)
        return f"{where}: content differs from what was written; restore it"

    def _fault_of_status(self) -> str:
        try:
            told = (self._read_json(stage_files.STATUS) or {"status": ""})["status"]
        except Corrupt as fault:
            return str(fault)
        if told == "done":
            return ""
        return f"{self.where(stage_files.STATUS)}: says {told!r} of what is finished"

    def _fault(self, name: str) -> str:
        content, found = self._content(name), hashlib.sha256()
        try:
            if (size := self.remote.size(name)) not in (None, content.bytes):
                return f"{content.where}: {size} bytes, packed with {content.bytes}"
            for piece in content.fetch(0):
                found.update(piece)
        except (Corrupt, Unreachable) as fault:
            return str(fault)
        if found.hexdigest() != content.sha256:
            return f"{content.where}: content differs from what was packed"
        if not is_tar(name):
            return ""
        index = self.remote.read(index_of(name)) or b""
        return misfit(content.where, name, index, self.manifest["files"])

    def _content(self, name: str) -> Content:
        facts = self.manifest["files"].get(name)
        if facts is None:
            raise Corrupt(f"{self.where(name)}: not in {stage_files.MANIFEST}; copy the whole set "
                          "there again")  # fmt: skip
        fetch = partial(self.remote.pieces, name, size=facts["bytes"])
        return Content(self.where(name), facts["sha256"], facts["bytes"], fetch)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        if (data := self.remote.read(name)) is None:
            return None
        try:
            return stage_files.check_ours(json.loads(data), name, self.where(name))
        except ValueError as error:
            raise Corrupt(f"{self.where(name)}: not JSON ({error})") from None


def _check_facts(manifest: str, name: str, facts: Any) -> None:
    # Both become parts of paths.
    whole = isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys()
    plain = not name.startswith("/") and ".." not in name.split("/")
    if not (whole and plain and isinstance(facts["bytes"], int) and facts["bytes"] >= 0
            and re.fullmatch(r"[0-9a-f]{64}", str(facts["sha256"]))):  # fmt: skip
        raise Corrupt(f"{manifest}: file {name!r} has no path below it, size and sha256; "
                      "copy the whole set there again")  # fmt: skip
