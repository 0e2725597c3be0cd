"""Small odd catalogues: packed as a user means them, or refused in one line that says what to do.

An outcome is the rows and what they hold, or the facts that the refusal must name. Where an input
may rightly be understood or refused, both are given.
"""

import gzip
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.verbs import Said, call

HEAD = "posting_id,title,label_group\n"
TWO = HEAD + "a,red shoe,1\nb,Café,1\n"
SEPARATED = {";": TWO.replace(",", ";"), "\t": TWO.replace(",", "\t"), "|": TWO.replace(",", "|")}


@dataclass(frozen=True)
class Odd:
    """A file and what is to come of it: so many rows, or a refusal that names these facts."""

    name: str
    content: bytes
    rows: int = 0
    """0: it must be refused."""
    refusal: tuple[str, ...] | None = None
    """Regular expressions; None: it must be packed."""
    holds: dict[str, list[str]] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def text(name: str, content: str, encoding: str = "utf-8", **more: object) -> Odd:
    return Odd(name, content.encode(encoding), **more)


GOOD = {"posting_id": ["a", "b"], "title": ["red shoe", "Café"], "label_group": ["1", "1"]}
FILES = [
    Odd("empty.csv", b"", refusal=("empty|no rows|no columns",)),
    text("names-only.csv", HEAD, refusal=("no rows",)),
    text("blank-lines.csv", "\n\n" + TWO + "\n\n", rows=2, holds=GOOD),
    text("mark.csv", TWO, "utf-8-sig", rows=2, holds=GOOD),
    text("windows-lines.csv", TWO.replace("\n", "\r\n"), rows=2, holds=GOOD),
    text("no-last-line-end.csv", TWO.rstrip("\n"), rows=2, holds=GOOD),
    text("quoted.csv", HEAD + '"a","red, ""new""",1\n', rows=1, holds={"title": ['red, "new"']}),
    text("lines-in-cell.csv", HEAD + 'a,"red\nshoe",1\n', rows=1, holds={"title": ["red\nshoe"]}),
    text("open-quote.csv", HEAD + 'a,"red,1\nb,blue,1\n', refusal=("row|line|quot|EOF",)),
    text("too-many-cells.csv", HEAD + "a,x,1\nb,y,1,more\n", refusal=("row 2|line 3",)),
    text("too-few-cells.csv", HEAD + "a,x,1\nb,y\n", refusal=("row 2|line 3",)),
    text("same-names.csv", "posting_id,title,title\na,x,y\n", refusal=("title",)),
    *(
        text(f"by-{ord(mark)}.csv", content, rows=2, holds=GOOD, refusal=("separat",))
        for mark, content in SEPARATED.items()
    ),
    text("semicolons.tsv", SEPARATED[";"], rows=2, holds=GOOD, refusal=("separat.*;",)),
    text("sep-line.csv", "sep=;\n" + SEPARATED[";"], rows=2, holds=GOOD, refusal=("separat.*;",)),
    text("cp1252.csv", TWO, "cp1252", refusal=("row 2", "UTF-8")),
    text("latin-1.tsv", SEPARATED["\t"], "latin-1", refusal=("row 2", "UTF-8")),
    text("shift-jis.csv", HEAD + "a,赤い靴,1\n", "shift-jis", refusal=("row 1", "UTF-8")),
    text("utf-16.csv", TWO, "utf-16", rows=2, holds=GOOD, refusal=("UTF-8",)),
    text("utf-16-tabs.csv", SEPARATED["\t"], "utf-16", rows=2, holds=GOOD, refusal=("UTF-8",)),
    text("unmarked.csv", TWO, "utf-16-le", refusal=("UTF-8|UTF-16",)),
    text("cp1252.jsonl", '{"posting_id": "a", "title": "Café"}', "cp1252", refusal=("line 1",)),
    Odd("zipped.csv.gz", gzip.compress(TWO.encode(), mtime=0), 2, ("gz",), GOOD),
    Odd("cut.csv.gz", gzip.compress(TWO.encode() * 99, mtime=0)[:-20], refusal=(r"cut\.csv\.gz",)),
    Odd("workbook.csv", b"PK\3\4" + bytes(60), refusal=("spreadsheet|zip|not text|UTF-8",)),
    text("page.csv", "<html>\n<body>Sign in</body>\n", refusal=("posting_id",)),
    text("list.jsonl", '[{"posting_id": "a", "title": "x"}]', refusal=("line 1",)),
    text("deep.jsonl", "[" * 100_000, refusal=("line 1",)),
    text("table.json", "[]", refusal=("jsonl",)),
    text("table", TWO, refusal=(r"\.csv",)),
    Odd("cut.parquet", b"PAR1" + bytes(80), refusal=(r"cut\.parquet",)),
    text("repeated-id.csv", HEAD + "a,x,1\nb,y,1\na,z,1\n", refusal=("row 3", "'a'", "row 1")),
    text("no-id.csv", HEAD + "a,x,1\n,y,1\n", refusal=("row 2", "posting_id")),
    text("zeros.csv", HEAD + "007,x,1\n7,y,1\n7.0,z,1\n", 
         rows=3, holds={"posting_id": ["007", "7", "7.0"]}),
    text("powers.csv", HEAD + "1e5,x,1\n100000,y,1\n", 
         rows=2, holds={"posting_id": ["1e5", "100000"]}),
    text("words.csv", HEAD + "True,x,1\nnan,y,1\nNone,z,1\n",
         rows=3, holds={"posting_id": ["True", "nan", "None"]}),
    text("other-id.csv", "id,title\na,x\n", refusal=("posting_id", "id", "--columns")),
    text("capitals.csv", "Posting_ID,Title\na,x\n", refusal=("Posting_ID", "--columns")),
    text("no-such.csv", TWO, options=("--columns", "title=nmae"), refusal=("nmae", "title")),
    text("price.csv", TWO, options=("--columns", "price=x"), refusal=("price", "label_group")),
    text("half.csv", TWO, options=("--columns", "title"), refusal=("posting_id=sku",)),
    text("neither.csv", "posting_id,price\na,3\n", refusal=("image", "title", "price")),
    text("float-labels.csv", HEAD + "a,x,17.0\nb,y,17\n", 
         rows=2, holds={"label_group": ["17", "17"]}),
    text("blank-labels.csv", HEAD + "a,x,  \nb,y,\n", rows=2, holds={"label_group": ["", ""]}),
]  # fmt: skip


def pack(path: Path, out: Path, *options: object) -> Said:
    return call("pack", path, "--out", out, *options)


def items_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "items.parquet").fillna("")


@pytest.mark.parametrize("odd", FILES, ids=str)
def test_a_file(odd: Odd, tmp_path: Path) -> None:
    (tmp_path / odd.name).write_bytes(odd.content)
    said = pack(tmp_path / odd.name, tmp_path / "s", *odd.options)
    if said.code == 0:
        assert odd.rows, said.text
        items = items_of(tmp_path / "s")
        assert len(items) == odd.rows
        assert {name: items[name].tolist() for name in odd.holds} == odd.holds
        return
    assert said.code == 2, said.text
    assert odd.refusal is not None, said.text
    last = said.text.strip().splitlines()[-1]
    assert last.startswith("dist-train: ")
    for fact in (*odd.refusal, "" if odd.options else re.escape(odd.name)):
        assert re.search(fact, last, re.IGNORECASE), last


@pytest.mark.parametrize("kind", ["missing", "folder", "folder of parts"])
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    if kind != "missing":
        path.mkdir()
    if kind == "folder of parts":
        pq.write_table(pa.table({"posting_id": ["a"], "title": ["x"]}), path / "0.parquet")
    said = pack(path, tmp_path / "s")
    assert said.code == 2, said.text
    assert str(path) in said.text
    assert re.search("folder" if kind != "missing" else "not found", said.text)


COLUMNS = {
    "large numbers": pa.array([2**53 + 1, None, 7]),
    "decimals": pa.array(map(Decimal, ("17", "18", "19")), pa.decimal128(9, 2)),
    "dictionary": pa.array(["17", "18", "17"]).dictionary_encode(),
    "large text": pa.array(["17", "18", None], pa.large_string()),
    "bytes": pa.array([b"17", b"18", None]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_typed_label(kind: str, tmp_path: Path) -> None:
    """As text in a CSV it would be the same label."""
    labels = COLUMNS[kind]
    table = {"posting_id": ["a", "b", "c"], "title": ["x", "y", "z"], "label_group": labels}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    said = pack(tmp_path / "c.parquet", tmp_path / "s")
    assert said.code == 0, said.text
    values = [value.decode() if isinstance(value, bytes) else value for value in labels.to_pylist()]
    expected = ["" if value is None else str(value).removesuffix(".00") for value in values]
    assert items_of(tmp_path / "s").label_group.tolist() == expected


@pytest.mark.parametrize(
    ("column", "values"),
    [("title", [["a"], ["b"]]), ("label_group", [{"x": 1}, {"x": 2}]), ("title", [b"\xff", b"y"])],
)
def test_a_column_without_text(column: str, values: list[object], tmp_path: Path) -> None:
    table = {"posting_id": ["a", "b"], "title": ["x", "y"], column: values}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    said = pack(tmp_path / "c.parquet", tmp_path / "s")
    assert said.code == 2, said.text
    assert column in said.text


PLACEHOLDERS = ["nan", "NaN", "None", "null", "\\N", "N/A", "#N/A", "-1", "<NA>", "n/a"]


@pytest.mark.parametrize("word", PLACEHOLDERS)
def test_a_placeholder_is_no_product(word: str, tmp_path: Path) -> None:
    rows = [f"p{n},thing {n},{word if n % 3 else f'g{n // 6}'}" for n in range(30)]
    (tmp_path / "c.csv").write_text(HEAD + "\n".join(rows))
    said = pack(tmp_path / "c.csv", tmp_path / "s")
    assert said.code == 0, said.text
    assert word in said.text
    assert "20" in said.text
    assert word not in set(items_of(tmp_path / "s").label_group)


@pytest.mark.parametrize("name", ["product_id", "cluster", "Label Group", "gtin"])
def test_a_forgotten_label_column_is_suggested(name: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f"posting_id,title,{name}\na,x,1\nb,y,1\n")
    said = pack(tmp_path / "c.csv", tmp_path / "s")
    assert name in said.text
    assert f"label_group={name}" in said.text


def test_labels_that_are_all_one(tmp_path: Path) -> None:
    rows = [f"p{n},thing {n},shop" for n in range(30)]
    (tmp_path / "c.csv").write_text(HEAD + "\n".join(rows))
    said = pack(tmp_path / "c.csv", tmp_path / "s")
    assert re.search(r"shop|one product|single product", said.text), said.text


# ── the user's own split


@pytest.mark.parametrize(
    ("head", "words", "options"),
    [
        ("split", ("train", "val", "test"), ()),
        ("split", ("Training", "Validation", "Testing"), ()),
        ("fold", ("train", "dev", "test"), ("--columns", "split=fold")),
    ],
)
def test_a_split_of_ones_own(
    head: str, words: tuple[str, ...], options: tuple[str, ...], tmp_path: Path
) -> None:
    rows = [f"p{n},thing {n},g{n // 2},{words[n // 2 % 3]}" for n in range(30)]
    (tmp_path / "c.csv").write_text(f"posting_id,title,label_group,{head}\n" + "\n".join(rows))
    said = pack(tmp_path / "c.csv", tmp_path / "s", *options)
    assert said.code == 0, said.text
    expected = [("train", "val", "test")[n // 2 % 3] for n in range(30)]
    assert items_of(tmp_path / "s").split.tolist() == expected


def test_a_word_that_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("posting_id,title,label_group,split\na,x,1,holdout\n")
    said = pack(tmp_path / "c.csv", tmp_path / "s")
    assert said.code == 2, said.text
    assert "row 1" in said.text
    assert "holdout" in said.text


def test_a_product_on_two_sides_is_told_of(tmp_path: Path) -> None:
    rows = [f"p{n},thing {n},g{n // 2},{'test' if n % 2 else 'train'}" for n in range(30)]
    (tmp_path / "c.csv").write_text("posting_id,title,label_group,split\n" + "\n".join(rows))
    said = pack(tmp_path / "c.csv", tmp_path / "s")
    assert "15" in said.text
    assert re.search("split|side", said.text)
