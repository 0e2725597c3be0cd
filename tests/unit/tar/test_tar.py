"""The tars as others see them: webdataset, GNU tar, tarfile."""

import io
import json
import re
import subprocess
import tarfile
import zlib
from hashlib import sha256
from pathlib import Path

import pytest
import webdataset as wds

from shards.catalogue.split import SPLITS
from shards.read.shard_set import ShardSet
from shards.storage.errors import Corrupt
from shards.tar.index import ABSENT, MEMBERS, parse_index, read_index
from shards.tar.write import check_members, write_shard


def tars_of(shard_set: Path, split: str = "*") -> list[Path]:
    return sorted(shard_set.glob(f"{split}/*.tar"))


def key_of(shard: int, slot: int) -> str:
    return f"{shard:06d}_{slot:06d}"


def test_keys_are_ascii_without_a_dot_and_sort_as_the_slots(tmp_path: Path) -> None:
    keys = []
    for shard in (0, 1, 10):
        tar = tmp_path / f"{shard:06d}.tar"
        write_shard(tar, [(slot, 0, {"cls": b"0"}) for slot in (0, 1, 9, 10, 4999)], lambda: None)
        with tarfile.open(tar) as opened:
            keys += [name.removesuffix(".cls") for name in opened.getnames()]
    assert keys[0] == "000000_000000"
    assert keys[-1] == key_of(10, 4999) == "000010_004999"
    assert len(keys) == 15
    assert keys == sorted(keys)


@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_reads_every_item_of_a_split(shard_set: Path, split: str) -> None:
    tars = tars_of(shard_set, split)
    items = ShardSet(shard_set).packed
    items = items[items.split == split]
    if not len(items):
        assert not tars
        return
    urls = [str(tar) for tar in tars]
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [
        key_of(shard, slot) for shard, slot in zip(items.shard, items.slot, strict=True)
    ]
    for sample, item in zip(samples, items.itertuples(), strict=True):
        about = json.loads(sample["json"])
        assert about["posting_id"] == item.posting_id
        assert about["label_group"] == item.label_group
        assert ("jpg" in sample, "txt" in sample) == (item.has_image, item.has_text)
        assert sample.get("txt", b"").decode() == (item.title if item.has_text else "")
        assert sample.get("cls") == (str(item.class_id).encode() if split == "train" else None)


def test_webdataset_decodes_the_members(shard_set: Path) -> None:
    urls = [str(tar) for tar in tars_of(shard_set, "train")]
    sample = next(iter(wds.WebDataset(urls, shardshuffle=False).decode("pil")))
    row = ShardSet(shard_set).packed.iloc[0]
    assert sample["jpg"].size == (row.width, row.height)
    assert (sample["cls"], sample["txt"]) == (row.class_id, row.title)
    assert sample["json"]["posting_id"] == row.posting_id


def test_gnu_tar_and_tarfile_list_the_same_members(shard_set: Path) -> None:
    for tar in tars_of(shard_set):
        listed = subprocess.run(["tar", "-tf", tar], capture_output=True, text=True, check=True)
        assert listed.stderr == ""
        with tarfile.open(tar) as opened:
            assert opened.getnames() == listed.stdout.splitlines()
        for name in listed.stdout.splitlines():
            assert re.fullmatch(rf"{tar.stem}_\d{{6}}\.(jpg|json|txt|cls)", name)


def test_headers_are_plain_ustar_and_tell_nothing_of_the_machine(shard_set: Path) -> None:
    for tar in tars_of(shard_set):
        data = tar.read_bytes()
        with tarfile.open(tar) as opened:
            for info in opened:
                header = data[info.offset : info.offset + 512]
                assert header[257:265] == b"ustar\x0000"
                assert header[156:157] == b"0"
                assert info.offset_data == info.offset + 512  # no extended header
                owner = (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode)
                assert owner == (0, 0, 0, "", "", 0o644)
        assert len(data) % 10_240 == 0
        assert data[-1024:] == bytes(1024)


def test_the_index_says_where_every_member_lies(shard_set: Path) -> None:
    for tar in tars_of(shard_set):
        index, data = read_index(tar.with_suffix(".idx")), tar.read_bytes()
        with tarfile.open(tar) as opened:
            found = {info.name: data[info.offset_data :][: info.size] for info in opened}
        named = {}
        for record in index.records:
            for member in MEMBERS:
                if record[f"{member}_size"] != ABSENT:
                    at, size = int(record[f"{member}_at"]), int(record[f"{member}_size"])
                    key = key_of(int(tar.stem), int(record["slot"]))
                    named[f"{key}.{member}"] = data[at : at + size]
        assert named == found
        assert index.header["items"] == len(index.records)
        assert index.header["tar_bytes"] == len(data)


# ── by hand


SAMPLES = [
    (3, 7, {"jpg": b"\xff" * 700, "json": b"{}", "txt": b"t" * 512, "cls": b"7"}),
    (4, -1, {"json": b'{"a": 1}'}),
    (9, -1, {"txt": b"\xc3\xa9", "json": b""}),
]


def test_a_shard_is_what_tarfile_writes_and_the_index_tells_it(tmp_path: Path) -> None:
    marks: list[bool] = []
    tar = tmp_path / "000012.tar"
    write_shard(tar, SAMPLES, lambda: marks.append(tar.with_suffix(".idx").exists()))
    assert marks == [False]
    theirs = io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as opened:
        for slot, _, members in SAMPLES:
            for name in ("jpg", "json", "txt", "cls"):
                if name in members:
                    info = tarfile.TarInfo(f"000012_{slot:06d}.{name}")
                    info.size = len(members[name])
                    opened.addfile(info, io.BytesIO(members[name]))
    assert tar.read_bytes() == theirs.getvalue()
    index = read_index(tar.with_suffix(".idx"))
    assert index.header == {
        "tar_bytes": len(theirs.getvalue()), "tar_sha256": sha256(theirs.getvalue()).hexdigest(),
        "members": ["jpg", "json", "txt", "cls"], "items": 3,
    }  # fmt: skip
    assert index.records["slot"].tolist() == [3, 4, 9]
    assert index.records["class_id"].tolist() == [7, -1, -1]
    for record, (_, _, members) in zip(index.records, SAMPLES, strict=True):
        for name in MEMBERS:
            at, size, crc = (int(record[f"{name}_{field}"]) for field in ("at", "size", "crc"))
            if name not in members:
                assert (at, size, crc) == (0, ABSENT, 0)
                continue
            assert (tar.read_bytes()[at : at + size], crc) == (
                members[name], zlib.crc32(members[name]),
            )  # fmt: skip


@pytest.mark.parametrize("harm", ["crc", "size", "at"])
def test_a_member_that_differs_from_its_record_is_named(tmp_path: Path, harm: str) -> None:
    tar = tmp_path / "000012.tar"
    write_shard(tar, SAMPLES, lambda: None)
    records = read_index(tar.with_suffix(".idx")).records.copy()
    check_members(tar, records)
    records[f"json_{harm}"][1] += 10**6 if harm == "at" else 1
    with pytest.raises(Corrupt, match=r"000012\.tar: slot 4, member json: bytes differ"):
        check_members(tar, records)


def test_an_index_that_is_cut_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "000012.tar"
    write_shard(path, SAMPLES, lambda: None)
    index = path.with_suffix(".idx")
    whole = index.read_bytes()
    assert whole[:8] == b"DTSHARD1"
    for length in range(len(whole)):
        with pytest.raises(Corrupt, match=r"000012\.idx: "):
            parse_index(whole[:length], str(index))
    for data in (b"DTSHARD2" + whole[8:], whole + b"\0", whole[:-1] + bytes([whole[-1] ^ 1])):
        with pytest.raises(Corrupt, match=r"000012\.idx: "):
            parse_index(data, str(index))
    index.unlink()
    with pytest.raises(Corrupt, match=r"000012\.idx: missing; pack again or restore it"):
        read_index(index)
