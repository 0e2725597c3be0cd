"""Reading a catalogue: kinds of file, column names, checks that name file and row."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.catalogue import readers as module
from shards.catalogue.columns import COLUMNS
from shards.catalogue.readers import CHUNK
from shards.catalogue.rows import Carried, Catalogue
from shards.storage.errors import BadInput
from tests.support.catalogues import read_catalogue, write_text

ROWS = [
    {"posting_id": "a1", "image": "x/1.jpg", "title": "Teh, 'manis' \"50%\"", "label_group": "17"},
    {"posting_id": "007", "image": "", "title": "line one\nline two", "label_group": ""},
    {"posting_id": "NA", "image": "2.jpg", "title": "", "label_group": "nullam"},
    {"posting_id": "1e5", "image": "3.jpg", "title": "kopi\tsusu ☕", "label_group": "17"},
]


def write(path: Path, rows: list[dict]) -> Path:
    table = pd.DataFrame(rows)
    match path.suffix:
        case ".csv":
            table.to_csv(path, index=False)
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case ".parquet":
            table.to_parquet(path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ── kinds of file


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl", "CSV"])
def test_every_kind_of_file_reads_alike(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"c.{kind.lower()}", ROWS)
    path = path.rename(tmp_path / f"d.{kind}")
    assert read_catalogue(path).to_dict("records") == ROWS


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_numbers_are_read_as_text_without_a_decimal_point(tmp_path: Path, kind: str) -> None:
    rows = [
        {"posting_id": 1, "title": "a", "label_group": 17},
        {"posting_id": 2, "title": "b", "label_group": None},
        {"posting_id": 3, "title": None, "label_group": 18},
    ]
    path = tmp_path / f"c.{kind}"
    if kind in ("csv", "tsv"):
        lines = ["posting_id,title,label_group", "1,a,17", "2,b,", "3,,18"]
        write_text(path, "\n".join(lines).replace(",", "\t" if kind == "tsv" else ","))
    else:
        write(path, rows)
    table = read_catalogue(path)
    assert table.posting_id.tolist() == ["1", "2", "3"]
    assert table.label_group.tolist() == ["17", "", "18"]
    assert table.title.tolist() == ["a", "b", ""]


BIG = (1234567890123456789, 1234567890123456780)


def test_large_group_numbers_beside_a_missing_one_stay_apart_in_json_lines(tmp_path: Path) -> None:
    rows = [{"posting_id": str(n), "title": "t", "label_group": big} for n, big in enumerate(BIG)]
    path = write(tmp_path / "c.jsonl", [*rows, {"posting_id": "x", "title": "t"}])
    assert read_catalogue(path).label_group.tolist() == [*map(str, BIG), ""]


def test_large_group_numbers_beside_a_missing_one_stay_apart_in_parquet(tmp_path: Path) -> None:
    columns = {"posting_id": ["0", "1", "2"], "title": ["t"] * 3, "label_group": [*BIG, None]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    assert read_catalogue(tmp_path / "c.parquet").label_group.tolist() == [*map(str, BIG), ""]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", b"\xef\xbb\xbfposting_id,title\n1,a\n")
    assert read_catalogue(path).posting_id.tolist() == ["1"]


def test_windows_line_ends_are_no_part_of_the_last_column(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", b"posting_id,title\r\n1,a\r\n2,b\r\n")
    assert read_catalogue(path).title.tolist() == ["a", "b"]


def test_rows_longer_than_the_header_never_shift_the_columns(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", "posting_id,title\n1,a,\n2,b,\n")
    try:
        table = read_catalogue(path)
    except BadInput:
        return  # refusing is right too
    assert table.posting_id.tolist() == ["1", "2"]
    assert table.title.tolist() == ["a", "b"]


# ── columns


def test_missing_columns_are_empty_and_others_are_carried(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", "price,posting_id,title,shop\n9,1,a,s1\n8,2,b,s2\n")
    table = read_catalogue(path)
    assert list(table.columns) == [*COLUMNS, "price", "shop"]
    assert table.image.tolist() == table.label_group.tolist() == ["", ""]
    assert table.price.tolist() == ["9", "8"]


def test_columns_map_other_names(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", "sku,name,pic,product\n1,a,x.jpg,g\n")
    names = {"posting_id": "sku", "title": "name", "image": "pic", "label_group": "product"}
    assert read_catalogue(path, names).to_dict("records") == [
        {"posting_id": "1", "image": "x.jpg", "title": "a", "label_group": "g"}
    ]


def test_names_may_be_exchanged(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", "posting_id,title,image\n1,x.jpg,a\n")
    table = read_catalogue(path, {"title": "image", "image": "title"})
    assert (table.title[0], table.image[0]) == ("a", "x.jpg")


def test_a_column_that_gives_way_to_another_name_is_carried(tmp_path: Path) -> None:
    path = write_text(tmp_path / "c.csv", "posting_id,title,name\n1,old,new\n")
    table = read_catalogue(path, {"title": "name"})
    assert table.title.tolist() == ["new"]
    assert any((table[column] == "old").all() for column in table.columns)


def test_dates_of_json_lines_are_carried_as_they_are(tmp_path: Path) -> None:
    row = {"posting_id": "1", "title": "a", "created_at": 1700000000, "modified": "2024-01-31"}
    table = read_catalogue(write(tmp_path / "c.jsonl", [row]))
    assert (table.created_at[0], table.modified[0]) == (1700000000, "2024-01-31")


# ── checks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,title\n1,a\n", r"no column posting_id \(found: id, title\).*--columns posting_id="),
        ("posting_id,price\n1,2\n", "neither a column image nor a column title"),
        ("posting_id,title\n1,a\n2,b\n,c\n", "row 3: posting_id is empty"),
        ("posting_id,title\n1,a\n2,b\n3,c\n2,d\n", "row 4: posting_id '2'.* row 2 "),
        ("posting_id,title\n", "holds no rows"),
        ("", "cannot be read"),
        (
            "posting_id,title\n1,a\n2,b,c\n",
            r"row 2 \(line 3\): 3 cells where the first line names 2; put",
        ),
        ('posting_id,title\n1,"a\n2,b\n', "cannot be read"),
        (b"posting_id,title\n1,\xe9t\xe9\n", r"row 1 \(line 2\): not UTF-8 .*'été' in W.*save"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = write_text(tmp_path / "c.csv", content)
    with pytest.raises(BadInput, match=message) as error:
        read_catalogue(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", '{"posting_id": 1}\n{oops\n'),
        ("c.jsonl", '{"posting_id": 1, "title": "a"}\n'[:-5]),
        ("c.jsonl", "[1, 2]\n"),
        ("c.parquet", "PAR1 this is none"),
        ("c.parquet", ""),
        ("c.xlsx", "anything"),
        ("c", "anything"),
    ],
)
def test_broken_files_of_other_kinds_are_refused_by_name(
    tmp_path: Path, name: str, content: str
) -> None:
    path = write_text(tmp_path / name, content)
    with pytest.raises(BadInput) as error:
        read_catalogue(path)
    assert str(path) in str(error.value)


def test_cells_that_are_lists_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"posting_id": ["1"], "title": [["a", "b"]]}), path)
    with pytest.raises(BadInput, match="title"):
        read_catalogue(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, message in (("none.csv", "not found"), ("folder.csv", "a folder, .* into one")):
        with pytest.raises(BadInput, match=f"{name}: {message}"):
            read_catalogue(tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"title": "nme"}, "no column nme"), ({"price": "cost"}, "price is not one of posting_id")],
)
def test_wrong_column_names_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    path = write_text(tmp_path / "c.csv", "posting_id,name,cost\n1,a,2\n")
    with pytest.raises(BadInput, match=message):
        read_catalogue(path, columns)


def test_five_thousand_repeated_ids_are_counted(tmp_path: Path) -> None:
    rows = [f"{n % 10},t" for n in range(5010)]
    path = write_text(tmp_path / "c.csv", "\n".join(["posting_id,title", *rows]))
    with pytest.raises(BadInput, match=r"row 11: .*row 1 \(5000 such rows\)"):
        read_catalogue(path)


# ── chunk by chunk


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_a_catalogue_of_several_chunks_reads_as_one(tmp_path: Path, kind: str) -> None:
    rows = [
        {"posting_id": f"p{n}", "title": "t" * 200, "label_group": f"g{n % 7}", "price": f"{n}"}
        for n in range(2 * CHUNK + 5)
    ]
    path = write(tmp_path / f"c.{kind}", rows)
    assert len(list(Catalogue(path).postings(Carried()))) >= 2
    table = read_catalogue(path)
    assert table.drop(columns="image").to_dict("records") == rows


def test_rows_of_later_chunks_are_named_as_they_stand(tmp_path: Path) -> None:
    ids = [f"p{n}" for n in range(3 * CHUNK)]
    ids[2 * CHUNK + 9] = ids[CHUNK + 3]
    path = write_text(tmp_path / "c.csv", "\n".join(["posting_id,title", *(f"{i},t" for i in ids)]))
    message = f"row {2 * CHUNK + 10}: posting_id 'p{CHUNK + 3}' stands already in row {CHUNK + 4} "
    with pytest.raises(BadInput, match=message):
        read_catalogue(path)
    ids[2 * CHUNK + 9] = '""'
    path = write_text(tmp_path / "d.csv", "\n".join(["posting_id,title", *(f"{i},t" for i in ids)]))
    with pytest.raises(BadInput, match=f"row {2 * CHUNK + 10}: posting_id is empty"):
        read_catalogue(path)


SCALARS = st.one_of(
    st.none(), st.integers(-(2**54), 2**54), st.integers(-(2**70), 2**70), st.floats(),
    st.text("ab\0é", max_size=3), st.lists(st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(SCALARS, min_size=1, max_size=6))
def test_the_type_of_a_column_does_not_depend_on_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list
) -> None:
    rows = [{"posting_id": str(n), "title": "t", "x": value} for n, value in enumerate(values)]
    path = write(tmp_path / "c.jsonl", rows)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # a chunk a line
    table = read_catalogue(path)
    carried = Carried()
    assert sum(1 for _ in Catalogue(path).postings(carried)) == len(rows)
    kind = carried.schema().field("x").type
    mine = pa.array(table.x, kind, from_pandas=True)
    try:
        whole = pa.array(values, from_pandas=True)
    except (pa.ArrowException, OverflowError):
        whole = None
    if whole is None or any(isinstance(value, list) for value in values):
        assert kind == pa.string()
        assert mine.null_count == sum(value is None or value != value for value in values)
    else:
        assert mine.equals(whole)


def test_a_column_that_a_later_line_is_the_first_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"posting_id": "1"}, {"posting_id": "2", "title": "t", "x": 5}]
    path = write(tmp_path / "c.jsonl", rows)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    table = read_catalogue(path)
    assert table.title.tolist() == ["", "t"]
    assert table.x.tolist() == [None, 5]


def test_true_beside_numbers_is_text(tmp_path: Path) -> None:
    for number, values in enumerate(([0.5, True], [True, 0.5], [1, True])):
        rows = [{"posting_id": str(n), "title": "t", "x": v} for n, v in enumerate(values)]
        table = read_catalogue(write(tmp_path / f"{number}.jsonl", rows))
        assert table.x.tolist() == [json.dumps(value) for value in values]
