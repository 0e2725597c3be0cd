"""The report of small match directories written out by hand."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from dist_train.decisions.metrics_file import write_scores
from dist_train.distributed import stage
from dist_train.distributed.stage import EMBEDDING, MATCHES, parents_for
from dist_train.evaluation.f1_curve import f1_curve
from dist_train.report import galleries
from dist_train.report.html import gather, render, write_report
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import write_json
from tests.support.match_tables import groups_table

HOSTILE = '<script>alert("x")</script> & <img src=https://example.org/a.png onerror=x>'


class DrawnPhotos:
    """A shard set of plain coloured photos; the postings named have none, or a broken one."""

    def __init__(self, without=(), broken=()):
        self.without, self.broken, self.asked = without, broken, []

    def photo(self, posting_id: str) -> bytes | None:
        self.asked.append(posting_id)
        if posting_id in self.without:
            return None
        out = io.BytesIO()
        Image.new("RGB", (640, 320), "teal").save(out, "JPEG")
        return b"no JPEG" if posting_id in self.broken else out.getvalue()


def gathered(matches: Path, photos: DrawnPhotos):
    """What the report shows where these are the photos of the shard set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(galleries, "parent_location", lambda path, name, given: path)
        patch.setattr(galleries, "ShardSet", lambda location: photos)
        return gather(matches)


def write_stage(path: Path, kind: str, parents: dict, write) -> None:
    stage_files.begin(path, kind, {}, parents)
    write()
    files = [file for file in path.rglob("*.*") if file.name not in ("stage.json", "status.json")]
    stage_files.finish(path, {}, files)


def write_matches(root: Path, items, pairs, threshold=0.5, **parents: Path) -> Path:
    """A match directory: items posting_id, label_group, split, title; pairs i, j, score;
    parents of its embedding set."""
    embedding, joined, matches = root / "embedding", root / "pairs", root / "matches"

    def write_embedding():
        items.to_parquet(embedding / "items.parquet", index=False)

    write_stage(embedding, EMBEDDING, parents_for(embedding, **parents), write_embedding)
    known = parents_for(joined, embedding=embedding)
    write_stage(joined, stage.PAIRS, known, lambda: _fill_pairs(joined, pairs))
    known = parents_for(matches, pairs=joined)
    write_stage(matches, MATCHES, known, lambda: _fill(matches, items, pairs, threshold))
    return matches


def _fill_pairs(joined: Path, pairs: pd.DataFrame) -> None:
    (joined / "pairs").mkdir()
    weights = {"image": 0.5, "text": 0.5}
    write_json(joined / "proof.json", {"score_floor": 0.0, "weights": weights})
    half = len(pairs) // 2
    for number, part in enumerate((pairs[:half], pairs[half:])):
        part.to_parquet(joined / "pairs" / f"{number}.parquet", index=False)


def _fill(matches: Path, items: pd.DataFrame, pairs: pd.DataFrame, threshold: float) -> None:
    lists = {name: ([name], [1.0]) for name in items["posting_id"]}
    embedded = items[items["row"] >= 0]
    names = dict(zip(embedded["row"], embedded["posting_id"], strict=True))
    for pair in pairs[pairs["score"] >= threshold].itertuples():
        for one, other in ((pair.i, pair.j), (pair.j, pair.i)):
            lists[names[one]][0].append(names[other])
            lists[names[one]][1].append(pair.score)
    table = pd.DataFrame({"posting_id": list(lists)})
    table["matches"] = [found for found, _ in lists.values()]
    table["scores"] = [scores for _, scores in lists.values()]
    table.to_parquet(matches / "matches.parquet", index=False)
    groups = groups_table(items, pairs[pairs["score"] >= threshold])
    groups.to_parquet(matches / "groups.parquet", index=False)
    write_threshold(matches, items, pairs, threshold)


def write_threshold(matches, items, pairs, threshold) -> None:
    embedded = items[items["row"] >= 0]
    curve = None
    if (embedded["label_group"] != "").all():
        scored = f1_curve(
            embedded["label_group"].to_numpy(), pairs["i"], pairs["j"], pairs["score"]
        )
        curve = scored.as_json()
    known = {
        "format": 5,
        "threshold": threshold,
        "form": "score",
        "score_threshold": threshold,
        "no_model": "there are too few val products",
        "gain": None,
        "candidates": None,
        "groups_cut": 0.5,
        "source": "chosen" if curve else "given",
        "objective": "mean per-item F1",
        "split": "val",
        "items": len(items),
        "products": 3,
        "f1": 0.9 if curve else None,
        "weights": {"image": 0.5, "text": 0.5},
        "score_floor": 0.2,
        "curve": curve,
    }
    (matches / "threshold.json").write_text(json.dumps(known))


def write_metrics(matches: Path, names=("self-match", "image and text")) -> None:
    kinds = ["baseline"] * (len(names) - 1) + ["ours"]
    rows = [
        {
            "name": name,
            "kind": kind,
            "f1": 0.5 + 0.4 * (kind == "ours"),
            "low": 0.45 + 0.4 * (kind == "ours"),
            "high": 0.55 + 0.4 * (kind == "ours"),
            "precision": 0.99,
            "recall": 0.77,
            "threshold": 0.5 if kind == "ours" else None,
            "items": 6,
        }
        for name, kind in zip(names, kinds, strict=True)
    ]
    bands = [
        {"size_from": 2, "size_to": 2, "items": 4, "f1": 0.9},
        {"size_from": 20, "size_to": 31, "items": 31, "f1": 0.4},
    ]
    known = {"format": 1, "split": "test", "items": 6, "products": 3, "threshold": 0.5}
    known |= {"left_out": 2, "rows": rows, "by_group_size": bands, "differences": []}
    delivered = [row | {key: row[key] - 0.2 for key in ("f1", "low", "high")} for row in rows]
    known["delivered"] = {
        "postings": 9, "labelled": 6, "items": 7, "products": 3,
        "largest_group": 5, "largest_product": 4, "rows": delivered, "differences": [],
    }  # fmt: skip
    write_scores(Folder(matches, MATCHES), known)


def shop(labels: str, split="test", titles=None) -> pd.DataFrame:
    """Items p0, p1, ... one a letter; "-" has no label; one rejected posting at the end."""
    n = len(labels)
    rows = {
        "row": [*range(n), -1],
        "posting_id": [*(f"p{k}" for k in range(n)), "rejected"],
        "label_group": [*(letter.replace("-", "") for letter in labels), "z"],
        "split": [split] * (n + 1),
        "title": [*(titles or [f"title {k}" for k in range(n)]), ""],
    }
    return pd.DataFrame(rows)


def scored(*pairs) -> pd.DataFrame:
    """(i, j, score) each; the image scores a little higher and the text a little lower."""
    table = pd.DataFrame(pairs, columns=["i", "j", "score"])
    table["score_image"], table["score_text"] = table["score"] + 0.05, table["score"] - 0.05
    return table.astype({"i": "int64", "j": "int64", "score": "float32"})


# a: 0 1 2   b: 3 4   c: 5 6
SHOP = "aaabbcc"
PAIRS = scored((0, 1, 0.9), (0, 3, 0.8), (1, 2, 0.4), (3, 4, 0.6), (2, 4, 0.3))


@pytest.fixture
def matches(tmp_path):
    found = write_matches(tmp_path, shop(SHOP), PAIRS)
    write_metrics(found)
    return found


def shown(data) -> dict:
    """(left, right) of every card, by gallery."""
    return {
        gallery.kind: [(card.left.posting_id, card.right.posting_id) for card in gallery.cards]
        for gallery in data.galleries
    }


def test_galleries_hold_the_right_pairs(matches):
    data = gathered(matches, DrawnPhotos())
    assert shown(data) == {
        "right": [("p0", "p1"), ("p3", "p4")],
        "wrong": [("p0", "p3")],
        "missed": [("p1", "p2"), ("p0", "p2"), ("p5", "p6")],
    }
    assert [gallery.total for gallery in data.galleries] == [2, 1, 3]


def test_cards_carry_scores_and_pairs_never_scored_have_none(matches):
    right, _, missed = gathered(matches, DrawnPhotos()).galleries
    best = right.cards[0]
    assert best.score == pytest.approx(0.9)
    assert (best.score_image, best.score_text) == pytest.approx((0.95, 0.85))
    last = missed.cards[-1]
    assert (last.score, last.score_image, last.score_text) == (None, None, None)
    assert "never scored" in render(gathered(matches, DrawnPhotos()))


def test_counts_are_of_the_whole_catalogue(matches):
    data = gathered(matches, DrawnPhotos())
    assert (data.postings, data.matched) == (8, 4)
    assert (data.groups, data.largest_group) == (1, 4)
    assert (data.histogram.right.sum(), data.histogram.wrong.sum()) == (3, 2)


def test_only_test_items_are_shown(tmp_path):
    """Training products look better than new ones will."""
    items = shop(SHOP)
    items.loc[[0, 1, 2], "split"] = "train"
    data = gathered(write_matches(tmp_path, items, PAIRS), DrawnPhotos())
    assert shown(data) == {"right": [("p3", "p4")], "wrong": [], "missed": [("p5", "p6")]}
    assert data.shown_split == "test"


def test_unlabelled_items_are_neither_right_nor_wrong(tmp_path):
    data = gathered(write_matches(tmp_path, shop("aaa-bcc"), PAIRS), DrawnPhotos())
    assert shown(data)["wrong"] == []
    assert data.histogram.wrong.sum() == 1


def test_a_catalogue_without_labels_shows_its_best_matches(tmp_path):
    matches = write_matches(tmp_path, shop("-------"), PAIRS)
    data = gathered(matches, DrawnPhotos())
    # three matches of one group, of which two are shown
    assert shown(data) == {"matches": [("p0", "p1"), ("p0", "p3")]}
    assert data.galleries[0].cards[1].score_image == pytest.approx(0.85)
    page = render(data)
    assert "no labelled" in page
    assert "F1" not in page.split("</style>")[1]


def test_a_catalogue_without_any_match_has_a_report(tmp_path):
    page = render(gathered(write_matches(tmp_path, shop("--"), PAIRS[:0]), DrawnPhotos()))
    assert "0 of 3 postings found a match" in page
    assert "There are none" in page


class References(HTMLParser):
    """Every tag, and everything a browser would fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.fetched, self.handlers = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    titles = [HOSTILE] * 7
    matches = write_matches(tmp_path, shop(SHOP, titles=titles), PAIRS)
    write_metrics(matches, names=(HOSTILE, HOSTILE))
    page = render(gathered(matches, DrawnPhotos(without=["p0"])))
    found = References(page)
    assert "script" not in found.tags
    assert found.handlers == []
    assert "&lt;script&gt;alert" in page


def test_the_page_fetches_nothing(matches):
    page = render(gathered(matches, DrawnPhotos()))
    found = References(page).fetched
    assert len(found) == 12
    assert all(value.startswith("data:image/jpeg;base64,") for value in found)
    assert not re.search(r"@import|url\(|https?://", page)


def size_of(photo: str) -> tuple[int, int]:
    encoded = photo.removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return image.size


def test_photos_are_small_and_only_those_shown_are_read(matches):
    photos = DrawnPhotos()
    card = gathered(matches, photos).galleries[0].cards[0]
    assert size_of(card.left.photo) == (160, 80)
    assert sorted(photos.asked) == [f"p{k}" for k in range(7)]


def test_a_missing_or_broken_photo_and_a_missing_title_have_a_place(tmp_path):
    matches = write_matches(tmp_path, shop("aa", titles=["", "tea"]), scored((0, 1, 0.9)))
    page = render(gathered(matches, DrawnPhotos(without=["p0"], broken=["p1"])))
    assert page.count("no photo") == 2
    assert page.count("no title") == 1
    assert "<img" not in page


def test_photos_come_from_the_shard_set_of_the_embeddings(tmp_path):
    Image.new("RGB", (320, 640), "teal").save(tmp_path / "0.png")
    rows = {"posting_id": ["p0", "p1"], "image": ["0.png", ""], "title": ["tea", "tea"]}
    pd.DataFrame(rows).to_csv(tmp_path / "shop.csv", index=False)
    pack(tmp_path / "shop.csv", tmp_path, tmp_path / "shards", PackOptions())
    pairs = scored((0, 1, 0.9))
    matches = write_matches(tmp_path, shop("aa"), pairs, shards=tmp_path / "shards")
    data = gather(matches)
    card = data.galleries[0].cards[0]
    assert size_of(card.left.photo) == (80, 160)
    assert card.right.photo is None
    assert data.photos_missing is None


def test_without_its_shard_set_the_report_says_so(matches):
    write_report(matches)
    page = (matches / "report.html").read_text()
    assert "Photos are missing here" in page
    assert "was not made from any shards" in page
    assert "<img" not in page


def test_the_report_is_written_whole_and_names_its_scores(matches):
    path = write_report(matches)
    assert path == matches / "report.html"
    page = path.read_text()
    assert page.rstrip().endswith("</html>")
    assert [p.name for p in matches.iterdir() if "tmp" in p.name] == []
    for text in ("4 of 8 postings", "0.900", "0.850–0.950", "20–31", "self-match", "0.400 above"):
        assert text in page
    # As delivered stands first: its F1 in the head and its interval, then that of the test items.
    head = page[: page.index("<main>")]
    assert "F1 as delivered" in head
    assert "0.700" in head
    assert "0.650–0.750" in head
    assert "0.850–0.950" not in head
    for text in (
        "9 postings: every match",
        "3 postings have no label",
        "of matches with them as many",
    ):
        assert text in page
    assert page.index("As delivered</h2>") < page.index("Among the test items alone</h2>")


def test_a_match_by_the_pair_model_shows_both_of_its_thresholds(matches):
    """Of the probability in the head and the curve, of the score alone among the scores."""
    decided = json.loads((matches / "threshold.json").read_text())
    by_model = {"form": "pair model", "threshold": 0.45, "score_threshold": 0.75, "no_model": None}
    data = gathered(matches, DrawnPhotos())
    page = render(replace(data, threshold=decided | by_model))
    head = page[: page.index("<main>")]
    assert "the probability that they are one product" in head
    assert "<b>0.450</b>" in head
    assert "image cosine" not in head
    curve, histogram = re.findall(r"<svg.*?</svg>", page[page.index("<main>") :], re.DOTALL)[:2]
    assert ("0.450" in curve, "0.750" in curve) == (True, False)
    assert ("0.450" in histogram, "0.750" in histogram) == (False, True)


def test_escapes_in_titles_are_read(tmp_path):
    items = shop("aa", titles=["caf\\xc3\\xa9", "tea"])
    page = render(gathered(write_matches(tmp_path, items, scored((0, 1, 0.9))), DrawnPhotos()))
    assert "café" in page


def test_rows_that_are_not_each_once_are_refused(tmp_path):
    items = shop("aab")
    items.loc[2, "row"] = 1
    matches = write_matches(tmp_path, items, scored((0, 1, 0.9)))
    with pytest.raises(BadInput, match="each once"):
        gathered(matches, DrawnPhotos())
