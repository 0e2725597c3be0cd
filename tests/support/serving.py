"""A small HTTP server of a folder that knows ranges, counts, and misbehaves on request."""

import gzip
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

PAGE = b"<html><body>503 Service Unavailable</body></html>"


@dataclass
class Serving:
    """What a server does and has done: change the fields while it runs."""

    folder: Path
    url: str = ""
    ranges: bool = True
    broken: Callable[[str], str] = lambda path: ""
    """The fault of a path: "" (none), "503" or any code, "cut" (half of the bytes), "wrong" (other
    bytes), "page" (HTML), "endless" (no end), "huge" (no end, and a length of 1 TB), "drip" (100
    bytes a second), "short" (a length one byte too small), "gzip" (16 MB, compressed)."""
    faults: int = 1 << 30
    """So many answers are broken ones, the others are well."""
    delay: float = 0.0
    """Seconds that every answer waits in its middle."""
    started: Counter[str] = field(default_factory=Counter)
    """Requests from a file's first byte, by path."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of endless answers that clients have taken, by path."""
    resumed: Counter[str] = field(default_factory=Counter)
    """Requests from a later byte."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str) -> str:
        """How to break this answer; counts it."""
        with self.lock:
            kind = self.broken(path) if self.faults > 0 else ""
            self.faults -= bool(kind)
        return kind


@contextmanager
def serve(folder: Path) -> Iterator[Serving]:
    """Serve `folder` on a free port until the block ends."""
    serving = Serving(folder)
    handler = type("Handler", (_Handler,), {"serving": serving})
    with _Server(("127.0.0.1", 0), handler) as server:
        serving.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield serving
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Silence: clients that are killed in the middle are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    serving: Serving
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        path = self._path()
        if (self.serving.folder / path).is_file():
            self._head(200, (self.serving.folder / path).stat().st_size)
        else:
            self._head(404, 0)

    def do_GET(self) -> None:
        serving, path = self.serving, self._path()
        file = serving.folder / path
        if not file.is_file():
            self._head(404, 0)
            return
        data = file.read_bytes()
        requested = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (
            map(int, requested.groups()) if requested and serving.ranges else (0, len(data) - 1)
        )
        with serving.lock:
            (serving.resumed if first else serving.started)[path] += 1
        self._answer(path, data[first : last + 1], 206 if requested and serving.ranges else 200)

    def _answer(self, path: str, data: bytes, code: int) -> None:
        fault = self.serving.fault(path)
        if fault.isdecimal():
            code, data = int(fault), PAGE
        elif fault == "page":
            code, data = 200, PAGE
        elif fault == "wrong":
            data = bytes(byte ^ 1 for byte in data)
        elif fault in ("endless", "huge", "drip"):
            self._without_end(path, data, code, fault)
            return
        elif fault == "gzip":
            data = gzip.compress(bytes(1 << 24))
        self._head(code, len(data) - (fault == "short"), coding="gzip" if fault == "gzip" else "")
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        time.sleep(self.serving.delay)
        if fault == "cut":
            self.close_connection = True
        else:
            self.wfile.write(data[half:])

    def _without_end(self, path: str, data: bytes, code: int, fault: str) -> None:
        self.close_connection = True
        # Without a length: the answer ends with the connection.
        self._head(code, {"huge": 10**12, "drip": len(data)}.get(fault))
        while True:
            some = data[self.serving.sent[path] :][:10] if fault == "drip" else bytes(1 << 16)
            self.wfile.write(some or b"\n")
            self.serving.sent[path] += len(some)
            if fault == "drip":
                time.sleep(0.1)

    def _path(self) -> str:
        return unquote(self.path.partition("?")[0]).lstrip("/")

    def _head(self, code: int, size: int | None, coding: str = "") -> None:
        self.send_response(code)
        if size is not None:
            self.send_header("Content-Length", str(size))
        if coding:
            self.send_header("Content-Encoding", coding)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the test's own output is what matters."""
