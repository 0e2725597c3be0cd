"""Files below a URL that fsspec opens: read whole or from a byte on, tried again when cut off."""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from shards.errors import BadInput, Corrupt, Unreachable

CHUNK = 16 << 20
"""Bytes asked for at a time: what a lost connection costs."""
TRIES = 5
FIRST_WAIT = 0.5
"""Seconds before the second try; doubled each time, times a random factor of 0.5 to 1.5."""
STALLED = 60.0
"""Seconds without a byte over HTTP before a connection counts as lost."""
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp",
    "https": "aiohttp", "abfs": "adlfs", "az": "adlfs", "hf": "huggingface_hub",
}  # fmt: skip
T = TypeVar("T")
_opened: dict[tuple[int, str], tuple[Any, str]] = {}
log = logging.getLogger(__name__)


def is_url(location: str) -> bool:
    """Whether a location is a URL (scheme://, or chained by fsspec's ::) and no path."""
    return re.match(r"[A-Za-z][\w+.-]*(://|::)", location) is not None


def shown(text: str) -> str:
    """`text` with the secrets that URLs in it may carry, users and queries, left out."""
    text = re.sub(r"(\w+://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)


class Remote:
    """A folder at a URL; every process, also a forked one, opens connections of its own."""

    def __init__(self, url: str) -> None:
        """Raises BadInput for a URL that no installed file system opens."""
        self.url = url
        self._folder()

    def where(self, name: str = "") -> str:
        """The address of a file below it, without secrets: for messages."""
        return shown(_below(self.url, name) if name else self.url)

    def read(self, name: str) -> bytes | None:
        """A small file, whole; None where there is none. Raises Unreachable."""
        try:
            return self._tried(name, lambda files, path: files.cat_file(path))
        except FileNotFoundError:
            return None

    def pieces(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """The bytes from `start` on of a file of `size` bytes.

        Raises Corrupt when there is none, Unreachable when it does not come.
        """
        while start < size:
            end = min(start + CHUNK, size)
            try:
                data = self._tried(name, partial(_ranged, start=start, end=end, size=size))
            except FileNotFoundError:
                raise Corrupt(f"{self.where(name)}: missing; restore it there") from None
            yield data
            start += len(data)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where the server does not say. Raises as `pieces` does."""
        try:
            return self._tried(name, lambda files, path: files.info(path)["size"])
        except FileNotFoundError:
            raise Corrupt(f"{self.where(name)}: missing; restore it there") from None

    def _tried(self, name: str, call: Callable[[Any, str], T]) -> T:
        for number in range(1, TRIES + 1):
            try:
                files, root = self._folder()
                return call(files, _below(root, name))
            except FileNotFoundError:
                raise
            except Exception as error:  # every file system has exceptions of its own
                told = f"{self.where(name)}: {shown(f'{type(error).__name__}: {error}')}"
                if number == TRIES or _is_final(error):
                    tries = f"after {number} {'try' if number == 1 else 'tries'}"
                    told = f"{told}; gave up {tries}; once it answers the same command goes on"
                    # Without its cause: that one's message may hold what `shown` left out.
                    raise Unreachable(told) from None
            wait = FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            log.warning("%s; try %d of %d in %.1f s", told, number + 1, TRIES, wait)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _folder(self) -> tuple[Any, str]:
        # fsspec's event loop does not live on in a forked process. What the parent had opened
        # stays referenced there: its finaliser would wait for that dead loop.
        key = (os.getpid(), self.url)
        if key not in _opened:
            _opened[key] = _open(self.url)
        return _opened[key]


def _open(url: str) -> tuple[Any, str]:
    import fsspec  # a fifth of a second that sets on disk need not pay

    scheme = url.partition("://")[0].rpartition("::")[2].lower()
    try:
        return fsspec.core.url_to_fs(url, **_options(scheme))
    except (ImportError, ValueError) as error:
        package = PACKAGES.get(scheme, f"the fsspec file system for {scheme}")
        raise BadInput(f"{shown(url)}: {shown(str(error))}; install {package}, or give a folder "
                       "or another URL") from None  # fmt: skip


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    # fsspec's default ends every request after five minutes, however well it goes; and what a
    # proxy compressed on the way would not have the bytes of a range.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED / 2, sock_read=STALLED)
    return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}


def _below(root: str, name: str) -> str:
    if not re.match(r"https?://", root):
        return f"{root.rstrip('/')}/{name}"
    base, mark, query = root.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"


def _ranged(files: Any, path: str, start: int, end: int, size: int) -> bytes:
    data = files.cat_file(path, start=start, end=end)
    if len(data) == end - start:
        return data
    if len(data) == size:  # a server that knows no ranges sends the whole file
        return data[start:]
    raise OSError(f"{len(data)} bytes came where {end - start} of {size} were asked for, "
                  f"starting {data[:32]!r}")  # fmt: skip


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of an HTTP answer
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return refused or isinstance(error, (PermissionError, ImportError, IsADirectoryError))
