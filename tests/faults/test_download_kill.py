"""Killed while it downloads: nothing half is ever taken for whole, and the next one goes on."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.storage.files import sha256_file
from tests.support.serving import Serving, serve

READ_ALL = """
import json, sys
from shards.read import remote
from shards.read.shard_set import ShardSet
remote.CHUNK = 8192
reader = ShardSet(sys.argv[1]).reader()
print(json.dumps([[reader[n].posting_id, reader[n].title] for n in range(len(reader))]))
"""


@pytest.fixture(scope="module")
def packed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of many tars."""
    folder = tmp_path_factory.mktemp("sets")
    options = PackOptions(size=96, shard_items=60)
    pack(catalogue / "catalogue.csv", catalogue / "images", folder / "set", options)
    return folder


@pytest.fixture
def server(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path))
    with serve(packed) as serving:
        serving.delay = 0.01
        yield serving


def start(url: str) -> subprocess.Popen:
    command = [sys.executable, "-c", READ_ALL, f"{url}/set"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def whole(packed: Path) -> list[list[str]]:
    reader = ShardSet(packed / "set").reader()
    return [[reader[n].posting_id, reader[n].title] for n in range(len(reader))]


def check_names(cache: Path) -> None:
    """Whatever has a final name is whole."""
    copies = [p for p in cache.rglob("*") if p.is_file() and p.suffix not in (".part", ".lock")]
    assert all(sha256_file(path) == path.name for path in copies)


def parts(cache: Path, size: int = 1) -> list[Path]:
    """Unfinished copies of `size` bytes or more."""
    found = []
    for part in cache.rglob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            found += [part] if part.stat().st_size >= size else []
    return found


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.002)


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.full)])
def test_killed_at_random_moments(
    rounds: int, packed: Path, server: Serving, tmp_path: Path
) -> None:
    moments, expected = random.Random(rounds), whole(packed)
    for _ in range(rounds):
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        for _ in range(4):
            process, before = start(server.url), sum(server.started.values())
            wait_for(lambda before=before: sum(server.started.values()) >= before + 2)
            time.sleep(moments.random() * 0.4)
            process.kill()
            process.communicate()
            check_names(tmp_path)
        output, errors = start(server.url).communicate(timeout=120)
        assert json.loads(output) == expected, errors
        check_names(tmp_path)
        left = [path for path in tmp_path.rglob("*.*") if path.is_file()]
        # One killed between the name and the lock's end leaves the empty lock.
        assert not [path for path in left if path.suffix != ".lock" or path.stat().st_size]


def test_killed_in_a_file_the_next_one_goes_on_there(
    packed: Path, server: Serving, tmp_path: Path
) -> None:
    process = start(server.url)
    wait_for(lambda: parts(tmp_path, 3 * 8192))
    process.kill()
    process.communicate()
    (part,) = parts(tmp_path)
    paths = {sha256_file(p): str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()}
    path = paths[part.stem]
    assert server.started[path] == 1
    output, errors = start(server.url).communicate(timeout=120)
    assert json.loads(output) == whole(packed), errors
    assert server.started[path] == 1  # never again from its first byte
    check_names(tmp_path)


def test_a_part_with_wrong_bytes_is_begun_anew(
    packed: Path, server: Serving, tmp_path: Path
) -> None:
    process = start(server.url)
    wait_for(lambda: parts(tmp_path, 2 * 8192))
    process.kill()
    process.communicate()
    (part,) = parts(tmp_path)
    part.write_bytes(bytes(part.stat().st_size))  # as after a loss of power
    output, errors = start(server.url).communicate(timeout=120)
    assert json.loads(output) == whole(packed), errors
    check_names(tmp_path)


def test_those_that_wait_take_over_from_a_killed_one(
    packed: Path, server: Serving, tmp_path: Path
) -> None:
    first = start(server.url)
    wait_for(lambda: parts(tmp_path))
    others = [start(server.url) for _ in range(2)]
    time.sleep(1.5)
    first.kill()
    first.communicate()
    for process in others:
        output, errors = process.communicate(timeout=120)
        assert json.loads(output) == whole(packed), errors
    check_names(tmp_path)
