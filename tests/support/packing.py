"""Packs as real processes, and what they leave behind."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.verify import verify

OPTIONS = PackOptions(size=24, shard_items=6)


def command(catalogue: Path, out: Path, *more: str, shard_items: int = 6) -> list[str]:
    return [
        sys.executable, "-m", "dist_train", "pack", str(catalogue),
        "--images", str(catalogue.parent / "images"), "--out", str(out),
        "--size", "24", "--shard-items", str(shard_items), *more,
    ]  # fmt: skip


def tree(out: Path) -> dict[str, str]:
    """sha256 of every file, but for the two that tell the time and for temporary ones."""
    return {
        str(path.relative_to(out)): hashlib.sha256(_timeless(path)).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("stage.json", "status.json")
        if path not in temporary_files(out)
    }


def _timeless(path: Path) -> bytes:
    if path.name != "manifest.json":
        return path.read_bytes()
    # It holds the hash of stage.json, which tells when the pack was started.
    manifest = json.loads(path.read_bytes())
    timeless = {k: v for k, v in manifest.items() if k not in ("stage_sha256", "sha256")}
    assert {"fingerprint", "counts", "files"} <= timeless.keys()
    return json.dumps(timeless).encode()


def temporary_files(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*.tmp-*") if path.is_file()]


def finish(few: Path, out: Path) -> dict[str, str]:
    pack(few, few.parent / "images", out, OPTIONS)
    assert verify(out) == []
    return tree(out)


@contextlib.contextmanager
def started(few: Path, out: Path, ways: list[list[str]]) -> Iterator[list[subprocess.Popen]]:
    """Packs into one folder, each the leader of its group; none is left at the end."""
    processes = [
        subprocess.Popen(
            command(few, out, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )
        for more in ways
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
