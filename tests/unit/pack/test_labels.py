"""Products as the catalogue has them: their own splits, and labels that can't be meant so."""

import json
from pathlib import Path

import pandas as pd
import pytest

from shards.catalogue.split import split_of
from shards.pack.index_tars import index_tars
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput
from tests.support.tars import write_tar


def packed(folder: Path, table: pd.DataFrame, columns: dict[str, str] | None = None):
    """The items of a table that is packed from a CSV, by posting_id."""
    table.to_csv(folder / "c.csv", index=False)
    pack(folder / "c.csv", None, folder / "out", PackOptions(), columns)
    return ShardSet(folder / "out").items.set_index("posting_id")


def table_of(labels: list[str], **more: list[str]) -> pd.DataFrame:
    ids = [f"p{number}" for number in range(len(labels))]
    return pd.DataFrame({"posting_id": ids, "title": "t", "label_group": labels, **more})


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno > 20)


# ── the split that a column names


@pytest.mark.parametrize("name", ["split", "fold"])
def test_the_split_of_the_catalogue_is_taken(tmp_path: Path, name: str) -> None:
    labels = [f"g{number // 2}" for number in range(40)]
    theirs = [("train", "val", "test")[number // 2 % 3] for number in range(40)]
    table = table_of(labels, **{name: theirs})
    items = packed(tmp_path, table, {"split": "fold"} if name == "fold" else None)
    assert items.split.tolist() == theirs
    classes = [label for label, split in zip(labels, theirs, strict=True) if split == "train"]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(classes))}
    assert items.class_id.tolist() == [
        numbers[label] if split == "train" else -1
        for label, split in zip(labels, theirs, strict=True)
    ]
    tars = {path.parent.name for path in (tmp_path / "out").glob("*/*.tar")}
    assert tars == {"train", "val", "test"}
    assert items.catalogue_split.tolist() == theirs


def test_other_words_for_a_split_and_empty_cells(tmp_path: Path) -> None:
    written = [
        "Training",
        "valid",
        "VALIDATION",
        "dev",
        "testing",
        "",
        "NULL",
        "unlabelled",
        "test",
    ]
    labels = ["a", "b", "c", "d", "e", "f", "g", "", ""]
    expected = ["train", "val", "val", "val", "test", split_of("f"), split_of("g")]
    items = packed(tmp_path, table_of(labels, split=written))
    assert items.split.tolist() == [*expected, "unlabelled", "unlabelled"]


@pytest.mark.parametrize("written", ["holdout", "0", "unlabelled", "train,test"])
def test_a_split_that_is_none_is_refused_by_its_row(tmp_path: Path, written: str) -> None:
    with pytest.raises(BadInput, match=rf"c\.csv: row 2: split '{written}' is none of train, val"):
        packed(tmp_path, table_of(["a", "b"], split=["train", written]))


def test_a_product_on_two_sides_is_told_with_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = table_of(["a", "a", "b", "b", "c", "c"], split=["train", "test", *["val"] * 4])
    assert packed(tmp_path, table).split.tolist() == table.split.tolist()
    assert "1 products lie in several splits, 2 postings (for example 'a' in train and test)" in (
        told(caplog)
    )


# ── the split that tars name


def sample(key: str, label: str, **about: str) -> list[tuple[str, bytes]]:
    files = [(f"{key}.txt", f"title {key}".encode()), (f"{key}.cls", label.encode())]
    return files + ([(f"{key}.json", json.dumps(about).encode())] if about else [])


@pytest.mark.parametrize(
    "names",
    [
        ["train-000.tar", "val-000.tar", "test-000.tar"],
        ["shop_train_1.tar", "shop_validation_1.tar", "shop_TEST_1.tar"],
        ["Train/a.tar", "valid/b.tar", "test/c.tar"],
        ["2024/train/a.tar", "2024/val/b.tar", "2024/test/train.tar"],
    ],
)
def test_tars_that_name_a_split_are_of_it(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        write_tar(tmp_path / name, [*sample(f"{number}a", str(number)), *sample(f"{number}b", "9")])
    index_tars(tmp_path)
    items = ShardSet(tmp_path).items.set_index("posting_id").split
    assert [items[f"{number}a"] for number in range(3)] == ["train", "val", "test"]


def test_a_split_in_json_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [*sample("a", "1", fold="test"), *sample("b", "1", fold="train"), *sample("c", "2")]
    write_tar(tmp_path / "a.tar", files)
    index_tars(tmp_path, {"split": "fold"})
    items = ShardSet(tmp_path).items.set_index("posting_id").split
    assert (items["a"], items["b"], items["c"]) == ("test", "train", split_of("2"))
    assert "1 products lie in several splits, 2 postings" in told(caplog)
    write_tar(tmp_path / "b" / "b.tar", sample("a", "1", split="holdout"))
    with pytest.raises(BadInput, match=r"b\.tar: .*split 'holdout' of its json is none of train"):
        index_tars(tmp_path / "b")


def test_tars_that_only_partly_name_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.tar", "more-0.tar"):
        write_tar(tmp_path / name, sample(name[0], "1"))
    with pytest.raises(BadInput, match=r"more-0\.tar: in none of the folders .*train-0\.tar is;"):
        index_tars(tmp_path)


def test_placeholders_and_empty_titles_of_tars(tmp_path: Path) -> None:
    files = [*sample("a", "-1"), *sample("b", "17.0", label_group="NULL"), ("c.txt", b"&nbsp;")]
    write_tar(tmp_path / "a.tar", files)
    index_tars(tmp_path)
    items = ShardSet(tmp_path).items.set_index("posting_id")
    assert items.label_group.tolist() == ["", "17", ""]
    assert items.reason["a"] == "label_group -1 taken as empty"
    assert items.status["c"] == "rejected"


# ── labels that can't be meant so


VAL = [name for name in map(str, range(99)) if split_of(name) == "val"]
TRAIN = [name for name in map(str, range(99)) if split_of(name) == "train"]


@pytest.mark.parametrize(
    ("labels", "remark"),
    [
        ([f"g{n}" for n in range(36)], "no product has two postings: each of 36 labels"),
        (["NULL"] * 28 + [f"g{n}" for n in range(8)], "label_group 'NULL' in 28 rows: taken as"),
        (["other"] * 28 + [f"g{n // 2}" for n in range(20)], "'other' has 28 of 48 labelled"),
        (["", "None"], "no posting has a label_group"),
        (["shop"] * 30, "all 30 labelled postings are of one product, 'shop'"),
        (TRAIN[:5] * 2 + VAL[:1] * 3, "val holds one product: no threshold can be chosen"),
        (TRAIN[:5] * 2, "val holds no product: no threshold"),
        (TRAIN[:5] * 2 + VAL[:4], "none of the 4 val products has two postings: no threshold"),
    ],
)
def test_labels_that_cannot_be_meant_so_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[str], remark: str
) -> None:
    packed(tmp_path, table_of(labels))
    assert remark in told(caplog)


@pytest.mark.parametrize("sizes", [[2] * 30, [40, 35, 30, 50, 20, 45], [2] * 90 + [15]])
def test_usual_products_are_packed_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sizes: list[int]
) -> None:
    splits = [
        "val" if number % 3 else "train" for number, size in enumerate(sizes) for _ in range(size)
    ]
    labels = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    packed(tmp_path, table_of(labels, split=splits))
    assert told(caplog) == ""


# ── titles that nobody can read


def test_a_posting_with_an_invisible_title_and_no_photo_is_rejected(tmp_path: Path) -> None:
    table = table_of(["a", "a", "a"]).assign(title=["shoe", "\u200b\u200d", "&nbsp;&#8203;"])
    items = packed(tmp_path, table)
    assert items.status.tolist() == ["packed", "rejected", "rejected"]
    assert items.has_text.tolist() == [True, False, False]
    assert items.reason.tolist() == ["", *["title without a visible character"] * 2]
