"""Files that are whole or absent."""

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import (
    atomic_path,
    json_bytes,
    names_in,
    read_json,
    remove_abandoned,
    sha256_file,
    sha256_json,
    sync,
    write_atomic,
    write_json,
    write_parquet,
)
from tests.support.recorded_writes import faults, recorded


class Boom(Exception):
    pass


def fail_half_way(target: Path) -> None:
    old = target.read_bytes() if target.exists() else None
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert (target.read_bytes() if target.exists() else None) == old
        raise Boom


def test_atomic_path_leaves_nothing_on_an_exception(tmp_path: Path) -> None:
    with pytest.raises(Boom):
        fail_half_way(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_atomic_path_keeps_the_old_file_on_an_exception(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(Boom):
        fail_half_way(target)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_atomic_path_that_was_never_written_fails_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_bytes() == b"old"


def test_write_atomic_makes_parents_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "x" / "y" / "a.bin"
    for data in (b"one", b"two, longer", b""):
        write_atomic(target, data)
        assert target.read_bytes() == data
    assert [p.name for p in target.parent.iterdir()] == ["a.bin"]


def test_json_comes_back_as_it_was_and_is_readable_by_others(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "título": "é"}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert "título" in (tmp_path / "v.json").read_text()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "v.json").stat().st_mode) == 0o666 & ~umask


def test_missing_and_broken_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"v\.json: not found"):
        read_json(tmp_path / "v.json")
    for broken in (b'{"a": ', b"", b"\xff\xfe"):
        (tmp_path / "v.json").write_bytes(broken)
        with pytest.raises(Corrupt, match=r"v\.json: not JSON"):
            read_json(tmp_path / "v.json")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "f") == known
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    with recorded() as events:
        write_atomic(tmp_path / "a" / "b.bin", b"one")
        write_json(tmp_path / "c.json", {"a": 1})
        write_parquet(tmp_path / "d.parquet", pd.DataFrame({"x": [1]}))
    assert len([event for event in events if event.renamed]) == 3
    assert faults(events, tmp_path) == []


def test_bytes_of_json_are_frozen(tmp_path: Path) -> None:
    # Manifests are compared with them to the byte.
    write_json(tmp_path / "v.json", {"é": [1, {"b": None}]})
    whole = '{\n "é": [\n  1,\n  {\n   "b": null\n  }\n ]\n}\n'.encode()
    assert (tmp_path / "v.json").read_bytes() == whole
    assert json_bytes({"é": [1, {"b": None}]}) == whole


def test_tables_are_written_without_the_names_of_their_rows(tmp_path: Path) -> None:
    table = pd.DataFrame({"x": [1, 2]}, index=pd.Index([7, 9], name="row"))
    write_parquet(tmp_path / "t.parquet", table)
    assert pq.read_table(tmp_path / "t.parquet").column_names == ["x"]
    assert pq.read_table(tmp_path / "t.parquet")["x"].to_pylist() == [1, 2]


def test_only_what_dead_processes_of_this_host_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    host, living = os.uname().nodename, os.getppid()
    gone = [f".a.json.tmp-{host}-{pid}" for pid in (ended.pid, os.getpid(), 1)]
    kept = [f".b.json.tmp-{host}-{living}", f".c.json.tmp-another-{ended.pid}",
            f".d.json.tmp-{host}-x", "e.json", ".f"]  # fmt: skip
    for name in (*gone, *kept):
        for folder in (tmp_path, tmp_path / "deep" / "er"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    assert names_in(tmp_path) == {*kept[3:], "deep"}
    remove_abandoned(tmp_path)
    for folder in (tmp_path, tmp_path / "deep" / "er"):
        assert {path.name for path in folder.iterdir()} - {"deep"} == set(kept)


def test_a_file_of_another_host_is_removed_a_day_after_its_last_write(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{name}.json.tmp-another-7" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


def test_a_process_that_has_been_given_the_number_of_a_dead_one_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    host, living = os.uname().nodename, os.getppid()
    started = psutil.Process(living).create_time()
    old, new = (tmp_path / f".{name}.json.tmp-{host}-{living}" for name in ("old", "new"))
    for path, written in ((old, started - 100), (new, started + 1)):
        path.touch()
        os.utime(path, (written, written))
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


def test_a_process_of_another_user_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(pid: int, number: int) -> None:
        assert (pid, number) == (54_321, 0)
        raise PermissionError

    path = tmp_path / f".a.tmp-{os.uname().nodename}-54321"
    path.touch()
    monkeypatch.setattr(os, "kill", refused)
    remove_abandoned(tmp_path)
    assert path.exists()


def test_an_error_of_the_disk_is_reported_and_no_descriptor_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = 0

    def failing(descriptor: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "fsync", failing)
    before = os.listdir("/proc/self/fd")
    for answer in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(OSError, match=os.strerror(answer)):
            sync(tmp_path)
    for answer in (errno.EINVAL, errno.EROFS):  # noqa: B007
        sync(tmp_path)
    assert os.listdir("/proc/self/fd") == before
