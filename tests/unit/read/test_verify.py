"""Every damaged byte of a shard set is reported, and a whole set is not."""

import json
import random
import shutil
from pathlib import Path

import pytest

from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.verify import verify
from shards.storage import stage_files
from shards.storage.errors import BadInput, Unfinished


@pytest.fixture(scope="module")
def few(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shard set, since its every byte is read for every trial."""
    folder = tmp_path_factory.mktemp("few")
    lines = (catalogue / "catalogue.csv").read_text().splitlines(keepends=True)
    (folder / "c.csv").write_text("".join(lines[:41]))
    pack(folder / "c.csv", catalogue / "images", folder / "s", PackOptions(size=16, shard_items=8))
    return folder / "s"


@pytest.fixture
def copied(few: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(few, tmp_path / "copy"))


def data_files(shards: Path) -> list[Path]:
    return sorted(p for p in shards.rglob("*") if p.suffix in (".tar", ".idx", ".parquet"))


def test_a_whole_set_has_no_fault(few: Path, shard_set: Path) -> None:
    assert verify(few) == []
    assert verify(shard_set) == []


@pytest.mark.parametrize("kind", [".tar", ".idx", ".parquet"])
@pytest.mark.parametrize("trials", [15, pytest.param(1000, marks=pytest.mark.full)])
def test_any_flipped_bit_is_reported(copied: Path, kind: str, trials: int) -> None:
    draw = random.Random(f"{kind} {trials}")
    files = [path for path in data_files(copied) if path.suffix == kind]
    for _ in range(trials):
        file = draw.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        place = draw.randrange(len(whole))
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        faults = verify(copied)
        assert len(faults) == 1, (file, place)
        assert str(file) in faults[0]
        file.write_bytes(whole)
    assert verify(copied) == []


def test_a_damaged_member_is_named_by_slot(copied: Path) -> None:
    tar = copied / "train" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[512] ^= 1  # the first byte of the first member
    tar.write_bytes(data)
    assert "slot 0, member " in verify(copied)[0]
    data[512] ^= 1
    data[100] ^= 1  # the mode in the first header
    tar.write_bytes(data)
    assert "byte 0: no tar header, or a damaged one" in verify(copied)[0]
    data[100] ^= 1
    data[-1] ^= 1  # the padding at the end
    tar.write_bytes(data)
    assert f"byte {len(data) - 1} holds data" in verify(copied)[0]


def test_truncation_is_reported_with_sizes(copied: Path) -> None:
    for file in data_files(copied):
        whole = file.read_bytes()
        for length in (len(whole) - 1, len(whole) // 2, 0):
            file.write_bytes(whole[:length])
            assert verify(copied) == [f"{file}: {length} bytes, packed with {len(whole)}"]
        file.write_bytes(whole)


def test_every_missing_file_is_reported(copied: Path) -> None:
    for file in data_files(copied):
        aside = file.rename(file.with_name("aside"))
        assert verify(copied) == [f"{file}: missing"]
        aside.rename(file)


def test_extra_shards_are_reported(copied: Path) -> None:
    for name in ("train/000099.tar", "val/copy of 000000.tar", "other/000000.tar"):
        extra = copied / name
        extra.parent.mkdir(exist_ok=True)
        shutil.copy(copied / "train" / "000000.tar", extra)
        faults = verify(copied)
        assert len(faults) == 1
        assert str(extra) in faults[0]
        extra.unlink()


def test_an_extra_index_is_reported(copied: Path) -> None:
    extra = copied / "train" / "000099.idx"
    shutil.copy(copied / "train" / "000000.idx", extra)
    assert [str(extra) in fault for fault in verify(copied)] == [True]


def test_several_faults_are_all_reported(copied: Path) -> None:
    tar, index, *_, table = data_files(copied)[::-1]
    table.unlink()
    index.write_bytes(b"")
    tar.write_bytes(tar.read_bytes()[::-1])
    faults = "\n".join(verify(copied))
    assert all(str(path) in faults for path in (table, index, tar))


def test_exchanged_shards_are_reported(copied: Path) -> None:
    one, other = copied / "train" / "000000.tar", copied / "train" / "000001.tar"
    aside = one.rename(one.with_name("aside"))
    other.rename(one)
    aside.rename(other)
    assert len(verify(copied)) == 2


def test_a_tar_that_had_changed_before_the_seal_is_reported(copied: Path) -> None:
    tar = copied / "train" / "000000.tar"
    flipped = bytearray(tar.read_bytes())
    flipped[600] ^= 4
    tar.write_bytes(flipped)
    seal_anew(copied)
    message = "had changed before the set was sealed (its index differs); pack again"
    assert verify(copied) == [f"{tar}: {message}"]


def seal_anew(shards: Path) -> None:
    """As if all that lies there had just been packed."""
    manifest = json.loads((shards / stage_files.MANIFEST).read_text())
    files = [shards / name for name in manifest["files"]]
    stage_files.finish(shards, manifest["counts"], files)


def test_what_is_no_finished_shard_set_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "manifest.json").unlink()
    with pytest.raises(Unfinished):
        verify(copied)
    stage_files.begin(tmp_path / "run", "run", {}, {})
    for path in (tmp_path / "run", tmp_path / "none"):
        with pytest.raises(BadInput, match=str(path)):
            verify(path)
