"""Which columns of a file are ours: found, not found, not used, or meant under another name."""

import logging
from pathlib import Path

import pytest

from shards.catalogue.columns import describe_columns, meant_columns
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput
from tests.support.catalogues import read_catalogue, write_text


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        ("posting_id image_path title product_id", "image=image_path label_group=product_id"),
        ("id product_id name", "posting_id=id title=name label_group=product_id"),
        ("SKU imageUrl ProductTitle", "posting_id=SKU image=imageUrl title=ProductTitle"),
        ("posting_id Title LABEL_GROUP img", "image=img title=Title label_group=LABEL_GROUP"),
        (
            "postingId labelgroup caption",
            "posting_id=postingId title=caption label_group=labelgroup",
        ),
        ("posting_id title photo_file gtin13", "image=photo_file label_group=gtin13"),
        ("posting_id image image_phash title label_group", ""),
        ("posting_id title price shop", ""),
        ("posting_id title fold", "split=fold"),
    ],
)
def test_columns_of_likely_names_are_suggested(found: str, meant: str) -> None:
    suggested = meant_columns(found.split(), {})
    assert " ".join(f"{ours}={theirs}" for ours, theirs in suggested.items()) == meant


def test_what_was_found_is_described() -> None:
    text = describe_columns(["sku", "title", "price"], {"posting_id": "sku"})
    assert text == (
        "columns posting_id (their sku), title; not found: image, label_group, split; "
        "not used: price"
    )


@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        ("id,title", {}, r"no column posting_id \(found: id, title\); .*--columns posting_id=id$"),
        ("a,title", {}, r"--columns posting_id=THEIR_NAME$"),
        ("posting_id,photo_path", {}, r"neither .* title \(found: .*--columns .*image=photo_path"),
        ("sku,titel", {"title": "title"}, r"no column title .*found: sku, titel\); is it titel\?"),
    ],
)
def test_a_missing_column_is_suggested(
    tmp_path: Path, names: str, columns: dict[str, str], message: str
) -> None:
    path = write_text(tmp_path / "c.csv", f"{names}\n1,x\n")
    with pytest.raises(BadInput, match=message):
        read_catalogue(path, columns)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_photos_without_a_column_that_names_them_are_refused(tmp_path: Path, kind: str) -> None:
    lines = {
        "csv": "posting_id,image_path,title\n1,a.jpg,x\n",
        "jsonl": '{"posting_id": "1", "image_path": "a.jpg", "title": "x"}\n',
    }
    path = write_text(tmp_path / f"c.{kind}", lines[kind])
    (tmp_path / "photos").mkdir()
    message = (
        r"no column image, .*found: posting_id, image_path, title.*--columns image=image_path,"
    )
    with pytest.raises(BadInput, match=message):
        pack(path, tmp_path / "photos", tmp_path / "out", PackOptions())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_columns_are_told_and_the_forgotten_ones_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_text(tmp_path / "c.csv", "posting_id;title;product_id\n1;x;g\n2;y;g\n")
    with caplog.at_level(logging.INFO, "shards"):
        pack(path, None, tmp_path / "out", PackOptions())
    told = [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records]
    assert told[:2] == [
        "columns posting_id, title; not found: image, label_group, split; not used: product_id; "
        "separated by ';'",
        "product_id seems to be label_group, and is not used; to use it add "
        "--columns label_group=product_id",
    ]


def test_a_folder_of_photos_that_no_row_names_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_text(tmp_path / "c.csv", "posting_id,image,title\n1,,x\n2,NULL,y\n")
    (tmp_path / "photos").mkdir()
    with caplog.at_level(logging.INFO, "shards"):
        pack(path, tmp_path / "photos", tmp_path / "out", PackOptions())
    assert "image 'NULL' in 1 rows: taken as empty" in caplog.text
    assert "names no photo at all" in caplog.text
