"""Cells that say nothing, and one label that is written in two ways."""

import json
import logging
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.catalogue.placeholders import label_of, value_of
from shards.catalogue.rows import Carried, Catalogue
from shards.storage.errors import BadInput
from tests.support.catalogues import read_catalogue, write_text


@pytest.mark.parametrize(
    ("text", "label"),
    [
        *((name, "") for name in ("NULL", "nan", "None", r"\N", "N/A", "-1", "-1.0", "#N/A")),
        *((name, "") for name in (" NULL ", "Unknown", "NaT", "nil", "?", "--", "", " \t")),
        ("17.0", "17"), ("17.00", "17"), ("-3.0", "-3"), ("0.0", "0"), ("17", "17"),
        ("17.5", "17.5"), ("v17.0", "v17.0"), ("17.0.0", "17.0.0"), (" g ", " g "), ("007", "007"),
        ("nano", "nano"), ("-11", "-11"), ("1e5", "1e5"),
    ],
)  # fmt: skip
def test_labels(text: str, label: str) -> None:
    assert label_of(text) == label


def test_titles_that_are_words_stay() -> None:
    assert [value_of(text) for text in ("unknown", "?", "-1", "na")] == ["unknown", "?", "-1", "na"]
    assert [value_of(text) for text in ("NULL", "nan", " None", r"\N")] == [""] * 4


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "strings.parquet", "decimals"])
def test_one_label_does_not_move_when_another_is_missing(tmp_path: Path, kind: str) -> None:
    labels = [number // 2 for number in range(40)]
    splits = []
    for name, more in (("before", []), ("after", [None])):
        table = pd.DataFrame({"label_group": [*labels, *more]})
        table["posting_id"], table["title"] = [f"p{n}" for n in range(len(table))], "t"
        path = tmp_path / f"{name}.{kind}"
        match kind:
            case "csv" | "tsv":
                table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
            case "jsonl":
                table.to_json(path, orient="records", lines=True)
            case "parquet":
                table.to_parquet(path)
            case "strings.parquet":
                table.astype({"label_group": str}).to_parquet(path)
            case "decimals":
                path = path.with_suffix(".parquet")
                table.label_group = [
                    None if n != n else Decimal(f"{int(n)}.00") for n in table.label_group
                ]
                table.to_parquet(path)
        found = pd.concat(list(Catalogue(path).postings(Carried())))
        assert set(found.label_group) <= {*map(str, range(20)), ""}
        splits.append(found.split.tolist()[:40])
    assert splits[0] == splits[1]
    assert len(set(splits[0])) == 3


def test_what_is_taken_as_empty_is_counted_with_an_example(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["1,nan,NULL", "2,shoe,NULL", "3,lamp,8.99123E+12", "4,vase,g", "5,cup,9E+9"]
    path = write_text(tmp_path / "c.csv", "\n".join(["posting_id,title,label_group", *lines]))
    catalogue, carried = Catalogue(path), Carried()
    found = pd.concat(list(catalogue.postings(carried)))
    assert found.label_group.tolist() == ["", "", "8.99123E+12", "g", "9E+9"]
    assert found.title.tolist() == ["", "shoe", "lamp", "vase", "cup"]
    with caplog.at_level(logging.WARNING, "shards"):
        catalogue.log_findings(carried)
    told = [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records]
    assert told == [
        "title 'nan' in 1 rows: taken as empty, as programs write it for a missing value",
        "label_group 'NULL' in 2 rows: taken as empty, as programs write it for a missing value",
        "2 labels are numbers of which a spreadsheet kept some digits, for example 8.99123E+12 in "
        "row 3: different products may look the same; write that column as text",
    ]


# ── text that Parquet holds as bytes


BYTES = [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), pa.binary(5)]


@pytest.mark.parametrize("kind", BYTES, ids=map(str, BYTES))
def test_bytes_are_text_in_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {
        name: pa.array([value, value[::-1]], pa.binary()).cast(kind)
        if not pa.types.is_fixed_size_binary(kind) else pa.array([value, value[::-1]], kind)
        for name, value in {
            "posting_id": b"abcde", "image": b"p.jpg", "title": b"shoes", "label_group": b"group",
            "split": b"train",
        }.items()
    }  # fmt: skip
    columns["split"] = pa.array([b"train", b"test"])
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    table = read_catalogue(tmp_path / "c.parquet")
    assert table.posting_id.tolist() == ["abcde", "edcba"]
    assert table.title.tolist() == ["shoes", "seohs"]
    assert table.image.tolist() == ["p.jpg", "gpj.p"]
    assert table.label_group.tolist() == ["group", "puorg"]
    found = pd.concat(list(Catalogue(tmp_path / "c.parquet").postings(Carried())))
    assert found.split.tolist() == ["train", "test"]


@pytest.mark.parametrize("column", ["posting_id", "image", "title", "label_group"])
def test_bytes_that_are_no_text_are_named(tmp_path: Path, column: str) -> None:
    columns = {"posting_id": [b"a", b"b"], "image": [b"", b""], "title": [b"x", b"y"]}
    columns |= {"label_group": [b"g", b"h"]} | {column: [b"ok", b"\xff\xd8\xff\xe0"]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    with pytest.raises(BadInput, match=f"row 2: column {column} holds bytes that are not UTF-8"):
        read_catalogue(tmp_path / "c.parquet")


def test_lists_are_named_with_their_row(tmp_path: Path) -> None:
    rows = [{"posting_id": "1", "title": "a"}, {"posting_id": "2", "title": ["a"]}]
    path = write_text(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match="row 2: column title holds lists or objects"):
        read_catalogue(path)
