"""Room on the disk, and photos that are not there: what is told, and from which byte on."""

import errno
import shutil
import sqlite3
from collections import namedtuple
from pathlib import Path

import pytest

from shards.errors import BadInput, Failed
from shards.room import check_photos, check_room, full_disk_told, written
from shards.room import told as for_people

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of which 3 000 bytes stand, on a disk with 7 000 free ones."""
    for name, size in (("train/000000.tar", 2_000), ("train/000000.idx", 600),
                       ("val/000000.tar", 400), ("val/.000001.tar.tmp-host-1", 5_000),
                       (".pack/plan.sqlite", 9_000)):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 7_000, 7_000))
    return tmp_path


def test_what_stands_already_needs_no_room(shards: Path) -> None:
    assert written(shards) == 3_000
    check_room(shards, 10_000)
    with pytest.raises(Failed, match=r"no room: about 0\.0 MB needed, 0\.0 MB free"):
        check_room(shards, 10_001)


def test_sizes_for_people() -> None:
    sizes = (0, 50_000, 999_900_000, 10**9, 12_340_000_000)
    words = ["0.0 MB", "0.1 MB", "999.9 MB", "1.0 GB", "12.3 GB"]
    assert [for_people(size) for size in sizes] == words


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "none"), OSError(errno.EDQUOT, "none"), OSError(errno.EFBIG, "none"),
     sqlite_error(sqlite3.SQLITE_FULL), sqlite_error(sqlite3.SQLITE_IOERR_WRITE)],
    ids=repr,
)  # fmt: skip
def test_a_full_disk_is_told_with_what_stands(shards: Path, error: Exception) -> None:
    told = r"no room left .*0\.0 MB of shards stand whole.*goes on"
    with pytest.raises(Failed, match=told), full_disk_told(shards):
        raise error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "none"), OSError(errno.EACCES, "none"),
     sqlite_error(sqlite3.SQLITE_CORRUPT), ValueError("none")],
    ids=repr,
)  # fmt: skip
def test_other_errors_stay_what_they_are(shards: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, full_disk_told(shards):
        raise error
    assert raised.value is error


def test_photos_that_were_there_for_the_plan_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").touch()
    check_photos(tmp_path, ["a.jpg", "b.jpg"])
    check_photos(tmp_path, [])
    check_photos(None, ["a.jpg"])
    with pytest.raises(BadInput, match=r"it lacks a\.jpg and every other photo"):
        check_photos(tmp_path, ["a.jpg", "c.jpg"])
