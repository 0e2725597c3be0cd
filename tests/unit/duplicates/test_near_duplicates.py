"""Twins: every pair of near photos is found, against a comparison of every two."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.near_duplicates import (
    COPIES,
    are_near_duplicates,
    jpeg,
    photo_groups,
    signatures_of,
)
from dist_train.evaluation.labelled import labelled_rows, near_duplicates_across_splits
from shards.catalogue.split import split_of
from shards.duplicates import hamming as near_module
from shards.duplicates.hamming import near_pairs
from shards.duplicates.near_duplicates import (
    BRIGHTNESS,
    CHANNELS,
    COLOURS,
    RADIUS,
)
from shards.pack.items import connect, count_items, create_items, describe_near_duplicates
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo
from shards.storage.scratch import scratch

NO_PHOTO = -1
HASH = st.integers(0, 2**64 - 1)
# Few bits in few places, so that a good part of the pairs are near the bound.
NEARBY = st.lists(st.sampled_from([0, 1, 2, 21, 22, 42, 43, 62, 63]), max_size=8).map(
    lambda bits: sum(1 << bit for bit in set(bits))
)


def near(one: int, other: int, radius: int) -> bool:
    return (one ^ other).bit_count() <= radius


@given(st.lists(st.one_of(HASH, NEARBY), max_size=24), st.integers(0, 9))
@example([0, 0, 2**64 - 1], 0)
@settings(max_examples=60, deadline=None)
def test_every_near_pair_is_given_once(hashes, radius):
    array = np.array(hashes, np.uint64)
    found = [p for i, j in near_pairs(array, radius) for p in zip(i, j, strict=True)]
    pairs = [(int(min(pair)), int(max(pair))) for pair in found]
    n = range(len(hashes))
    wanted = [(a, b) for a in n for b in n if a < b and near(hashes[a], hashes[b], radius)]
    assert sorted(pairs) == wanted


def photo(bytes_: int = 0, phash: int = 0, colours=(0,) * CHANNELS) -> tuple[str, str, str]:
    return f"{bytes_:016x}{0:048x}", f"{phash:016x}", bytes(colours).hex()


def groups_of(photos: list[tuple[str, str, str]]) -> list[int]:
    return photo_groups(photos).tolist()


def colours_near(one: bytes, other: bytes) -> bool:
    apart = [a - b for a, b in zip(one, other, strict=True)]
    shift = sorted(apart)[CHANNELS // 2]
    return abs(shift) <= BRIGHTNESS and sum(abs(a - shift) for a in apart) <= COLOURS * CHANNELS


def compared(one, other) -> bool:
    if not one[0] or not other[0]:
        return False
    if one[0] == other[0]:
        return True
    if not (one[1] and other[1] and one[2] and other[2]):
        return False
    return near(int(one[1], 16), int(other[1], 16), RADIUS) and colours_near(
        bytes.fromhex(one[2]), bytes.fromhex(other[2])
    )


def components(photos: list) -> list[int]:
    """The first row of each row's component, by joining every two near-duplicates."""
    group = list(range(len(photos)))
    for a in range(len(photos)):
        for b in range(a):
            if compared(photos[a], photos[b]):
                one, other = group[a], group[b]
                group = [min(one, other) if g in (one, other) else g for g in group]
    return [g if photos[row][0] else NO_PHOTO for row, g in enumerate(group)]


COLOUR = st.tuples(st.sampled_from([0, 80, 100, 116]), st.sampled_from([0, 5, 8, 60])).map(
    lambda c: bytes([c[0]] * 14 + [c[0] + c[1]] * 13)
)
PHOTO = st.tuples(
    st.one_of(st.just(""), st.integers(0, 5).map(lambda n: f"{n:016x}{0:048x}")),
    st.one_of(st.just(""), NEARBY.map(lambda n: f"{n:016x}"), HASH.map(lambda n: f"{n:016x}")),
    st.one_of(st.just(""), COLOUR.map(bytes.hex)),
)
FRESH = st.tuples(HASH.map(lambda n: f"{n:016x}{0:048x}"), NEARBY.map(lambda n: f"{n:016x}"),
                  COLOUR.map(bytes.hex))  # fmt: skip


# Few rows at a time: the photos are sorted apart on the disk, block by block, down to crowds.
@given(st.lists(st.one_of(PHOTO, FRESH), min_size=1, max_size=16), st.sampled_from([6, 2**18]))
@settings(max_examples=50, deadline=None)
def test_groups_are_the_components_of_every_two_photos_compared(photos, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_module, "ROWS", at_once)
        assert groups_of(photos) == components(photos)


KIND = np.dtype([("place", "<i8"), ("hash", "<u8")])


@pytest.mark.parametrize("radius", [0, 6])
def test_pieces_hold_every_near_pair_once_and_few_rows(tmp_path, monkeypatch, radius):
    rng = np.random.default_rng(radius)
    rows = np.zeros(3_000, KIND)
    rows["place"] = np.arange(len(rows))
    # Most lie within a few bits of others, and half agree in all blocks but the last ones.
    rows["hash"] = rng.choice(rng.integers(0, 2**64, 40, np.uint64), len(rows))
    for _ in range(4):
        rows["hash"] ^= np.uint64(1) << rng.integers(0, 64, len(rows), np.uint64)
    rows["hash"][::2] >>= np.uint64(40)
    whole = sorted_pairs(near_pairs(rows["hash"], radius))
    rows.tofile(tmp_path / "rows")
    monkeypatch.setattr(near_module, "ROWS", 500)
    found = []
    for piece, within in near_module.pieces(tmp_path / "rows", KIND, radius):
        assert len(piece) <= 500
        pairs = near_pairs(piece["hash"], radius, within)
        found += [(piece["place"][i], piece["place"][j]) for i, j in pairs]
    found = sorted_pairs(found)
    assert len(whole) > 1_000
    assert np.array_equal(np.unique(found, axis=0), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def sorted_pairs(pairs) -> np.ndarray:
    """(n, 2) of (smaller, larger), in order."""
    found = np.concatenate([np.sort(np.stack(pair, axis=1), axis=1) for pair in pairs])
    return found[np.lexsort(found.T[::-1])]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_rows_that_edges_connect_are_one_group_however_they_lie(edges):
    group = list(range(31))
    for a, b in edges:
        one, other = group[a], group[b]
        group = [min(one, other) if g in (one, other) else g for g in group]
    with TemporaryDirectory() as folder, scratch(Path(folder) / "edges") as database:
        database.execute("CREATE TABLE edge (a INTEGER, b INTEGER)")
        pairs = [(max(pair), min(pair)) for pair in edges if len(set(pair)) == 2]
        database.executemany("INSERT INTO edge VALUES (?, ?)", pairs)
        connect(database)
        found = dict(database.execute("SELECT a, b FROM least"))
    assert found == {row: first for row, first in enumerate(group) if first != row}


def test_the_bounds_are_kept():
    far = (1 << RADIUS) - 1
    level = [100] * CHANNELS
    assert groups_of([photo(1), photo(2, far)]) == [0, 0]
    assert groups_of([photo(1), photo(2, 2 * far + 1)]) == [0, 1]
    brighter = [100 + BRIGHTNESS] * CHANNELS
    assert groups_of([photo(1, 0, level), photo(2, 0, brighter)]) == [0, 0]
    assert groups_of([photo(1, 0, level), photo(2, 0, [c + 1 for c in brighter])]) == [0, 1]
    logo = [*level[:-1], 100 + COLOURS * CHANNELS]
    assert groups_of([photo(1, 0, level), photo(2, 0, logo)]) == [0, 0]
    assert groups_of([photo(1, 0, level), photo(2, 0, [*logo[:-1], logo[-1] + 1])]) == [0, 1]


def test_a_chain_is_one_group_and_starts_at_its_first_row():
    chain = [photo(n, sum(1 << bit for bit in range(RADIUS * n))) for n in range(1, 9)]
    order = [5, 0, 7, 2, 4, 1, 6, 3]
    assert groups_of([photo(99, 2**64 - 1 - 2**60)] + [chain[n] for n in order]) == [0] + [1] * 8
    broken = [link for n, link in enumerate(chain) if n != 3]
    assert groups_of(broken) == [0, 0, 0, 3, 3, 3, 3]


def test_photos_without_looks_are_compared_by_their_bytes():
    one, other = ("aa" * 32, "", ""), ("bb" * 32, "", "")
    none = ("", "", "")
    assert groups_of([none, one, other, one, none]) == [NO_PHOTO, 1, 2, 1, NO_PHOTO]
    assert groups_of([none, none]) == [NO_PHOTO, NO_PHOTO]
    assert groups_of([]) == []


@pytest.mark.timeout(60)
def test_a_crowd_of_one_picture_costs_no_square():
    """200,000 white pictures, and 5,000 nearly white ones of one hash: 2·10¹⁰ pairs."""
    levels = np.full((205_000, CHANNELS), 255, np.uint8)
    levels[200_000:] = np.random.default_rng(0).integers(252, 256, (5_000, CHANNELS))
    hashes = np.zeros(len(levels), np.uint64)
    hashes[100_000] = 2**64 - 1
    groups = photo_groups(photos_of(hashes, levels))
    assert (groups == 100_000).sum() == 1
    assert (groups == 0).sum() == len(levels) - 1


def photos_of(hashes: np.ndarray, colours: np.ndarray) -> Iterator[tuple[str, str, str]]:
    """(sha256, phash, colours) of photos no two of which are the same file."""
    for number, (phash, levels) in enumerate(zip(hashes.tolist(), colours, strict=True)):
        yield f"{number:064x}", f"{phash:016x}", levels.tobytes().hex()


@pytest.mark.parametrize("photos", [30_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_many_photos_are_grouped_as_they_were_made(photos, monkeypatch):
    """A third are copies of others, with up to 3 bits moved and colours off by up to 3."""
    monkeypatch.setattr(near_module, "ROWS", min(near_module.ROWS, photos // 6))
    copies = photos * 3 // 10
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, photos, dtype=np.uint64)
    colours = rng.integers(8, 248, (photos, CHANNELS), dtype=np.uint8)
    source = rng.integers(0, photos - copies, copies)
    for values in (hashes, colours):
        values[photos - copies :] = values[source]
    for _ in range(3):
        hashes[photos - copies :] ^= np.uint64(1) << rng.integers(0, 64, copies, np.uint64)
    colours[photos - copies :] += rng.integers(0, 4, (copies, CHANNELS), dtype=np.uint8)
    groups = photo_groups(photos_of(hashes, colours))
    assert np.array_equal(groups, [*range(photos - copies), *source])


def counts_and_noise(
    folder: Path, groups: list[int], labels: list[str], splits: list[str]
) -> tuple[dict[str, int], pd.DataFrame]:
    """Counts of near-duplicates and label_noise.parquet of items named p0, p1, ..."""
    with scratch(folder / "items") as database:
        create_items(database)
        rows = [(f"p{n}", *row) for n, row in enumerate(zip(labels, splits, groups, strict=True))]
        database.executemany(
            "INSERT INTO item (posting_id, label_group, split, photo_group) VALUES (?, ?, ?, ?)",
            rows,
        )
        counts = count_items(database, folder / "label_noise.parquet")
    return counts["near_duplicates"], pd.read_parquet(folder / "label_noise.parquet")


def test_noise_is_a_photo_of_two_known_products(tmp_path):
    counts, noise = counts_and_noise(
        tmp_path,
        [0, 1, 0, 1, 4, 4, -1, -1, 0],
        ["a", "b", "c", "b", "", "d", "e", "f", "c"],
        ["train", "val", "test", "val", "unlabelled", "train", "val", "test", "test"],
    )
    assert noise.posting_id.tolist() == ["p0", "p2", "p8"]
    assert noise.columns.tolist() == ["photo_group", "posting_id", "label_group"]
    assert counts == {"photo_groups": 3, "postings": 7, "largest": 3, "noise_groups": 1,
                      "noise_postings": 3, "across_splits": 3}  # fmt: skip
    assert "p0 (a), p2 (c), p8 (c)" in describe_near_duplicates(counts, tmp_path)


GROUPED = st.lists(
    st.tuples(st.integers(-1, 4), st.sampled_from(["", "a", "b"]),
              st.sampled_from(["train", "test", "unlabelled"])), min_size=1, max_size=20,
)  # fmt: skip


@given(GROUPED)
@settings(max_examples=60, deadline=None)
def test_the_near_duplicates_counted_are_those_that_scores_leave_out(tmp_path_factory, rows):
    """The counts beside those of dist_train's count from items.parquet."""
    table = pd.DataFrame(rows, columns=["photo_group", "label_group", "split"])
    counts, noise = counts_and_noise(
        tmp_path_factory.mktemp("t"), *(table[c].tolist() for c in table)
    )
    assert counts["across_splits"] == near_duplicates_across_splits(table).sum()
    labels = table[(table.photo_group >= 0) & (table.label_group != "")].groupby("photo_group")
    noisy = labels.label_group.transform("nunique") > 1
    assert sorted(noise.posting_id) == sorted(f"p{n}" for n in noisy[noisy].index)
    sizes = table.photo_group[table.photo_group >= 0].value_counts()
    assert counts["largest"] == (sizes.max() if len(sizes) else 0)
    assert counts["postings"] == sizes[sizes > 1].sum()


def test_nothing_shared_is_counted_as_such(tmp_path):
    counts, noise = counts_and_noise(tmp_path, [0, -1], ["a", "b"], ["train", "val"])
    assert noise.empty
    assert describe_near_duplicates(counts, tmp_path) == "no photo stands twice"


def picture(seed: int) -> Image.Image:
    """A smooth picture; no two seeds give similar ones."""
    rng = np.random.default_rng(seed)
    small = rng.integers(80, 208, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((420, 420), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("change", ["quality 60", "resized 0.6", "5 % brighter"])
def test_copies_of_a_picture_are_near_duplicates_and_other_pictures_are_not(change):
    pictures = [picture(seed) for seed in range(8)]
    photos = [prepare_photo(jpeg(p), PackOptions()) for p in pictures]
    photos += [prepare_photo(COPIES[change](p), PackOptions()) for p in pictures]
    groups = groups_of([(p.sha256, p.phash, p.colours) for p in photos])
    assert groups == [*range(8), *range(8)]


# What was measured over 800 photos (docs/design/near-duplicates.md), less three standard errors
# of 160.
FOUND = {"quality 60": 0.98, "resized 0.6": 0.98, "5 % brighter": 0.97,
         "trimmed 1 % each side": 0.95, "trimmed 2 % each side": 0.75, "trimmed 2 % right": 0.91,
         "logo in a corner": 0.84, "pale bar across": 0.74}  # fmt: skip


@pytest.mark.skipif("DIST_TRAIN_DATA" not in os.environ, reason="no DIST_TRAIN_DATA")
def test_copies_of_real_photos_are_found_and_other_products_are_no_near_duplicates():
    grocery = Path(os.environ["DIST_TRAIN_DATA"]) / "grocery"
    table = pd.read_csv(grocery / "catalogue.csv").sample(160, random_state=0)
    images = [Image.open(grocery / "images" / name).convert("RGB") for name in table.image]
    packed = [prepare_photo(jpeg(image, 95), PackOptions()) for image in images]
    photos = signatures_of(packed)
    for name, least in FOUND.items():
        copies = signatures_of([prepare_photo(COPIES[name](i), PackOptions()) for i in images])
        assert are_near_duplicates(photos, copies).mean() >= least, name
    labels = pd.Series(table.label_group.to_numpy())
    groups = photo_groups((photo.sha256, photo.phash, photo.colours) for photo in packed)
    assert (labels.groupby(groups).nunique() == 1).all()


def test_another_colour_is_another_photo():
    red, blue = picture(0), Image.merge("RGB", picture(0).split()[::-1])
    photos = [prepare_photo(jpeg(p), PackOptions()) for p in (red, blue)]
    assert groups_of([(p.sha256, "00" * 8, p.colours) for p in photos]) == [0, 1]


def group_in(split: str, skip: int = 0) -> str:
    names = (f"g{n}" for n in range(10_000))
    return [name for name in names if split_of(name) == split][skip:][0]


def test_a_copied_photo_is_listed_as_noise_and_left_out_of_scores(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    train, test, other = group_in("train"), group_in("test"), group_in("test", 1)
    for name, data in {
        "a.jpg": jpeg(picture(1)), "b.jpg": COPIES["quality 60"](picture(1)),
        "c.jpg": jpeg(picture(2)), "d.jpg": jpeg(picture(3)), "e.jpg": jpeg(picture(2), 80),
    }.items():  # fmt: skip
        (images / name).write_bytes(data)
    pd.DataFrame({
        "posting_id": ["taught", "copied", "own", "none", "fresh", "again"],
        "image": ["a.jpg", "b.jpg", "c.jpg", "", "d.jpg", "e.jpg"],
        "title": "kopi", "label_group": [train, test, test, test, other, test],
    }).to_csv(tmp_path / "catalogue.csv", index=False)  # fmt: skip
    out = tmp_path / "shards"
    counts = pack(tmp_path / "catalogue.csv", images, out, PackOptions())

    items = pd.read_parquet(out / "items.parquet")
    assert items.photo_group.tolist() == [0, 0, 2, NO_PHOTO, 4, 2]
    assert counts["near_duplicates"] == {
        "photo_groups": 2, "postings": 4, "largest": 2, "noise_groups": 1,
        "noise_postings": 2, "across_splits": 2,
    }  # fmt: skip
    noise = pd.read_parquet(out / "label_noise.parquet")
    assert list(zip(noise.posting_id, noise.label_group, strict=True)) == [
        ("taught", train), ("copied", test)
    ]  # fmt: skip
    scored = items.posting_id.iloc[labelled_rows(items, "test")]
    assert scored.tolist() == ["own", "none", "fresh", "again"]
    assert ((items.split == "test") & (items.label_group != "")).sum() == len(scored) + 1
    assert items.split.tolist() == [split_of(g) for g in items.label_group]
