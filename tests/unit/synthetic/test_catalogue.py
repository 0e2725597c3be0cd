"""The generated catalogue: frozen as version 1, deterministic, streaming, restartable."""

import csv
import json
import tracemalloc
from collections import Counter
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from dist_train.synthetic import catalogue
from dist_train.synthetic.catalogue import generate, postings_of_block
from dist_train.synthetic.kinds import KINDS
from dist_train.synthetic.photos import photo_number, photograph
from dist_train.synthetic.products import LARGEST_GROUP, products_of_block
from dist_train.synthetic.sizes import Size, spellings
from shards.storage.errors import BadInput

TABLE_OF_2000 = "8740b427f203279b8742e1c2f742ec6b6c23d8e65d62c259ff6c3401dbb91e95"
PHOTOS_OF_SEED_1 = "d3802864fb0ef1bed7e64070563083988e777b6cf5585fa580714e780543ae3f"


def rows_of(folder: Path) -> list[dict]:
    with (folder / "catalogue.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def titles_2000(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "c"
    generate(folder, 2000, photos=False)
    return folder


@pytest.fixture(scope="module")
def photos_40(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "c"
    generate(folder, 40)
    return folder


def test_version_1_of_the_table_is_frozen(titles_2000):
    assert sha256((titles_2000 / "catalogue.csv").read_bytes()).hexdigest() == TABLE_OF_2000


def test_version_1_of_the_photos_is_frozen():
    """The pixels of the first photo of the first product of every shape in the first blocks.

    Pixels, not files: the entropy coder may change with the JPEG library, the decoded
    picture should not. Another Pillow or FreeType may still draw text otherwise, so this
    holds for the Pillow that the project pins.
    """
    first = {}
    for product in (p for block in range(3) for p in products_of_block(1, block)):
        first.setdefault(product.line.shape, product)
    assert set(first) == {shape for kind in KINDS for shape in kind.shapes}
    seen = sha256()
    for shape in sorted(first):
        picture = Image.open(BytesIO(photograph(first[shape], 0)))
        seen.update(f"{shape} {picture.size}".encode() + picture.tobytes())
    assert seen.hexdigest() == PHOTOS_OF_SEED_1


def test_rows_are_exactly_as_many_as_asked_and_ids_are_unique(titles_2000, photos_40):
    for folder, items in ((titles_2000, 2000), (photos_40, 40)):
        rows = rows_of(folder)
        assert len(rows) == items
        assert len({row["posting_id"] for row in rows}) == items
        assert all(row["title"].strip() for row in rows)
        assert list(rows[0]) == ["posting_id", "image", "title", "label_group"]


def test_a_small_catalogue_is_the_beginning_of_a_large_one(titles_2000, photos_40, tmp_path):
    generate(tmp_path / "large", 5500, photos=False)
    large = (tmp_path / "large" / "catalogue.csv").read_bytes()
    assert large.startswith((titles_2000 / "catalogue.csv").read_bytes())
    generate(tmp_path / "few", 25)
    few = tree_of(tmp_path / "few" / "images")
    many = tree_of(photos_40 / "images")
    assert len(few) == 25
    assert few.items() <= many.items()


def test_another_seed_gives_another_catalogue(titles_2000, tmp_path):
    generate(tmp_path / "c", 2000, seed=2, photos=False)
    mine = {row["title"] for row in rows_of(tmp_path / "c")}
    assert len(mine & {row["title"] for row in rows_of(titles_2000)}) < 20


@pytest.mark.timeout(60)
def test_the_number_of_workers_changes_nothing(tmp_path):
    generate(tmp_path / "one", 3030, photos=False, workers=1)
    generate(tmp_path / "two", 3030, photos=False, workers=2)
    assert tree_of(tmp_path / "one") == tree_of(tmp_path / "two")
    generate(tmp_path / "one-photos", 12, workers=1)
    generate(tmp_path / "two-photos", 12, workers=2)
    assert tree_of(tmp_path / "one-photos") == tree_of(tmp_path / "two-photos")


def test_images_of_the_table_are_the_files_of_the_folder(photos_40):
    named = {row["image"] for row in rows_of(photos_40)}
    assert named == set(tree_of(photos_40 / "images"))
    for name in named:
        with Image.open(photos_40 / "images" / name) as picture:
            picture.load()
            assert picture.format == "JPEG"
            assert 320 <= min(picture.size) <= max(picture.size) <= 480


def test_groups_are_mostly_pairs_with_a_long_tail():
    sizes = Counter(p.postings for block in range(20) for p in products_of_block(1, block))
    groups = sum(sizes.values())
    assert sum(size * count for size, count in sizes.items()) == 20_000
    assert min(sizes) == 2
    assert 40 <= max(sizes) <= LARGEST_GROUP
    assert 0.55 < sizes[2] / groups < 0.67
    assert sizes[2] > sizes[3] > sizes[4] > sizes[6] > sizes[12]


def test_variants_of_a_line_differ_in_size_or_colour_and_in_their_group():
    lines: dict = {}
    for product in (p for block in range(4) for p in products_of_block(1, block)):
        lines.setdefault(product.line.number, []).append(product)
    only_size = only_tint = 0
    for products in lines.values():
        assert len({(p.size, p.tint) for p in products}) == len(products)
        assert len({p.label_group for p in products}) == len(products)
        for one, other in pairwise(products):
            only_size += one.tint == other.tint
            only_tint += one.size == other.size
    assert only_size > 100
    assert only_tint > 100


def test_several_lines_share_a_brand_and_several_brands_a_kind():
    products = [p for block in range(2) for p in products_of_block(1, block)]
    lines = {p.line.number: p.line for p in products}.values()
    of_brand = Counter(line.brand.name for line in lines)
    brands_of_kind = Counter(kind for kind, _ in {(line.kind, line.brand) for line in lines})
    assert sum(count > 1 for count in of_brand.values()) > 50
    assert sum(count > 1 for count in brands_of_kind.values()) > 40


def test_a_twelfth_of_the_postings_reuses_a_file_of_its_product():
    postings = [posting for block in range(10) for posting in postings_of_block(1, block)]
    copies = sum(photo_number(p.product, p.serial) != p.serial for p in postings)
    assert 0.06 < copies / len(postings) < 0.10


def test_a_reused_file_has_the_same_bytes_under_its_own_name(tmp_path):
    postings = postings_of_block(1, 0)
    of_key = {(p.product.number, p.serial): p for p in postings}
    copy = next(p for p in postings if photo_number(p.product, p.serial) != p.serial)
    source = of_key[copy.product.number, photo_number(copy.product, copy.serial)]
    fresh = next(p for p in postings if p.product == copy.product and p not in (copy, source))
    catalogue._write_photos(tmp_path / "00000", [fresh, copy, source])
    files = [(tmp_path / p.image).read_bytes() for p in (source, copy, fresh)]
    assert files[0] == files[1] != files[2]


def test_sizes_are_written_in_many_ways():
    assert {"250gr", "250 gram", "0,25 kg", "0.25kg"} <= set(spellings(Size(250, "g")))
    assert {"1 lusin", "isi 12"} <= set(spellings(Size(12, "pcs")))


def test_titles_carry_emoji_literal_escapes_and_promotion(titles_2000):
    titles = [row["title"] for row in rows_of(titles_2000)]
    assert sum("\\x" in title for title in titles) > 20
    assert sum(any(ord(sign) > 0x2000 for sign in title) for title in titles) > 50
    assert sum("cod" in title.lower().split() for title in titles) > 10


@pytest.mark.timeout(60)
def test_memory_does_not_grow_with_the_number_of_items(tmp_path):
    generate(tmp_path / "warm", 1000, photos=False)
    peaks = []
    for items in (4000, 20_000):
        tracemalloc.start()
        generate(tmp_path / str(items), items, photos=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match=r"thesis\.tex.*--out") as refusal:
        generate(tmp_path, 10, photos=False)
    assert str(tmp_path) in str(refusal.value)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(BadInput, match="is a file"):
        generate(tmp_path / "thesis.tex", 10, photos=False)


@pytest.mark.parametrize("other", [{"items": 11}, {"seed": 2}, {"photos": True}])
def test_another_generated_catalogue_is_refused(tmp_path, other):
    generate(tmp_path, 10, seed=1, photos=False)
    with pytest.raises(BadInput, match="another generated catalogue"):
        generate(tmp_path, **{"items": 10, "seed": 1, "photos": False, **other})


@pytest.mark.parametrize("wrong", [{"items": 0}, {"items": 5, "workers": 0}])
def test_numbers_below_one_are_refused(tmp_path, wrong):
    with pytest.raises(BadInput, match="at least 1"):
        generate(tmp_path, **wrong)


def test_a_finished_catalogue_is_left_as_it_is(tmp_path, monkeypatch):
    generate(tmp_path, 10, photos=False)
    monkeypatch.setattr(catalogue, "_make_block", None)
    generate(tmp_path, 10, photos=False)
    assert json.loads((tmp_path / "generated.json").read_text())["version"] == 1


@pytest.mark.parametrize("killed_at", [0, 7])
def test_a_run_after_a_kill_finishes_with_the_same_bytes(tmp_path, monkeypatch, killed_at):
    generate(tmp_path / "whole", 15)
    taken = []

    def killed(product, number):
        if len(taken) == killed_at:
            raise KeyboardInterrupt
        taken.append(number)
        return photograph(product, number)

    monkeypatch.setattr(catalogue, "photograph", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "cut", 15)
    assert not (tmp_path / "cut" / "catalogue.csv").exists()
    monkeypatch.undo()
    generate(tmp_path / "cut", 15)
    assert tree_of(tmp_path / "cut") == tree_of(tmp_path / "whole")


def test_a_kill_before_the_first_file_has_its_name_is_no_foreign_folder(tmp_path):
    (tmp_path / ".generated.json.tmp-host-123").write_text('{"ver')
    generate(tmp_path, 5, photos=False)
    assert len(rows_of(tmp_path)) == 5


def test_finished_blocks_are_not_photographed_again(tmp_path, monkeypatch):
    generate(tmp_path, 5)
    whole = tree_of(tmp_path)
    (tmp_path / "catalogue.csv").unlink()
    monkeypatch.setattr(catalogue, "photograph", None)
    generate(tmp_path, 5)
    assert tree_of(tmp_path) == whole
