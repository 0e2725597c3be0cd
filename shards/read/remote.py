"""Files below a URL that fsspec opens: read completely or from an offset, with retries.

What a server sends is never trusted: no answer is read beyond the bytes that were requested, and an
answer that comes too slowly is given up.
"""

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote

from shards.storage.errors import BadInput, Corrupt, Unreachable

CHUNK = 16 << 20
"""Bytes of a request: what a lost connection costs."""
TRIES = 5
FIRST_WAIT = 0.5
"""Seconds before the second try; doubled each time, times a random factor of 0.5 to 1.5."""
STALLED = 60.0
"""Seconds without a byte over HTTP before a connection counts as lost."""
LEAST_RATE = 16 << 10
"""Bytes a second that an HTTP answer must keep up, after its first STALLED seconds."""
MOST_TEXT = 64 << 20
"""Bytes of a file whose size no manifest lists: the manifest of a hundred thousand tars."""
PATIENCE = 600.0
"""Seconds after which a request that failed is not tried again."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "abfs": "adlfs", "az": "adlfs"}
PACKAGES |= {"hf": "huggingface_hub"}
"""The package that opens URLs of a scheme."""
T = TypeVar("T")
_opened: dict[tuple[int, str], tuple[Any, str]] = {}
log = logging.getLogger(__name__)


def is_url(location: str) -> bool:
    """Whether a location is a URL (scheme://, or chained by fsspec's ::) and not a path."""
    return re.match(r"[A-Za-z][\w+.-]*(://|::)", location) is not None


def shown(text: str) -> str:
    """`text` without the user and query of URLs in it, which may be secrets."""
    text = re.sub(r"(\w+://)[^/\s'\"]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s'\"?]*)\?[^\s'\"]*", r"\1", text)


class Remote:
    """A folder at a URL; every process, also a forked one, opens separate connections."""

    def __init__(self, url: str) -> None:
        """Raises BadInput for a URL that no installed file system opens."""
        self.url = url
        self._folder()

    def where(self, name: str = "") -> str:
        """The address of a file below the URL, or the URL, without secrets, for messages."""
        return shown(_below(self.url, name) if name else self.url)

    def read(self, name: str, most: int = MOST_TEXT) -> bytes | None:
        """A file of at most `most` bytes; None where there is none. Raises Corrupt if longer."""

        def fetch(files: Any, path: str) -> bytes:
            if _is_http(files):
                return _on_loop(files, _http_bytes, path, 0, most + 1, {})
            with files.open(path, "rb") as file:
                return file.read(most + 1)

        try:
            data = self.retried(name, fetch)
        except Corrupt:
            return None
        if len(data) > most:
            raise Corrupt(
                f"{self.where(name)}: longer than the {most} bytes that it may have, the rest was "
                "not read; look at what the server sends, and copy the set there again"
            )
        return data

    def pieces(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """Yield a file of `size` bytes from `start` on, at most CHUNK at a time."""

        def fetch(files: Any, path: str) -> bytes:
            if _is_http(files):
                part = {"Range": f"bytes={start}-{end - 1}"}
                data = _on_loop(files, _http_bytes, path, start, end, part)
            else:
                data = files.cat_file(path, start=start, end=end)
            if len(data) == end - start:
                return data
            raise OSError(
                f"{len(data)} bytes came where {end - start} of {size} were requested, "
                f"starting {data[:32]!r}"
            )

        while start < size:
            end = min(start + CHUNK, size)
            data = self.retried(name, fetch)
            yield data
            start += len(data)

    def size_there(self, name: str) -> int | None:
        """Bytes of a file at the URL; None where the server does not report them."""
        return self.retried(
            name,
            lambda files, path: (
                _on_loop(files, _http_size, path) if _is_http(files) else files.info(path)["size"]
            ),
        )

    def retried(self, name: str, call: Callable[[Any, str], T]) -> T:
        """`call(file system, path)` for the file `name`, up to TRIES times with growing waits.

        Raises Corrupt for no such file, Unreachable after the last try or where none would help.
        """
        began = time.monotonic()
        for number in range(1, TRIES + 1):
            try:
                files, root = self._folder()
                return call(files, _below(root, name))
            except FileNotFoundError:
                raise Corrupt(f"{self.where(name)}: missing; restore it there") from None
            except Exception as error:  # every file system has its own exceptions
                message = f"{self.where(name)}: {shown(f'{type(error).__name__}: {error}')}"
                status = getattr(error, "status", None)  # of an HTTP answer
                is_final = isinstance(error, (PermissionError, ImportError, IsADirectoryError))
                is_final |= status in range(400, 500) and status not in (408, 425, 429)
                is_final |= time.monotonic() - began > PATIENCE
                if number == TRIES or is_final:
                    tries = f"after {number} {'try' if number == 1 else 'tries'}"
                    # Without its cause: the cause's message may hold what `shown` left out.
                    raise Unreachable(
                        f"{message}; gave up {tries}; once it answers the same command goes on"
                    ) from None
            wait = FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            log.warning("%s; try %d of %d in %.1f s", message, number + 1, TRIES, wait)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _folder(self) -> tuple[Any, str]:
        """This process's file system of the URL and the path on it."""
        # fsspec's event loop does not survive a fork. A forked process opens its own and keeps a
        # reference to the parent's: the finaliser of that one would wait for the dead loop.
        key = (os.getpid(), self.url)
        if key in _opened:
            return _opened[key]
        import fsspec  # takes a fifth of a second, which sets on disk need not pay

        scheme = self.url.partition("://")[0].rpartition("::")[2].lower()
        options: dict[str, Any] = {}
        try:
            if scheme in ("http", "https"):
                import aiohttp

                # fsspec's default ends every request after five minutes, even one that progresses.
                # A body that a proxy compressed on the way would not have the bytes of a range.
                timeout = aiohttp.ClientTimeout(sock_connect=STALLED / 2, sock_read=STALLED)
                headers = {"Accept-Encoding": "identity"}
                options = {"client_kwargs": {"timeout": timeout, "headers": headers}}
            _opened[key] = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            package = PACKAGES.get(scheme, f"the fsspec file system for {scheme}")
            raise BadInput(
                f"{self.where()}: {shown(str(error))}; install {package}, or give a folder or "
                "another URL"
            ) from None
        return _opened[key]


def _is_http(files: Any) -> bool:
    return "http" in type(files).protocol


def _on_loop(files: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the coroutine `call(files, *arguments)` on fsspec's event loop."""
    from fsspec.asyn import sync

    return sync(files.loop, call, files, *arguments)


async def _http_size(files: Any, url: str) -> int | None:
    """Bytes of a file; None where the server does not report them."""
    async with asyncio.timeout(STALLED):
        return (await files._info(url))["size"]


async def _http_bytes(files: Any, url: str, start: int, end: int, headers: dict[str, str]) -> bytes:
    """The bytes of a file from `start` to `end`, or to its own end; no more are ever held.

    headers: of the request, with its range or without. Raises OSError for an answer that is too
    slow, or compressed: the length of that says nothing of the file's.
    """
    session, seen, kept = await files.set_session(), 0, bytearray()
    began = time.monotonic()
    deadline = asyncio.get_running_loop().time() + STALLED
    try:
        async with (
            asyncio.timeout_at(deadline) as limit,
            session.get(files.encode_url(url), headers=headers) as answer,
        ):
            files._raise_not_found_for_status(answer, url)
            if (coding := answer.headers.get("Content-Encoding", "identity")) != "identity":
                raise OSError(f"the answer is compressed ({coding}), which was not requested")
            # A server that knows no ranges sends the complete file.
            first = start if answer.status == 206 else 0
            async for some in answer.content.iter_any():
                kept += some[max(start - first - seen, 0) : max(end - first - seen, 0)]
                seen += len(some)
                if first + seen >= end:
                    break
                limit.reschedule(deadline + seen / LEAST_RATE)
    except TimeoutError:
        seconds = time.monotonic() - began
        raise OSError(f"only {seen} bytes came in {seconds:.0f} s, which is too slow") from None
    return bytes(kept)


def _below(root: str, name: str) -> str:
    """The address of file `name` below `root`, whose query stays at the end."""
    if not re.match(r"https?://", root):
        return f"{root.rstrip('/')}/{name}"
    base, mark, query = root.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"
