"""Files that are whole or absent."""

import os
import stat
from pathlib import Path

import pytest

from shards.errors import BadInput, Corrupt
from shards.files import atomic_path, read_json, sha256_file, sha256_json, write_atomic, write_json


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
