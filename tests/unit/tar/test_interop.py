"""Our tars in the hands of other programs, and theirs in ours: the same order, keys and bytes."""

import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from shards.catalogue.split import split_of
from shards.pack.index_tars import index_tars
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.read.verify import verify
from shards.tar.scan import members
from tests.support.tars import photo

TRAIN = "train/*.tar"


def expected_of(shard_set: Path) -> dict[str, dict[str, bytes]]:
    """Key to suffix to bytes of the train split, as Python's tarfile reads them."""
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted(shard_set.glob(TRAIN)):
        with tarfile.open(tar) as opened:
            for info in opened:
                key, _, suffix = info.name.partition(".")
                file = opened.extractfile(info)
                assert file is not None
                found.setdefault(key, {})[suffix] = file.read()
    return found


# ── ours in theirs


def test_tarfile_and_the_reader_hold_the_same_bytes(shard_set: Path) -> None:
    expected, shards = expected_of(shard_set), ShardSet(shard_set)
    reader = shards.reader(["train"])
    assert len(reader) == len(expected) > 100
    for place, members_ in enumerate(expected.values()):
        item = reader[place]
        assert item.photo == members_.get("jpg")
        assert item.title == members_.get("txt", b"").decode()
        assert item.class_id == int(members_["cls"])
        assert item.posting_id == json.loads(members_["json"])["posting_id"]


def test_webdataset_reads_the_same_bytes_in_the_same_order(shard_set: Path) -> None:
    expected = expected_of(shard_set)
    urls = [str(tar) for tar in sorted(shard_set.glob(TRAIN))]
    found = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == list(expected)
    for sample in found:
        bytes_ = {name: data for name, data in sample.items() if not name.startswith("__")}
        assert bytes_ == expected[sample["__key__"]]


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_reads_the_same_bytes(
    shard_set: Path, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    expected = expected_of(shard_set)
    files = [str(tar) for tar in sorted(shard_set.glob(TRAIN))]
    rows = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", streaming=streaming,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    found = list(rows.cast_column("jpg", datasets.Image(decode=False)))
    assert [row["__key__"] for row in found] == list(expected)
    for row in found:
        members_ = expected[row["__key__"]]
        photo_ = row["jpg"]["bytes"] if row["jpg"] else None
        assert photo_ == members_.get("jpg")
        assert (row["txt"], row["cls"]) == (members_["txt"].decode(), int(members_["cls"]))
        assert row["json"] == json.loads(members_["json"])


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_reads_rows_with_other_members_when_given_their_types(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    label = next(str(n) for n in range(99) if split_of(str(n)) == "train")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(photo(0))
    kinds = ["a.jpg,a title", "a.jpg,", ",a title"]
    rows = [f"{n},{kinds[n % 3]},{label}" for n in range(40)]
    (tmp_path / "c.csv").write_text("\n".join(["posting_id,image,title,label_group", *rows]))
    pack(tmp_path / "c.csv", tmp_path / "images", tmp_path / "s", PackOptions(shard_items=8))
    tars = [str(tar) for tar in sorted((tmp_path / "s").glob(TRAIN))]
    expected = expected_of(tmp_path / "s")

    def rows_of(features: Any) -> list[dict[str, Any]]:
        return list(datasets.load_dataset(
            "webdataset", data_files={"train": tars}, split="train", streaming=streaming,
            features=features, cache_dir=str(tmp_path / "cache"),
        ))  # fmt: skip

    features = datasets.Features({
        "__key__": datasets.Value("string"), "__url__": datasets.Value("string"),
        "jpg": datasets.Image(decode=False), "json": datasets.Json(),
        "txt": datasets.Value("string"), "cls": datasets.Value("int64"),
    })  # fmt: skip
    with pytest.raises(ValueError, match="share the same prefix or the same types"):
        rows_of(None)
    found = rows_of(features)
    assert [row["__key__"] for row in found] == list(expected)
    for row in found:
        members_ = expected[row["__key__"]]
        assert (row["jpg"]["bytes"] if row["jpg"] else None) == members_.get("jpg")
        assert (row["txt"] or "") == members_.get("txt", b"").decode()
        assert (row["cls"], row["json"]) == (int(members_["cls"]), json.loads(members_["json"]))


def tar(*arguments: object) -> str:
    done = subprocess.run(
        ["tar", *map(str, arguments)], capture_output=True, text=True, check=False,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_gnu_tar_extracts_and_compares_every_byte(shard_set: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(shard_set.rglob("*.tar"))):
        out = tmp_path / str(number)
        out.mkdir()
        lines = tar("-tvf", path).splitlines()
        tar("-xf", path, "-C", out, "--same-permissions", "--no-same-owner")
        found = {file.name: file.read_bytes() for file in out.iterdir()}
        expected = {}
        with tarfile.open(path) as opened:
            for info in opened:
                file = opened.extractfile(info)
                assert file is not None
                expected[info.name] = file.read()
        assert found == expected
        assert len(lines) == len(expected)
        if os.getuid() == 0:  # the owner recorded, 0, is compared too
            assert tar("--compare", "-f", path, "-C", out) == ""


# ── theirs in ours


def theirs() -> Iterator[tuple[str, dict[str, Any]]]:
    for number in range(30):
        yield (
            f"sample{number:04d}",
            {"jpg": photo(number), "txt": f"Tas – ransel №{number}", "cls": number // 3},
        )


def assert_read_back(folder: Path, expected: dict[str, tuple[bytes | None, str, str]]) -> None:
    """posting_id to photo, title and label group, by position, by id, and all of it whole."""
    shards = ShardSet(folder)
    reader, packed = shards.reader(), shards.packed
    found = {}
    for place, row in enumerate(packed.itertuples()):
        item = reader[place]
        assert (item.posting_id, item.title) == (row.posting_id, row.title)
        found[item.posting_id] = (item.photo, item.title, row.label_group)
        assert shards.photo(row.posting_id) == item.photo
    assert found == expected
    assert verify(folder) == []


def test_tars_of_webdatasets_own_writer(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "x-%04d.tar"), maxcount=12, verbose=0) as out:
        for key, facts in theirs():
            out.write({"__key__": key} | facts)
    index_tars(tmp_path)
    assert len(list(tmp_path.glob("*.idx"))) == 3
    assert_read_back(
        tmp_path, {key: (f["jpg"], f["txt"], str(f["cls"])) for key, f in theirs()}
    )  # fmt: skip


LONG = {
    "short": "k", "folders": "d/" * 40 + "k", "long": "n" * 150,
    "both": "d" * 90 + "/" + "k" * 130, "marks": "beg–中文 ü", "quotes": "it's \"quoted\" \\n",
}  # fmt: skip


@pytest.mark.parametrize("form", ["ustar", "posix", "gnu", "oldgnu", "v7"])
def test_tars_of_gnu_tar(tmp_path: Path, form: str) -> None:
    source, expected = tmp_path / "source", {}
    for number, (name, stem) in enumerate(LONG.items()):
        if form in ("ustar", "v7") and name not in ("short", "folders", "quotes"):
            continue  # those formats have no room for the others
        for suffix, data in (("jpg", photo(number)), ("txt", f"title {number}".encode())):
            file = source / f"{stem}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        expected[f"./{stem}"] = (photo(number), f"title {number}", "")
    (tmp_path / "t").mkdir()
    tar("-C", source, f"--format={form}", "--sort=name", "-cf", tmp_path / "t" / "0.tar", ".")
    index_tars(tmp_path / "t")
    assert_read_back(tmp_path / "t", expected)
    keys = [s["__key__"] for s in wds.WebDataset(str(tmp_path / "t" / "0.tar"), shardshuffle=False)]
    assert sorted(keys) == sorted(expected)  # the key rule is webdataset's


def test_the_layout_of_img2dataset(tmp_path: Path) -> None:
    expected = {}
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as out:
            for number in range(5):
                key = f"{shard:05d}{number:04d}"
                caption = f"caption {number}"
                facts = {"url": "http://x/y.jpg", "caption": caption, "key": key, "status":
                         "success", "error_message": None, "width": 40, "exif": "{}"}  # fmt: skip
                sample = {"__key__": key, "jpg": photo(number), "json": json.dumps(facts).encode()}
                out.write(sample | ({"txt": caption} if number % 2 else {}))
                expected[key] = (photo(number), caption, "")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"of another program")
    index_tars(tmp_path)
    assert_read_back(tmp_path, expected)
    assert (tmp_path / "00000.parquet").read_bytes() == b"of another program"


def test_a_tar_of_more_than_8_gib_is_read_by_its_base_256_size(tmp_path: Path) -> None:
    # Sparse on disk: only its headers and the last item take room.
    size = 9 << 30
    try:
        with (tmp_path / "0.tar").open("wb") as file:
            big = tarfile.TarInfo("a.npy")
            big.size = size
            file.write(big.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, os.SEEK_CUR)
            small = tarfile.TarInfo("a.txt")
            small.size = 5
            file.write(small.tobuf() + b"title".ljust(512, b"\0") + bytes(1024))
    except OSError as error:
        pytest.skip(f"no room for a sparse file: {error}")
    found = [(member.name, member.at, member.size) for member in members(tmp_path / "0.tar")]
    assert found == [("a.npy", 512, size), ("a.txt", size + 1024, 5)]
    (tmp_path / "0.tar").unlink()
