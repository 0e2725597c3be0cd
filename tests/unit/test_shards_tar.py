"""The tars as others see them: webdataset, GNU tar, tarfile."""

import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from shards.index import ABSENT, MEMBERS, read_index
from shards.reader import ShardSet
from shards.split import SPLITS
from shards.tar import key_of


def tars_of(shard_set: Path, split: str = "*") -> list[Path]:
    return sorted(shard_set.glob(f"{split}/*.tar"))


def test_keys_are_ascii_without_a_dot_and_sort_as_the_slots() -> None:
    assert key_of(0, 123) == "000000_000123"
    keys = [key_of(shard, slot) for shard in (0, 1, 10) for slot in (0, 1, 9, 10, 4999)]
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
                told = (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode)
                assert told == (0, 0, 0, "", "", 0o644)
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
