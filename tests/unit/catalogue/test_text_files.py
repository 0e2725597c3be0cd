"""Tables of text as programs of the world write them: encodings, separators, odd first lines."""

import gzip
import json
from pathlib import Path

import pytest

from shards.storage.errors import BadInput
from tests.support.catalogues import read_catalogue, write_text

ROWS = [["a", "Café – 50 €", "1"], ["b", "теплая куртка", "1"], ["c", "暖かい", ""]]
HEAD = ["posting_id", "title", "label_group"]


def text(separator: str, head: list[str] = HEAD, end: str = "\n") -> str:
    return "".join(separator.join(row) + end for row in [head, *ROWS])


def titles(path: Path, columns: dict[str, str] | None = None) -> list[list[str]]:
    return read_catalogue(path, columns)[HEAD].to_numpy().tolist()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "CSV"])
def test_encodings_and_separators_are_found(
    tmp_path: Path, encoding: str, separator: str, kind: str
) -> None:
    data = text(separator, end="\r\n").encode(encoding)
    packed = gzip.compress(data) if kind.endswith("gz") else data
    assert titles(write_text(tmp_path / f"c.{kind}", packed)) == ROWS


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
def test_either_order_of_bytes_is_read(tmp_path: Path, mark: str) -> None:
    assert titles(write_text(tmp_path / "c.csv", ("\ufeff" + text("\t")).encode(mark))) == ROWS


@pytest.mark.parametrize("separator", [";", ",", "\t", "|", "^"])
def test_the_line_that_excel_reads_is_no_row(tmp_path: Path, separator: str) -> None:
    path = write_text(tmp_path / "c.csv", f"sep={separator}\r\n" + text(separator))
    assert titles(path) == ROWS
    cut = write_text(tmp_path / "d.csv", f"sep={separator}\n{text(separator)}d\n")
    with pytest.raises(BadInput, match=r"row 4 \(line 6\): 1 cells where .* names 3"):
        titles(cut)


def test_names_that_are_given_tell_the_separator_too(tmp_path: Path) -> None:
    head = ["sku", "Bezeichnung, lang", "Gruppe, Art, Farbe"]
    columns = {"posting_id": "sku", "title": head[1], "label_group": head[2]}
    assert titles(write_text(tmp_path / "c.csv", text(";", head)), columns) == ROWS


def test_a_separator_inside_other_columns_misleads_nobody(tmp_path: Path) -> None:
    lines = "posting_id,title,a;b;c|d\n1,x;y;z|w,2\n"
    assert read_catalogue(write_text(tmp_path / "c.csv", lines)).title.tolist() == ["x;y;z|w"]


def test_blanks_around_names_are_no_part_of_them(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", "posting_id, title , shop\n1,x,y\n")
    table = read_catalogue(path)
    assert (table.title[0], table.shop[0]) == ("x", "y")


# ── what is named with its row and the remedy


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "posting_id,title\n1,ok\n2,Café\n".encode("cp1252"),
            r"row 2 \(line 3\): not UTF-8 .*Café",
        ),
        ('posting_id,title\n1,"a\nb"\n2,ñ\n'.encode("latin-1"), r"row 2 \(line 4\): not UTF-8"),
        ("posting_id;title\n1;Größe\n".encode("cp1252"), "row 1 .*Größe.* save it as CSV UTF-8"),
        ("posting_id,title\n1,鞋子\n".encode("gbk"), "row 1 .* iconv"),
        ("posting_id,größe,title\n1,2,3\n".encode("cp1252"), r"row 0 \(line 1\): not UTF-8"),
        (text("\t").encode("utf-16-le"), "UTF-16 without its mark; save it as CSV UTF-8"),
        (b"PK\x03\x04 anything", "a spreadsheet or zip archive.*save it as CSV UTF-8"),
        ("posting_id,title\n1,a\n2,b,c\n", r"row 2 \(line 3\): 3 cells .* names 2; put .*quotes"),
        ("posting_id,title\n1,a,\n2,b,\n", r"row 1 \(line 2\): 3 cells .* names 2"),
        ("posting_id;title\n1;a;b\n", r"row 1 \(line 2\): 3 cells .*';' into quotes"),
        ("posting_id,title,title\n1,a,b\n", "two columns are named title; rename or drop"),
        ("posting_id,title, title\n1,a,b\n", "two columns are named title"),
        (text(",").encode("utf-16")[:-1], "cannot be read"),
        (gzip.compress(b"posting_id,title\n" + b"1,a\n" * 99, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, data: str | bytes, message: str) -> None:
    path = write_text(tmp_path / "c.csv", data)
    with pytest.raises(BadInput, match=message) as error:
        read_catalogue(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_bad_row_behind_many_good_ones_is_found(tmp_path: Path) -> None:
    lines = "posting_id,title\n" + "".join(f"{n},t\n" for n in range(9_000))
    path = write_text(tmp_path / "c.csv", lines.encode() + b"x,\xe9\n")
    with pytest.raises(BadInput, match=r"row 9001 \(line 9002\): not UTF-8"):
        read_catalogue(path)


# ── JSON Lines


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_lines_of_other_encodings(tmp_path: Path, encoding: str) -> None:
    lines = [json.dumps(dict(zip(HEAD, row, strict=True)), ensure_ascii=False) for row in ROWS]
    data = "\r\n".join(lines).encode(encoding)
    assert titles(write_text(tmp_path / "c.jsonl", data)) == ROWS
    assert titles(write_text(tmp_path / "d.jsonl.gz", gzip.compress(data))) == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"posting_id": "2", "title": "\xe9t\xe9"}', "line 2: not UTF-8 .*été"),
        (b'{"posting_id": "2", "title": "a", "title": "b"}', "line 2: a name stands twice"),
    ],
)
def test_a_line_that_would_lose_something_is_named(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = write_text(tmp_path / "c.jsonl", b'{"posting_id": "1", "title": "t"}\n' + line)
    with pytest.raises(BadInput, match=message):
        read_catalogue(path)
