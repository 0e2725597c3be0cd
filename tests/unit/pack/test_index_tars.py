"""Tars of other programs as a shard set: its items.parquet, what is refused, what is left."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from shards.catalogue.split import SPLITS, split_of
from shards.pack.index_tars import index_tars
from shards.pack.items import describe_remarks
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.read.verify import verify
from shards.storage.errors import BadInput, Corrupt
from shards.tar.index import read_index
from tests.support.tars import photo, samples, write_tar


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of 20 items of 20 labels."""
    write_tar(tmp_path / "tars" / "00000.tar", samples(0, 20))
    write_tar(tmp_path / "tars" / "deeper" / "00001.tar", samples(20, 20))
    return tmp_path / "tars"


def listing(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def about(**facts: object) -> bytes:
    return json.dumps(facts).encode()


# ── the result


def test_every_item_is_read_back_equal(tars: Path) -> None:
    counts = index_tars(tars)
    shards = ShardSet(tars)
    reader, packed = shards.reader(), shards.packed
    assert counts["packed"] == len(reader) == len(packed) == 40
    assert (counts["indexed_tars"], counts["rejected"]) == (2, 0)
    assert sorted(packed.posting_id) == [f"{number:09d}" for number in range(40)]
    for position, row in enumerate(packed.itertuples()):
        item, number = reader[position], int(row.posting_id)
        assert (item.posting_id, item.title) == (row.posting_id, f"title {number}")
        assert item.photo == shards.photo(row.posting_id) == photo(number)
        assert (row.label_group, row.width, row.height) == (str(number // 2), 40, 30)
        assert row.split == split_of(row.label_group)
        assert item.class_id == row.class_id
        assert (row.class_id >= 0) == (row.split == "train")
    trained = packed[packed.split == "train"]
    assert sorted(set(trained.class_id)) == list(range(trained.label_group.nunique()))
    assert trained.groupby("label_group").class_id.nunique().max() == 1
    assert verify(tars) == []


def test_splits_are_read_alone_though_a_tar_holds_several(tars: Path) -> None:
    index_tars(tars)
    shards = ShardSet(tars)
    packed = shards.packed
    assert packed[packed.tar == "00000.tar"].split.nunique() > 1
    for splits in (["test"], ["val", "train"], SPLITS, []):
        reader = shards.reader(splits)
        expected = [id_ for split in splits for id_ in packed.posting_id[packed.split == split]]
        assert [reader[place].posting_id for place in range(len(reader))] == expected


def test_the_index_of_bare_tars_gives_the_set_that_was_packed(
    shard_set: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(shard_set, bare, ignore=shutil.ignore_patterns("*.idx", "*.json", "*.parquet"))
    before = listing(bare)
    index_tars(bare)
    assert {path: path.read_bytes() for path in before} == before
    old, new = ShardSet(shard_set), ShardSet(bare)
    ours, theirs = old.reader(), new.reader()
    assert len(ours) == len(theirs) > 250
    assert [ours[p] for p in range(len(ours))] == [theirs[p] for p in range(len(ours))]
    same = ["posting_id", "title", "label_group", "split", "class_id", "shard", "slot", "width",
            "height", "has_image", "has_text", "status"]  # fmt: skip
    within = [column for column in same if column != "shard"]  # numbered within a split there
    assert old.packed[within].equals(new.packed[within])
    for split in SPLITS:
        count = len(old.reader([split]))
        assert count == len(new.reader([split])) == new.manifest["counts"]["items"][split]


def test_tars_in_folders_of_splits_stay_there(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        write_tar(tmp_path / split / "a" / "0.tar", samples(10 * number, 10))
    write_tar(tmp_path / "train" / "1.tar", [("free.txt", b"without a label")])
    counts = index_tars(tmp_path)
    packed = ShardSet(tmp_path).packed.set_index("posting_id")
    for number in range(30):
        assert packed.split[f"{number:09d}"] == ("train", "val", "test")[number // 10]
    assert packed.split["free"] == "unlabelled"
    assert counts["items"] == {"train": 10, "val": 10, "test": 10, "unlabelled": 1}
    # The tars' own numbers of the products of train are kept.
    assert [packed.class_id[f"{n:09d}"] for n in range(10)] == [n // 2 for n in range(10)]
    assert counts["products_in_several_splits"] == 0


def test_products_in_several_splits_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", samples(0, 6))
    write_tar(tmp_path / "test" / "0.tar", [("x.txt", b"t"), ("x.cls", b"0")])
    assert index_tars(tmp_path)["products_in_several_splits"] == 1


def test_json_tells_what_it_can(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        [
            ("a.json", about(posting_id="A", title="json", label_group="g", caption="c")),
            ("a.txt", b"text"),
            ("b.json", about(posting_id=17, caption="caption", label_group=3.0)),
            ("c.json", about(title=" ", label_group=None)),
            ("c.txt", b"text"),
            ("c.cls", b" 5\n"),
            ("d.json", about(posting_id="D", title="half \ud800 of a pair")),
        ],
    )
    index_tars(tmp_path)
    items = ShardSet(tmp_path).items
    assert items.posting_id.tolist() == ["A", "17", "c", "D"]
    assert items.title.tolist() == ["json", "caption", "text", "half ? of a pair"]
    assert items.label_group.tolist() == ["g", "3", "5", ""]
    reader = ShardSet(tmp_path).reader()
    items_read = {reader[p].posting_id: (reader[p].title, reader[p].photo) for p in range(4)}
    assert items_read == {i: (t, None) for i, t in zip(items.posting_id, items.title, strict=True)}


def test_columns_name_other_keys_of_json(tmp_path: Path) -> None:
    facts = {"sku": 7, "name": "its name", "product": "p", "title": "no", "label_group": "no"}
    write_tar(tmp_path / "0.tar", [("a.json", about(**facts)), ("a.txt", b"text")])
    columns = {"posting_id": "sku", "title": "name", "label_group": "product"}
    index_tars(tmp_path, columns)
    row = ShardSet(tmp_path).items.iloc[0]
    assert (row.posting_id, row.title, row.label_group) == ("7", "its name", "p")
    with pytest.raises(BadInput, match="photo: there are posting_id, title, label_group"):
        index_tars(tmp_path, {"photo": "x"})


@pytest.mark.parametrize(
    ("facts", "columns", "message"),
    [
        ({"title": ["one", "two"]}, {}, "title of its json is no text"),
        ({"label_group": {"a": 1}}, {}, "label_group of its json is no text"),
        ({"posting_id": 1}, {"posting_id": "sku"}, "its json has no sku"),
    ],
)
def test_json_that_does_not_tell_is_refused(
    tmp_path: Path, facts: dict, columns: dict, message: str
) -> None:
    whole = about(sku=1, title="t")
    write_tar(tmp_path / "0.tar", [("a.json", whole), ("b.json", about(**facts)), ("b.txt", b"t")])
    with pytest.raises(BadInput, match=rf"0\.tar: byte 1024: item 'b': {message}"):
        index_tars(tmp_path, columns)
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_photos_of_every_kind_stay_as_they_are(tmp_path: Path) -> None:
    kinds = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF",
             "bmp": "BMP", "tif": "TIFF"}  # fmt: skip
    photos = {f"k{n}.{suffix}": photo(n, kind) for n, (suffix, kind) in enumerate(kinds.items())}
    write_tar(tmp_path / "0.tar", photos.items())
    index_tars(tmp_path)
    shards = ShardSet(tmp_path)
    assert dict(zip(shards.items.image, map(shards.photo, shards.items.posting_id))) == photos  # noqa: B905
    assert (shards.items.width == 40).all()
    assert (shards.items.sha256.str.len() == 64).all()
    assert shards.items.phash.nunique() == len(photos)


def test_broken_photos_and_empty_items_are_reported_and_counted(tmp_path: Path) -> None:
    whole = photo(1)
    write_tar(
        tmp_path / "0.tar",
        [("a.jpg", whole[:300]), ("a.txt", b"title"), ("b.jpg", b"no photo"), ("c.txt", b"  "),
         ("d.txt", b"\xff\xfe"), ("e.jpg", whole), ("f.txt", b"x" * 5000)],
    )  # fmt: skip
    counts = index_tars(tmp_path)
    items = ShardSet(tmp_path).items.set_index("posting_id")
    assert (counts["packed"], counts["rejected"], counts["photos"]) == (4, 2, 1)
    assert items.reason["a"].startswith("photo a.jpg: not a readable photo")
    assert (items.status["a"], items.has_image["a"], items.title["a"]) == ("packed", False, "title")
    assert items.status[["b", "c"]].tolist() == ["rejected"] * 2
    assert items.reason["c"] == "neither a photo nor a title"
    assert "not UTF-8" in items.reason["d"]
    assert items.reason["e"] == ""
    assert (len(items.title["f"]), items.reason["f"]) == (4096, "title of 5000 characters cut")
    shards = ShardSet(tmp_path)
    assert [shards.photo(id_) for id_ in "aef"] == [None, whole, None]


def test_keys_that_return_in_another_tar_get_its_name(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        write_tar(tmp_path / f"{name}.tar", samples(0, 2))
    index_tars(tmp_path)
    ids = ShardSet(tmp_path).items.posting_id.tolist()
    assert ids == ["a/000000000", "a/000000001", "b/c/000000000", "b/c/000000001"]


def test_double_posting_ids_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.json", about(posting_id=1, title="t"))])
    with pytest.raises(BadInput, match=r"b\.tar: item 'b' has the posting_id '1' of 'a' in a\.tar"):
        index_tars(tmp_path)


# ── what is refused, and leaves nothing


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.cls", b"3")], "'a.cls' stands apart .*--sort=name"),
        ([("a.txt", b"1"), ("a.txt", b"2")], "'a.txt' is there twice, before at byte 1024, "),
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")], "'a.txt' is there twice.*--append"),
        ([("a.jpg", b"1"), ("a.JPG", b"2")], "'a.JPG' beside 'a.jpg'.*--leave a.JPG"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "'a.png' beside 'a.jpg'.*--leave"),
        ([("sku.1.jpg", b"1"), ("sku.2.jpg", b"2")], "'sku.1.jpg' is of an unknown.*first dot"),
        ([("a.txt", b"1"), ("a.npy", b"2")], "'a.npy' is of an unknown kind.*--leave npy"),
        ([("README", b"1")], "'README' has no name before a suffix.*--leave README"),
        ([("a.json", b"{")], "item 'a': json cannot be read"),
        ([("a.json", b"[1]")], "item 'a': json is no object"),
        ([], "holds no item"),
    ],
)  # fmt: skip
def test_members_that_make_no_items_are_refused(
    tmp_path: Path, files: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "0.tar", [("0.txt", b"whole")] * bool(files) + files)
    write_tar(tmp_path / "1.tar", samples(0, 1))
    before = listing(tmp_path)
    with pytest.raises(Corrupt, match=rf"0\.tar: .*{message}"):
        index_tars(tmp_path)
    assert listing(tmp_path) == before


def test_members_that_are_named_are_left_unread(tmp_path: Path) -> None:
    files = [("README", b"x"), ("a.txt", b"t"), ("a.depth.png", b"x"), ("a.npy", b"x"),
             ("b.npy", b"x")]  # fmt: skip
    write_tar(tmp_path / "0.tar", files)
    counts = index_tars(tmp_path, leave=["npy", "depth.png", "README"])
    assert ShardSet(tmp_path).items.posting_id.tolist() == ["a"]
    assert counts["postings"] == 1


@pytest.mark.parametrize(
    "leave", [["*.npy", "READ*"], [".npy", "readme"], ["NPY", "README"], ["[bn]*y", "README"]]
)
def test_members_are_left_by_patterns_too(tmp_path: Path, leave: list[str]) -> None:
    write_tar(tmp_path / "0.tar", [("x/README", b"x"), ("a.txt", b"t"), ("b/a.npy", b"x")])
    assert index_tars(tmp_path, leave=leave)["postings"] == 1


def test_what_macos_and_windows_add_is_left_unread(tmp_path: Path) -> None:
    files = [("._x", b"m"), (".DS_Store", b"m"), ("Thumbs.db", b"m"), ("__MACOSX/a/._0.jpg", b"m")]
    for name, data in samples(0, 3):
        files += [(f"a/._{name}", b"\0\5\x16\7"), (f"a/{name}", data)]
    write_tar(tmp_path / "0.tar", [*files, ("a/.DS_Store", b"m")])
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    counts = index_tars(tmp_path)
    assert (counts["postings"], counts["photos"], counts["with_reason"]) == (3, 3, 0)


@pytest.mark.parametrize(
    ("kind", "option"),
    [(tarfile.SYMTYPE, "--dereference"), (tarfile.LNKTYPE, "--hard-dereference")],
)
def test_links_are_refused_with_the_option_of_tar(tmp_path: Path, kind: bytes, option: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "b.jpg"
        tar.addfile(info)
    with pytest.raises(Corrupt, match=f"'a.jpg' is a .* link; make the tar with {option};"):
        index_tars(tmp_path)


def test_tars_without_a_photo_that_can_be_used_are_refused_with_the_reasons(
    tmp_path: Path,
) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    files = [(f"{n}.heic", heic) for n in range(5)] + [("5.jpg", b"x"), ("6.txt", b"title")]
    write_tar(tmp_path / "0.tar", files)
    before = listing(tmp_path)
    with pytest.raises(BadInput, match=r"not one of its 6 photos .*5 × .*0\.tar: item '0': .*1 ×"):
        index_tars(tmp_path)
    assert listing(tmp_path) == before
    write_tar(tmp_path / "0.tar", [*files, ("7.jpg", photo(7))])
    assert index_tars(tmp_path)["photos"] == 1


def test_every_remark_is_a_row_of_remarks_csv(tmp_path: Path) -> None:
    files = [("a.jpg", b"no photo"), ("a.txt", b"\xff"), ("b.jpg", b""), ("c.txt", b"t" * 5000)]
    write_tar(tmp_path / "0.tar", files)
    index_tars(tmp_path)
    found = pd.read_csv(tmp_path / "remarks.csv")
    assert list(found.columns) == ["posting_id", "status", "kind", "remark"]
    assert found.kind.tolist() == [
        "photo: unknown kind of photo", "text that is not UTF-8",
        "photo: file of zero bytes", "title cut",
    ]  # fmt: skip
    assert found.posting_id.tolist() == list("aabc")
    assert found.status.tolist() == ["packed", "packed", "rejected", "packed"]
    reasons = ShardSet(tmp_path).items.set_index("posting_id").reason
    assert found.groupby("posting_id").remark.agg("; ".join).to_dict() == reasons.to_dict()
    lines = describe_remarks(tmp_path)
    assert len(lines) == 4
    assert any(re.match(r"1 × photo: file of zero bytes, for example b: photo", x) for x in lines)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_damaged_tar_among_many_leaves_nothing(tars: Path, workers: int) -> None:
    data = bytearray((tars / "deeper" / "00001.tar").read_bytes())
    data[3 * 2048 + 100] ^= 1
    (tars / "deeper" / "00001.tar").write_bytes(data)
    before = listing(tars)
    with pytest.raises(Corrupt, match=r"deeper/00001\.tar: byte \d+: "):
        index_tars(tars, workers=workers)
    assert listing(tars) == before


def test_folders_that_cannot_be_indexed_are_refused(tmp_path: Path, shard_set: Path) -> None:
    with pytest.raises(BadInput, match=r"none: no such folder"):
        index_tars(tmp_path / "none")
    with pytest.raises(BadInput, match=r"no \.tar in it"):
        index_tars(tmp_path)
    tar = write_tar(tmp_path / "one" / "0.tar", samples(0, 1))
    with pytest.raises(BadInput, match=r"0\.tar: a file; .* dist-train index-tars .*/one \("):
        index_tars(tar)
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(BadInput, match="made by another verb"):
        index_tars(shard_set)
    assert verify(shard_set) == []
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(Corrupt, match=r"x\.tar\.gz: a compressed tar"):
        index_tars(tmp_path)
    (tmp_path / "x.tar.gz").unlink()
    write_tar(tmp_path / "train" / "a.tar", samples(0, 1))
    write_tar(tmp_path / "other" / "b.tar", samples(1, 1))
    with pytest.raises(BadInput, match=r"other/b\.tar: in none of the folders"):
        index_tars(tmp_path)
    shutil.rmtree(tmp_path / "other")
    for name in ("train/a.idx", "items.parquet", "remarks.csv"):
        (tmp_path / name).write_text("of another program")
        with pytest.raises(BadInput, match=f"{name}: .*in the way.*move it away"):
            index_tars(tmp_path)
        (tmp_path / name).unlink()
    index_tars(tmp_path)


def test_a_pack_does_not_overwrite_an_indexed_folder(tars: Path, tmp_path: Path) -> None:
    index_tars(tars)
    before = listing(tars)
    (tmp_path / "c.csv").write_text("posting_id,title\n1,one\n")
    with pytest.raises(BadInput, match="already holds"):
        pack(tmp_path / "c.csv", None, tars, PackOptions())
    assert listing(tars) == before


# ── again


def test_again_on_the_same_tars_changes_nothing(tars: Path) -> None:
    counts = index_tars(tars, workers=2)
    before = {path: path.stat().st_mtime_ns for path in tars.rglob("*")}
    assert index_tars(tars) == counts
    assert {path: path.stat().st_mtime_ns for path in tars.rglob("*")} == before


def test_again_on_other_tars_says_what_changed(tars: Path) -> None:
    index_tars(tars)
    fingerprint = ShardSet(tars).fingerprint
    write_tar(tars / "new.tar", samples(90, 1))
    write_tar(tars / "00000.tar", samples(0, 19))
    with pytest.raises(BadInput) as refused:
        index_tars(tars)
    message = str(refused.value)
    assert f"{tars / 'new.tar'}: new" in message
    assert f"{tars / '00000.tar'}: " in message
    assert "00001.tar" not in message
    assert "to index it anew remove" in message
    for name in ("stage.json", "manifest.json", "items.parquet"):
        (tars / name).unlink()
    assert index_tars(tars)["packed"] == 40
    assert ShardSet(tars).fingerprint != fingerprint
    with pytest.raises(BadInput, match="was indexed with"):
        index_tars(tars, leave=["npy"])


def test_a_stop_while_writing_is_mended_by_the_same_command(tars: Path) -> None:
    counts = index_tars(tars)
    fingerprint = ShardSet(tars).fingerprint
    for lost in ("manifest.json", "items.parquet", "deeper/00001.idx"):
        (tars / lost).unlink()
    (tars / ".00000.idx.tmp-elsewhere-1").write_bytes(b"")
    assert index_tars(tars) == counts
    assert ShardSet(tars).fingerprint == fingerprint
    assert read_index(tars / "deeper" / "00001.idx").header["items"] == 20
