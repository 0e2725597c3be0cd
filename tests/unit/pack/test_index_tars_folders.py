"""Tars of other programs with rare members, and disks too small for an index."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shards.pack.index_tars import index_tars
from shards.read.shard_set import ShardSet
from shards.read.verify import verify
from shards.storage.errors import BadInput
from tests.support.tars import samples, write_tar


def test_a_tar_in_capitals_is_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "A.tar", samples(0, 4))
    write_tar(tmp_path / "B.TAR", samples(4, 4))
    counts = index_tars(tmp_path)
    assert (counts["indexed_tars"], counts["packed"]) == (2, 8)
    shards = ShardSet(tmp_path)
    reader = shards.reader()
    assert {reader[place].posting_id for place in range(8)} == {f"{n:09d}" for n in range(8)}
    assert shards.photo(f"{7:09d}") == dict(samples(7, 1))[f"{7:09d}.jpg"]
    assert verify(tmp_path) == []
    shutil.copy(tmp_path / "B.TAR", tmp_path / "C.TAR")
    assert verify(tmp_path) == [f"{tmp_path / 'C.TAR'}: not part of this shard set"]


def test_two_tars_that_would_share_an_index_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("a.tar", "a.TAR")):
        write_tar(tmp_path / name, samples(number, 1))
    with pytest.raises(BadInput, match=r"a\.tar: its index would be that of .*a\.TAR; rename"):
        index_tars(tmp_path)


def test_a_linked_folder_is_refused_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "a.tar", samples(0, 2))
    write_tar(tmp_path / "elsewhere" / "b.tar", samples(2, 2))
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"set/more: a linked folder, which is not followed"):
        index_tars(tmp_path / "set")
    (tmp_path / "set" / "more").unlink()
    (tmp_path / "set" / "b.tar").symlink_to(tmp_path / "elsewhere" / "b.tar")
    assert index_tars(tmp_path / "set")["packed"] == 4  # a linked tar is read


def test_a_disk_that_fills_up_is_reported_and_the_command_goes_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 30))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    code = (
        "import sys, pathlib; from shards.pack.index_tars import index_tars; "
        "index_tars(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
        preexec_fn=limited, timeout=100,
    )  # fmt: skip
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"shards.storage.errors.Failed: {tmp_path}: no room left ("), (
        done.stderr
    )
    assert "the same command goes on" in message
    assert index_tars(tmp_path)["packed"] == 30
    assert verify(tmp_path) == []


def test_a_label_of_blanks_is_none(tmp_path: Path) -> None:
    files = [("a.txt", b"a"), ("a.json", b'{"label_group": " "}'), ("b.txt", b"b"),
            ("b.json", b'{"label_group": "\\t"}'), ("b.cls", b"7")]  # fmt: skip
    write_tar(tmp_path / "a.tar", files)
    index_tars(tmp_path)
    items = ShardSet(tmp_path).items
    assert items.label_group.tolist() == ["", "7"]
    assert items.split[0] == "unlabelled"
