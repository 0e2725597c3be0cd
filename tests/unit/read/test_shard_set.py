"""Reading a shard set by position, and the errors of one that is damaged."""

import copy
import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from shards.catalogue.split import SPLITS
from shards.read.shard_set import Item, ItemReader, ShardSet
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt, Failed, Unfinished, Unreadable
from shards.tar.index import MAGIC, read_index
from shards.tar.layout import KIND
from shards.tar.write import write_shard
from tests.support.damage import vouch_again


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path / "copy"))


def first_tar(shards: Path) -> Path:
    return shards / "train" / "000000.tar"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


# ── what is read


def test_every_position_is_the_row_of_packed(shard_set: Path) -> None:
    shards = ShardSet(shard_set)
    reader, packed = shards.reader(), shards.packed
    assert len(reader) == len(packed) == shards.manifest["counts"]["packed"] > 250
    for position, row in enumerate(packed.itertuples()):
        item = reader[position]
        assert (item.posting_id, item.title) == (row.posting_id, row.title)
        assert item.class_id == row.class_id
        assert (item.photo is not None) == row.has_image
        if item.photo is not None:
            assert Image.open(io.BytesIO(item.photo)).size == (row.width, row.height)


def test_packed_lies_by_split_shard_and_slot(shard_set: Path) -> None:
    packed = ShardSet(shard_set).packed
    places = [(SPLITS.index(r.split), r.shard, r.slot) for r in packed.itertuples()]
    assert places == sorted(places)
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("splits", [["train"], ["test", "val"], []])
def test_a_reader_over_some_splits(shard_set: Path, splits: list[str]) -> None:
    shards = ShardSet(shard_set)
    reader, packed = shards.reader(splits), shards.packed
    expected = [id_ for split in splits for id_ in packed.posting_id[packed.split == split]]
    assert [reader[p].posting_id for p in range(len(reader))] == expected


def test_positions_outside_and_unknown_splits_are_refused(shard_set: Path) -> None:
    shards = ShardSet(shard_set)
    reader = shards.reader()
    for position in (-1, len(reader), len(reader) + 5):
        with pytest.raises(IndexError):
            reader[position]
    with pytest.raises(BadInput, match="trian"):
        shards.reader(["trian"])


def test_photo_of_a_posting(shard_set: Path) -> None:
    shards = ShardSet(shard_set)
    reader, packed = shards.reader(), shards.packed
    for position in range(0, len(reader), 7):
        assert shards.photo(packed.posting_id[position]) == reader[position].photo
    assert shards.photo("no such posting") is None


def test_items_lie_in_the_catalogues_order(shard_set: Path) -> None:
    items = ShardSet(shard_set).items
    assert items.posting_id.tolist() == sorted(items.posting_id)


# ── copies in other processes


def read_some(reader: ItemReader) -> list[Item]:
    return [reader[position] for position in range(0, len(reader), 50)]


def test_a_pickled_copy_reads_the_same_and_carries_no_descriptor(shard_set: Path) -> None:
    reader = ShardSet(shard_set).reader()
    before = read_some(reader)
    for other in (pickle.loads(pickle.dumps(reader)), copy.copy(reader)):
        assert other._open == {}
        assert read_some(other) == before
        del other
    assert read_some(reader) == before


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_workers_read_the_same(shard_set: Path, method: str) -> None:
    reader = ShardSet(shard_set).reader()
    before = read_some(reader)  # descriptors are open when the workers start
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_some, [reader] * 4, chunksize=1) == [before] * 4
    assert read_some(reader) == before


def test_readers_that_are_gone_leave_no_descriptor_open(shard_set: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_some(ShardSet(shard_set).reader())
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# ── damage


@pytest.mark.parametrize("member", ["jpg", "json"])
def test_a_flipped_byte_in_a_member_names_tar_and_slot(copied: Path, member: str) -> None:
    tar = first_tar(copied)
    records = read_index(tar.with_suffix(".idx")).records
    sizes = records[f"{member}_size"]
    position = next(p for p in range(3, len(records)) if sizes[p] != 0xFFFFFFFF)
    flip(tar, int(records[f"{member}_at"][position]) + int(sizes[position]) // 2)
    reader = ShardSet(copied).reader(["train"])
    slot = records["slot"][position]
    with pytest.raises(Corrupt, match=rf"train/000000\.tar: slot {slot}, member {member}"):
        reader[position]
    reader[position - 1]  # its neighbours are whole
    reader[position + 1]


def test_a_truncated_a_longer_and_a_missing_tar_are_named(copied: Path) -> None:
    tar = first_tar(copied)
    whole = tar.read_bytes()
    for data in (whole[:-512], whole[: len(whole) // 2], b"", whole + bytes(512)):
        tar.write_bytes(data)
        with pytest.raises(Corrupt, match=r"train/000000\.tar: does not fit its index"):
            ShardSet(copied).reader()
    tar.unlink()
    with pytest.raises(Corrupt, match=r"train/000000\.tar: missing"):
        ShardSet(copied).reader()


def test_a_tar_truncated_while_it_is_read_is_named(copied: Path) -> None:
    reader = ShardSet(copied).reader(["train"])
    reader[0]
    with first_tar(copied).open("r+b") as file:
        file.truncate(1024)
    with pytest.raises(Corrupt, match=r"000000\.tar: slot"):
        reader[5]


@pytest.mark.parametrize("place", [0, 4, 9, 20, 200, -1, -4])
def test_a_flipped_byte_anywhere_in_an_index_is_named(copied: Path, place: int) -> None:
    flip(first_tar(copied).with_suffix(".idx"), place)
    with pytest.raises(Corrupt, match=r"train/000000\.idx"):
        ShardSet(copied).reader()


@pytest.mark.parametrize("keep", [0, 5, 11, 12, 15, 16, 40, 300])
def test_a_truncated_index_is_named(copied: Path, keep: int) -> None:
    index = first_tar(copied).with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:keep])
    with pytest.raises(Corrupt, match=r"train/000000\.idx"):
        ShardSet(copied).reader()


def test_a_missing_index_is_named(copied: Path) -> None:
    first_tar(copied).with_suffix(".idx").unlink()
    with pytest.raises(Corrupt, match=r"train/000000\.idx: missing"):
        ShardSet(copied).reader()


def test_the_index_of_another_tar_is_refused(copied: Path) -> None:
    shutil.copy(copied / "val" / "000000.idx", first_tar(copied).with_suffix(".idx"))
    with pytest.raises(Corrupt, match=r"train/000000\.idx: differs from the sha256"):
        ShardSet(copied).reader()
    vouch_again(copied)
    with pytest.raises(Corrupt, match=r"000000\.tar: does not fit its index"):
        ShardSet(copied).reader()


def test_a_tar_exchanged_for_another_with_its_index_is_refused(copied: Path) -> None:
    one, other, aside = (copied / "train" / f"{name}.tar" for name in ("000000", "000001", "x"))
    for kind in (".tar", ".idx"):
        one.with_suffix(kind).rename(aside.with_suffix(kind))
        other.with_suffix(kind).rename(one.with_suffix(kind))
        aside.with_suffix(kind).rename(other.with_suffix(kind))
    with pytest.raises(Corrupt, match=r"train/00000[01]\.idx: differs from the sha256"):
        ShardSet(copied).reader()


@pytest.mark.parametrize(
    "data",
    [
        b"{", b"\xff", b"[" * 100_000, b"[]", b"1", b"{}", b'{"posting_id": "a"}',
        b'{"posting_id": 1, "title": null}', b'{"posting_id": "a", "title": ["b"]}',
    ],
    ids=lambda data: data[:36],
)  # fmt: skip
def test_json_of_the_wrong_form_is_unreadable_and_names_tar_and_slot(
    tmp_path: Path, data: bytes
) -> None:
    tar = tmp_path / "train" / "000000.tar"
    good = b'{"posting_id": "a", "title": "b"}'
    samples = [(0, 0, {"json": good}), (3, 0, {"json": data})]
    stage_files.begin(tmp_path, KIND, {}, {})
    write_shard(tar, samples, before_mark=lambda: None)
    stage_files.finish(tmp_path, {}, [tar, tar.with_suffix(".idx")])
    reader = ShardSet(tmp_path).reader()
    assert reader[0] == Item("a", None, "b", 0)
    with pytest.raises(Unreadable, match=r"train/000000\.tar: slot 3, member json: holds no"):
        reader[1]


def test_a_disk_that_does_not_give_the_bytes_is_named_with_tar_and_slot(
    shard_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*where: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    reader = ShardSet(shard_set).reader(["train"])
    monkeypatch.setattr(os, "pread", broken)
    message = r"train/000000\.tar: slot 0, member \w+: cannot be read \(Input/output error\)"
    with pytest.raises(Failed, match=message):
        reader[0]


def test_an_index_of_a_later_version_is_refused(copied: Path) -> None:
    index = first_tar(copied).with_suffix(".idx")
    index.write_bytes(index.read_bytes().replace(MAGIC, b"DTSHARD2"))
    vouch_again(copied)
    with pytest.raises(Corrupt, match=r"000000\.idx: not a shard index of this version"):
        ShardSet(copied).reader()


# ── directories


def test_an_unfinished_set_is_refused(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    with pytest.raises(Unfinished, match=r"copy: unfinished .*run the same command again"):
        ShardSet(copied)


def test_other_directories_are_refused_by_kind(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a shard set directory"):
        ShardSet(tmp_path)
    with pytest.raises(BadInput, match="not a shard set directory"):
        ShardSet(tmp_path / "none")
    stage_files.begin(tmp_path / "run", "run", {}, {})
    with pytest.raises(BadInput, match="holds run, wanted shard set"):
        ShardSet(tmp_path / "run")


def test_a_set_of_another_format_is_refused(copied: Path) -> None:
    stage = json.loads((copied / "stage.json").read_text())
    (copied / "stage.json").write_text(json.dumps(stage | {"format": 2}))
    with pytest.raises(BadInput, match="format 2, this version reads 1"):
        ShardSet(copied)


@pytest.mark.parametrize("name", ["stage.json", "manifest.json"])
@pytest.mark.parametrize("content", ['{"format": 1', "", "[]", "{}"])
def test_broken_stage_files_are_refused_by_name(copied: Path, name: str, content: str) -> None:
    (copied / name).write_text(content)
    with pytest.raises(BadInput, match="copy"):
        ShardSet(copied).reader()


def test_a_set_may_be_moved(copied: Path, shard_set: Path, tmp_path: Path) -> None:
    moved = copied.rename(tmp_path / "moved")
    assert read_some(ShardSet(moved).reader()) == read_some(ShardSet(shard_set).reader())
    assert ShardSet(moved).fingerprint == ShardSet(shard_set).fingerprint
