"""Every stage reads the files that the stages before it wrote from awkward small catalogues."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shards.catalogue.split import split_of
from tests.support.tars import write_tar
from tests.support.verbs import Said, call

Row = list[str]
NAMES = ["posting_id", "image", "title", "label_group"]
PHOTOS = [f"p{n}.jpg" for n in range(20)]
HOSTILE = [
    '<script>alert("x")</script>', "line\nbreak", 'quo"te', "x" * 9000, "日本語 製品", "👍🏽 bagus",
    "caf\\xc3\\xa9", "{{ 7 * 7 }}", "{% raw %}", "' OR 1=1; --", "\u202egnp.jpg", "tab\tbed",
    "</html>", "=cmd()", "%s %d", "../..", "/etc/passwd", "&amp;", "a,b;c|d", "\r\n",
]  # fmt: skip
NUMBERS = [
    "1", "2", "007", "7", "1.0", "1e5", "100000", "inf", "0x10", "1_000", "True", "False",
    "2020-01-01", "9007199254740993", "9007199254740992", "+1", "0", "-2", "1,5", ".5",
]  # fmt: skip


def shop(label: Callable[[int], str] = lambda n: f"g{n}") -> list[Row]:
    """Twenty products of two postings, both modalities."""
    return [
        [f"i{n}-{k}", f"p{n}.jpg", f"thing {n} of kind {k}", label(n)]
        for n in range(20)
        for k in range(2)
    ]


def labels_of(*splits: str) -> list[str]:
    """Twenty labels whose products are of these splits in turn."""
    found = {s: [f"L{n}" for n in range(999) if split_of(f"L{n}") == s] for s in splits}
    return [found[splits[n % len(splits)]][n] for n in range(20)]


def changed(change: Callable[[int, Row], object], rows: list[Row] | None = None) -> list[Row]:
    """The shop, or `rows`, after `change(number, row)` of every row."""
    rows = rows or shop()
    for number, row in enumerate(rows):
        change(number, row)
    return rows


def one_modality(number: int, row: Row) -> None:
    row[1 + number % 2] = ""


def rename(names: list[str]) -> Callable[[int, Row], object]:
    """The id, title and label of every product are one of the names, with a mark on the id."""

    def change(number: int, row: Row) -> None:
        name = names[number // 2]
        row[0], row[2], row[3] = f"{name}{'~' * (number % 2)}", f"{name} {number % 2}", name

    return change


TEST, VAL, LONE = labels_of("test"), labels_of("val"), labels_of("test", "val")
CATALOGUES: dict[str, list[Row]] = {
    "rejected postings first, between and last": [
        ["r0", "", "", "g0"], *shop()[:9], ["r1", "none.jpg", "", "g1"], *shop()[9:],
        ["r2", "", "  ", ""],
    ],
    "all but one rejected": [["a", "", "", "g"], ["b", "p1.jpg", "x", "g"], ["c", "", "", ""]],
    "the only test product rejected": [*shop(lambda n: ""), ["t", "", "", TEST[0]]],
    "one modality each": changed(one_modality),
    "no photo": changed(lambda n, row: row.__setitem__(1, "")),
    "no title": changed(lambda n, row: row.__setitem__(2, "")),
    "no labels": shop(lambda n: ""),
    "only train": shop(lambda n: labels_of("train")[n]),
    "only val": shop(lambda n: VAL[n]),
    "only test": shop(lambda n: TEST[n]),
    "no val": shop(lambda n: labels_of("train", "test")[n]),
    "no test": shop(lambda n: labels_of("train", "val")[n]),
    "no train": shop(lambda n: LONE[n]),
    "hostile": changed(rename(HOSTILE)),
    "ids that look like numbers": changed(rename(NUMBERS)),
    "titles without a word": changed(lambda n, row: row.__setitem__(2, "!?." * (1 + n % 5))),
    "no pair at all": [
        ["a", "", "x", LONE[0]], ["b", "p1.jpg", "", LONE[2]],
        ["c", "", "y", LONE[1]], ["d", "p2.jpg", "", LONE[3]],
    ],
    "one posting": [["a", "p1.jpg", "x", TEST[0]]],
    "two postings, one rejected": [["a", "p1.jpg", "x", TEST[0]], ["b", "", "", TEST[0]]],
    "every posting the same": [[f"i{n}", "p0.jpg", "same", f"g{n // 2}"] for n in range(40)],
    "one product": [[f"i{n}", f"p{n % 20}.jpg", f"x {n}", TEST[0]] for n in range(40)],
    "every product alone": [[f"i{n}", f"p{n}.jpg", f"x {n}", LONE[n]] for n in range(20)],
}  # fmt: skip


class Chain:
    """The stages behind a pack, from the untrained encoders to the report."""

    def __init__(self, out: Path, encoders: dict[str, Path]) -> None:
        self.out, self.encoders = out, encoders

    def done(self, *words: object) -> Said:
        """A verb that must end well."""
        said = call(*words)
        assert said.code == 0, f"{words[0]}: {said.text}"
        return said

    def pack(self, rows: list[Row], photos: Path) -> None:
        table = pd.DataFrame(rows, columns=NAMES)
        table.to_csv(self.out / "c.csv", index=False)
        with_photos = ["--images", photos] if (table.image != "").any() else []
        self.done("pack", self.out / "c.csv", "--out", self.out / "s", "--size", 32, *with_photos)

    def join(self, *modalities: str) -> None:
        given = [word for name in modalities for word in (f"--{name}", self.encoders[name])]
        e, i, p = (self.out / name for name in "eip")
        self.done("embed", "--shards", self.out / "s", *given, "--out", e, "--workers", 0)
        self.done("index", e, "--out", i)
        self.done("join", e, "--index", i, "--out", p)

    def match(self, name: str, *options: object) -> pd.DataFrame:
        """Match, evaluate and report; matches.parquet, checked against the catalogue."""
        m = self.out / name
        self.done("match", self.out / "p", "--out", m, *options)
        evaluated = call("evaluate", m, "--compare", f"again={self.out / 'e'}")
        items = pd.read_parquet(self.out / "e" / "items.parquet")
        is_test = (items.split == "test") & (items.label_group.fillna("") != "")
        assert evaluated.code == (0 if is_test.any() else 2), evaluated.text
        self.done("report", m)
        matches = pd.read_parquet(m / "matches.parquet")
        _check_matches(matches, items)
        page = (m / "report.html").read_text()
        matched = (matches.matches.map(len) > 1).sum()
        assert f"{matched} of {len(matches)} postings found a match" in page
        assert "<script" not in page.split("</style>")[1]
        return matches


def _check_matches(matches: pd.DataFrame, items: pd.DataFrame) -> None:
    """One row a catalogue row; itself first; each pair in both lists; a rejected one alone."""
    assert matches.posting_id.tolist() == items.posting_id.tolist()
    pairs = set()
    for posting, row, found in zip(matches.posting_id, items.row, matches.matches, strict=True):
        assert found[0] == posting
        assert row >= 0 or len(found) == 1
        pairs |= {(posting, other) for other in found[1:]}
    assert pairs == {(other, posting) for posting, other in pairs}


@pytest.mark.parametrize("name", CATALOGUES)
def test_every_stage_reads_what_the_others_wrote(
    name: str, photos: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    rows, chain = CATALOGUES[name], Chain(tmp_path, encoders)
    chain.pack(rows, photos)
    table = pd.DataFrame(rows, columns=NAMES)
    packed = table[
        (table.image.isin([f"p{n}.jpg" for n in range(20)])) | (table.title.str.strip() != "")
    ]
    has = {"image": (packed.image != "").any(), "text": (packed.title != "").any()}
    chain.join(*(modality for modality in has if has[modality]))
    ids = chain.match("m", "--threshold", 0.9).posting_id.tolist()
    assert ids == table.posting_id.tolist()
    items = pd.read_parquet(tmp_path / "e" / "items.parquet")
    assert set(items.posting_id[items.row >= 0]) == set(packed.posting_id)
    nothing = chain.match("nothing", "--threshold", 1.0)
    assert nothing.matches.map(len).sum() <= len(rows) * (len(rows) if "same" in name else 2)


@pytest.mark.parametrize("name", ["rejected postings first, between and last", "no pair at all"])
def test_everything_one_match(
    name: str, photos: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    chain = Chain(tmp_path, encoders)
    chain.pack(CATALOGUES[name], photos)
    chain.join("image", "text")
    floor = json.loads((tmp_path / "p" / "proof.json").read_text())["score_floor"]
    matches = chain.match("m", "--threshold", floor)
    if name != "no pair at all":
        assert (matches.matches.map(len) > 1).sum() > 30
    groups = pd.read_parquet(tmp_path / "m" / "groups.parquet")
    assert groups.posting_id.tolist() == matches.posting_id.tolist()


def test_test_products_that_cannot_be_scored_do_not_end_a_run(
    photos: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    """One photo under every product: no test posting is new to the encoders."""
    rows = changed(lambda n, row: row.__setitem__(1, "p0.jpg"))
    pd.DataFrame(rows, columns=NAMES).to_csv(tmp_path / "c.csv", index=False)
    ended = call(
        "run", "--catalogue", tmp_path / "c.csv", "--images", photos, "--out", tmp_path / "o",
        "--encoders", "image", "--image.encoder.model", tiny_vit, "--image.encoder.image-size", 32,
        "--image.epochs", 0, "--image.batch-size", 8, "--image.workers", 0, "--embed.workers", 0,
        "--match.threshold", 0.5,
    )  # fmt: skip
    assert ended.code == 0, ended.text
    metrics = json.loads((tmp_path / "o" / "matches" / "metrics.json").read_text())
    test = [label for *_, label in rows if split_of(label) == "test"]
    assert (metrics["items"], metrics["left_out"], metrics["rows"]) == (0, len(test), [])
    assert f"none of the {len(test)} labelled test postings can be scored" in ended.text
    assert (tmp_path / "o" / "matches" / "report.html").exists()


def test_ids_with_blanks_are_told_of(
    photos: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    """submission.csv parts the ids of a list by blanks."""
    chain = Chain(tmp_path, encoders)
    rows = changed(lambda n, row: row.__setitem__(0, f"id {n}") if n % 2 else None)
    chain.pack(rows, photos)
    chain.join("text")
    said = chain.done("match", tmp_path / "p", "--out", tmp_path / "m", "--threshold", 0.5)
    assert "20 posting ids hold blanks, such as 'id 1'" in said.text


# ── tars of other tools


def facts(number: int, **known: object) -> dict[str, bytes]:
    return {f"x{number}.json": json.dumps(known).encode()}


TARS: dict[str, tuple[Callable[[int], dict[str, bytes]], tuple[str, ...]]] = {
    "photos only": (lambda n: {}, ("image",)),
    "photos and cls": (lambda n: {f"x{n}.cls": str(n // 2).encode()}, ("image",)),
    "null in json": (lambda n: facts(n, title=None, label_group=None), ("image",)),
    "numbers in json": (lambda n: facts(n, title=n, label_group=float(n // 2)), ("image", "text")),
    "some titles": (lambda n: {f"x{n}.txt": b"thing"} if n % 3 else {}, ("image", "text")),
}


@pytest.mark.parametrize("kind", TARS)
def test_every_stage_reads_a_set_of_tars_of_others(
    kind: str, photos: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    members, modalities = TARS[kind]
    for number, first in enumerate((0, 10)):
        found: dict[str, bytes] = {}
        for n in range(first, first + 10):
            found |= {f"x{n}.jpg": (photos / f"p{n}.jpg").read_bytes()} | members(n)
        write_tar(tmp_path / "s" / f"{number}.tar", found.items())
    chain = Chain(tmp_path, encoders)
    chain.done("index-tars", tmp_path / "s")
    chain.join(*modalities)
    assert len(chain.match("m", "--threshold", 0.9)) == 20


# ── typed columns, and columns with the names of ours


def test_every_stage_reads_a_parquet_catalogue_of_many_types(
    photos: Path, encoders: dict[str, Path], tmp_path: Path
) -> None:
    n = np.arange(40)
    table = pd.DataFrame(shop(), columns=NAMES)
    table["posting_id"], table["title"] = n + 2**53, table.title.astype("category")
    table["label_group"] = pd.array([None if k % 7 == 0 else k // 2 for k in n], dtype="Int64")
    table = table.assign(row=n[::-1], status="x", score=None, has_image="no", lists=[[1]] * 40)
    table.to_parquet(tmp_path / "c.parquet")
    chain = Chain(tmp_path, encoders)
    chain.done("pack", tmp_path / "c.parquet", "--images", photos, "--out", tmp_path / "s")
    chain.join("image", "text")
    assert chain.match("m", "--threshold", 0.9).posting_id.tolist() == [str(k + 2**53) for k in n]
