"""What a table hides: cells that were cut off, quotes that swallow rows, columns that vanish."""

import logging
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.storage.errors import BadInput
from tests.support.catalogues import read_catalogue, write_text

HEAD = "posting_id,image,title,label_group\n"


# ── CSV and TSV


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,,hello,g\nb,,wor", r"c\.csv: row 2 \(line 3\): 3 cells where the first line names 4"),
        ("a\nb,,x,g\n", r"row 1 \(line 2\): 1 cells"),
        ('a,,"two\nlines",g\n\n  \nb,x\nc,,y,g\n', r"row 2 \(line 6\): 2 cells"),
    ],
)
def test_a_row_with_too_few_cells_is_refused_by_its_number(
    tmp_path: Path, rows: str, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        read_catalogue(write_text(tmp_path / "c.csv", "\ufeff" + HEAD + rows))
    with pytest.raises(BadInput, match=message.replace("csv", "tsv")):
        read_catalogue(write_text(tmp_path / "c.tsv", (HEAD + rows).replace(",", "\t")))


def test_a_quote_that_swallows_rows_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_text(tmp_path / "c.csv", 'posting_id,title\nz,ok\na,"14 inch\nb,x\nc,y" z\nd,k\n')
    with caplog.at_level(logging.WARNING, "shards"):
        assert read_catalogue(path).posting_id.tolist() == ["z", "a", "d"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: row 2 holds a field of several lines (1 such rows): where none is meant a quote "
        "was never closed, and rows behind it are in it"
    ]


def test_whole_rows_are_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "x" * 200_000  # more than Python's own reader takes by default
    for end in ("\n", "\r\n", "\r"):
        path = write_text(tmp_path / "c.csv", HEAD + end.join(["a,,t,", "", f'b,,"{long}",g', ""]))
        with caplog.at_level(logging.WARNING, "shards"):
            assert read_catalogue(path).title.tolist() == ["t", long]
    assert caplog.records == []


# ── Parquet


@pytest.mark.parametrize("index", ["sku", "posting_id"])
def test_a_column_that_pandas_made_the_index_is_there(tmp_path: Path, index: str) -> None:
    table = pd.DataFrame({"posting_id": ["a", "b"], "title": ["x", "y"], "sku": ["s1", "s2"]})
    table.set_index(index).to_parquet(tmp_path / "c.parquet")
    found = read_catalogue(tmp_path / "c.parquet")
    assert found.posting_id.tolist() == ["a", "b"]
    assert found.sku.tolist() == ["s1", "s2"]


@pytest.mark.parametrize("name", ["title", "price"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    column = pa.array(["a", "b"])
    names = ["posting_id", "title", name, name]
    pq.write_table(pa.table([column] * 4, names=names), tmp_path / "c.parquet")
    with pytest.raises(BadInput, match=rf"c\.parquet: two columns are named {name}; rename"):
        read_catalogue(tmp_path / "c.parquet")


# ── labels


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_label_of_blanks_is_none(tmp_path: Path, kind: str) -> None:
    table = pd.DataFrame({"posting_id": list("abcd"), "title": "t", "label_group": list(" \t  ")})
    table.loc[3, "label_group"] = " g "
    if kind == "csv":
        table.to_csv(tmp_path / "c.csv", index=False)
    else:
        table.to_parquet(tmp_path / "c.parquet")
    assert read_catalogue(tmp_path / f"c.{kind}").label_group.tolist() == ["", "", "", " g "]
