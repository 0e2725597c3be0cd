"""Copies of remote files on a node: made once, whole, within a limit, on a disk that fills."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.read.cache import FOLDER, LIMIT
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, CacheFull
from shards.storage.files import sha256_file
from tests.support.serving import Serving
from tests.support.shard_sets import all_items, cached_files, tar_files

READ_ALL = """
import json, sys
from shards.read.shard_set import ShardSet
reader = ShardSet(sys.argv[1]).reader()
print(json.dumps([reader[n].posting_id for n in range(len(reader))]))
"""


# ── many processes


@pytest.mark.timeout(120)
def test_four_processes_download_each_file_once(sets: Path, server: Serving) -> None:
    server.delay = 0.05
    found = _read_in_processes(4, f"{server.url}/a")
    assert found == [[item.posting_id for item in all_items(sets / "a")]] * 4
    data = {path: count for path, count in server.started.items() if not path.endswith(".json")}
    assert len(data) > 10
    assert set(data.values()) == {1}


def _read_in_processes(count: int, url: str) -> list[list[str]]:
    started = [
        subprocess.Popen([sys.executable, "-c", READ_ALL, url], stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    return [json.loads(process.communicate(timeout=100)[0]) for process in started]


# ── the cache


def test_a_copy_that_rotted_is_downloaded_again(sets: Path, server: Serving, cache: Path) -> None:
    whole = all_items(f"{server.url}/a")
    for path in cached_files(cache):
        data = bytearray(path.read_bytes())
        data[700:] = bytes(byte ^ 8 for byte in data[700:])
        path.write_bytes(data)
    assert all_items(f"{server.url}/a") == whole
    assert all(sha256_file(path) == path.name for path in cached_files(cache))
    for path in cached_files(cache):
        os.truncate(path, path.stat().st_size // 2)
    assert all_items(f"{server.url}/a") == whole


def test_a_copy_that_rots_under_an_open_reader(sets: Path, server: Serving, cache: Path) -> None:
    reader = ShardSet(f"{server.url}/a").reader()
    whole = [reader[position] for position in range(len(reader))]
    for tar in tar_files(sets / "a"):
        copy = next(cache.rglob(sha256_file(tar)))
        copy.write_bytes(bytes(copy.stat().st_size))
    assert [reader[position] for position in range(len(reader))] == whole


def test_the_cache_keeps_to_its_limit(
    sets: Path, server: Serving, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = all_items(sets / "a")
    size = sum(path.stat().st_size for path in sets.glob("a/*/*"))
    for limit in (size // 2, size // 3):
        monkeypatch.setenv(LIMIT, str(limit))
        reader = ShardSet(f"{server.url}/a").reader()
        for position in range(len(reader)):
            assert reader[position] == whole[position]
            assert sum(path.stat().st_size for path in cached_files(cache)) <= limit
    monkeypatch.setenv(LIMIT, "20000")
    with pytest.raises(CacheFull, match="raise DIST_TRAIN_CACHE_BYTES"):
        all_items(f"{server.url}/a")
    monkeypatch.setenv(LIMIT, "20 GB")
    with pytest.raises(BadInput, match="write a number of bytes"):
        ShardSet(f"{server.url}/a")


def test_what_was_not_used_for_longest_goes_first_and_what_is_open_stays(
    sets: Path, server: Serving, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = ShardSet(f"{server.url}/a").reader()
    first = held[0]
    all_items(f"{server.url}/a")
    for age, tar in enumerate(tar_files(sets / "a")):
        os.utime(next(cache.rglob(sha256_file(tar))), (age, age))
    open_tar = sets / "a" / held.tars[0]
    used = sum(path.stat().st_size for path in cached_files(cache))
    monkeypatch.setenv(LIMIT, str(used + 100))
    all_items(f"{server.url}/b", ("test",))
    left = [tar for tar in tar_files(sets / "a") if list(cache.rglob(sha256_file(tar)))]
    assert open_tar in left
    others = [tar for tar in tar_files(sets / "a") if tar != open_tar]
    gone = [tar for tar in others if tar not in left]
    assert gone
    assert gone == others[: len(gone)]
    assert held[0] == first


def test_a_full_disk_is_reported_and_old_copies_make_room(
    sets: Path, server: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in sets.glob("a/*/*"))
    monkeypatch.setenv(FOLDER, str(disk))
    with _small_disk(disk, size * 2 // 3):
        assert all_items(f"{server.url}/a") == all_items(sets / "a")  # old ones go
        for path in cached_files(disk):
            path.unlink()
        (disk / "other").write_bytes(bytes(size * 2 // 3 - 8192))
        with pytest.raises(CacheFull, match=r"disk has no room for its \d+ bytes .*free some"):
            all_items(f"{server.url}/a")
        (disk / "other").unlink()
        assert all_items(f"{server.url}/b") == all_items(sets / "b")


@contextlib.contextmanager
def _small_disk(path: Path, size: int) -> Iterator[None]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_cache_that_cannot_be_written_is_named(
    server: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"file: cannot be written .*DIST_TRAIN_CACHE"):
        all_items(f"{server.url}/a")
