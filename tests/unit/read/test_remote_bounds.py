"""Servers whose answers have no end, come too slowly or have another length than they say."""

import time
from pathlib import Path

import pytest

from shards.read import remote
from shards.read.shard_set import ShardSet
from shards.read.verify import verify
from shards.storage.errors import Corrupt, Unreachable
from tests.support.serving import Serving
from tests.support.shard_sets import all_items, tar_files

SLACK = 40 << 20
"""Bytes that the buffers between server and client may hold: Linux lets a connection's receive
buffer grow to 32 MB and its send buffer to 4 MB. The answers have no end, so more is read on."""


def read_everything(url: str) -> None:
    all_items(url)
    assert len(ShardSet(url).items)


@pytest.mark.parametrize("fault", ["endless", "huge"])
@pytest.mark.parametrize("name", ["stage.json", "manifest.json"])
def test_a_text_without_end_is_refused_and_read_once(
    fault: str, name: str, server: Serving
) -> None:
    server.broken = lambda path: fault if path.endswith(name) else ""
    with pytest.raises(Corrupt, match=rf"a/{name}: longer than the 67108864 bytes"):
        ShardSet(f"{server.url}/a")
    assert server.started[f"a/{name}"] == 1
    assert server.sent[f"a/{name}"] < (64 << 20) + SLACK


@pytest.mark.parametrize("fault", ["endless", "huge"])
@pytest.mark.parametrize("end", [".idx", ".tar", "items.parquet"])
def test_a_file_without_end_is_read_to_its_size_in_the_manifest(
    fault: str, end: str, sets: Path, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as the manifest lists are downloaded, their sha256 differs."""
    for chunk in (remote.CHUNK, 4096):
        monkeypatch.setattr(remote, "CHUNK", chunk)
        server.broken = lambda path: fault if path.endswith(end) else ""
        with pytest.raises(Corrupt, match=rf"a/\S*{end}: sha256 \w{{64}}, in its manifest"):
            read_everything(f"{server.url}/a")
    for path, sent in server.sent.items():
        requests = server.started[path] + server.resumed[path]
        assert sent < requests * SLACK
    server.broken = lambda path: ""
    assert all_items(f"{server.url}/a") == all_items(sets / "a")


def test_a_server_without_ranges_and_without_end(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 4096)
    server.ranges = False
    server.broken = lambda path: "endless" if path.endswith(".tar") else ""
    with pytest.raises(Corrupt, match="sha256"):
        all_items(f"{server.url}/a")


@pytest.mark.parametrize("end", ["stage.json", "manifest.json", ".idx", ".tar"])
def test_an_answer_that_drips_is_given_up_in_time(
    end: str, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then is enough for a limit on the wait between two of them."""
    monkeypatch.setattr(remote, "STALLED", 0.5)
    monkeypatch.setattr(remote, "TRIES", 2)
    server.broken = lambda path: "drip" if path.endswith(end) else ""
    began = time.monotonic()
    with pytest.raises(Unreachable, match=rf"{end}: OSError: only \d+ bytes came in .* 2 tries"):
        all_items(f"{server.url}/a")
    assert time.monotonic() - began < 10


def test_a_slow_answer_that_keeps_its_rate_is_read(
    sets: Path, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALLED", 0.3)
    monkeypatch.setattr(remote, "LEAST_RATE", 1)
    server.delay = 0.25
    first = tar_files(sets / "a")[0].relative_to(sets)
    data = (sets / first).read_bytes()
    assert b"".join(remote.Remote(server.url).pieces(str(first), 0, len(data))) == data


def test_tries_are_bounded_in_time(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    server.broken = lambda path: "500"
    with pytest.raises(Unreachable, match="gave up after 1 try"):
        ShardSet(f"{server.url}/a")


@pytest.mark.parametrize("end", ["stage.json", ".tar"])
def test_a_compressed_answer_is_refused_unread(end: str, server: Serving) -> None:
    """A megabyte of it may become a gigabyte."""
    server.broken = lambda path: "gzip" if path.endswith(end) else ""
    with pytest.raises(Unreachable, match=rf"{end}: .*the answer is compressed \(gzip\)"):
        all_items(f"{server.url}/a")


@pytest.mark.parametrize("end", ["stage.json", ".idx", ".tar"])
def test_a_length_that_is_too_small(end: str, server: Serving) -> None:
    server.broken = lambda path: "short" if path.endswith(end) else ""
    with pytest.raises((Corrupt, Unreachable), match=rf"{end}: "):
        all_items(f"{server.url}/a")


@pytest.mark.parametrize("fault", ["endless", "huge"])
def test_verify_names_what_has_no_end(
    fault: str, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.broken = lambda path: fault if path.endswith("train/000000.idx") else ""
    (found,) = verify(f"{server.url}/a")
    assert found.startswith(f"{server.url}/a/train/000000.idx: ")
