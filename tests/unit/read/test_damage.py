"""What becomes of damaged tars: here all of it is reported, beside what webdataset says of it.

`pytest -s` prints the two side by side.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import webdataset as wds

from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.read.verify import verify
from shards.storage.errors import Corrupt
from shards.storage.files import sha256_file
from shards.tar.index import ABSENT, MEMBERS, read_index
from shards.tar.scan import members

HURT = "train/000001.tar"


@pytest.fixture(scope="module")
def some(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of four train shards or more, small enough to be read for every trial."""
    folder = tmp_path_factory.mktemp("some")
    lines = (catalogue / "catalogue.csv").read_text().splitlines(keepends=True)
    (folder / "c.csv").write_text("".join(lines[:61]))
    pack(folder / "c.csv", catalogue / "images", folder / "s", PackOptions(size=24, shard_items=8))
    return folder / "s"


@pytest.fixture
def copied(some: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(some, tmp_path / "copy"))


def as_webdataset_has_it(folder: Path) -> list[dict[str, bytes]]:
    urls = [str(index.with_suffix(".tar")) for index in sorted(folder.glob("train/*.idx"))]
    samples = wds.WebDataset(urls, shardshuffle=False)
    return [{k: v for k, v in s.items() if k not in ("__url__", "__local_path__")} for s in samples]


def webdataset_is_silent(folder: Path) -> bool:
    """Whether it reads the train split to its end without a word."""
    try:
        as_webdataset_has_it(folder)
    except Exception:
        return False
    return True


# ── every kind of damage


def starts(tar: Path) -> list[tuple[int, int, str]]:
    return [(m.header_at, m.at + m.size, m.name) for m in members(tar)]


def cut_inside_a_member(tar: Path) -> None:
    at, end, _ = starts(tar)[8]
    cut(tar, (at + 512 + end) // 2)


def cut_at_a_sample(tar: Path) -> None:
    names = starts(tar)
    cut(tar, next(at for at, _, name in names[8:] if name.endswith(".jpg")))


def cut_between_members(tar: Path) -> None:
    names = starts(tar)
    cut(tar, next(at for at, _, name in names[8:] if name.endswith(".txt")))


def cut(tar: Path, length: int) -> None:
    tar.write_bytes(tar.read_bytes()[:length])


def flip_in_a_header(tar: Path) -> None:
    change(tar, starts(tar)[8][0] + 3, lambda data: bytes([data[0] ^ 4]), 1)


def zero_a_header(tar: Path) -> None:
    change(tar, starts(tar)[8][0], lambda data: bytes(len(data)), 1024)


def flip_in_a_photo(tar: Path) -> None:
    photo = next((at, end) for at, end, name in starts(tar)[4:] if name.endswith(".jpg"))
    change(tar, (photo[0] + 512 + photo[1]) // 2, lambda data: bytes([data[0] ^ 4]), 1)


def change(tar: Path, at: int, to: Callable[[bytes], bytes], size: int) -> None:
    data = tar.read_bytes()
    tar.write_bytes(data[:at] + to(data[at : at + size]) + data[at + size :])


def empty(tar: Path) -> None:
    tar.write_bytes(b"")


def error_page(tar: Path) -> None:
    tar.write_bytes(b"<html><body>503 Service Unavailable</body></html>")


def missing(tar: Path) -> None:
    tar.unlink()


def exchanged(tar: Path) -> None:
    other = tar.with_name("000000.tar")
    one, two = tar.read_bytes(), other.read_bytes()
    tar.write_bytes(two)
    other.write_bytes(one)


def doubled(tar: Path) -> None:
    shutil.copy(tar.with_name("000000.tar"), tar)


DAMAGES = (
    cut_inside_a_member, cut_at_a_sample, cut_between_members, flip_in_a_header, zero_a_header,
    flip_in_a_photo, empty, error_page, missing, exchanged, doubled,
)  # fmt: skip
SILENT = {"cut_at_a_sample", "cut_between_members", "flip_in_a_header", "zero_a_header",
          "flip_in_a_photo", "exchanged", "doubled"}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_is_reported_by_verify_and_by_reading(
    copied: Path, damage: Callable[[Path], None]
) -> None:
    truth = every_item(copied)
    damage(copied / HURT)
    faults = verify(copied)
    assert any(str(copied / HURT) in fault for fault in faults)
    if damage is flip_in_a_header:
        assert every_item(copied) == truth  # an item is found by its index, not by its header
    else:
        with pytest.raises(Corrupt, match=r"train/00000[01]\.tar: "):
            every_item(copied)
    silent = webdataset_is_silent(copied)
    print(f"\n{damage.__name__}: here {faults[0]}; webdataset {'silent' if silent else 'raises'}")
    assert silent == (damage.__name__ in SILENT)


@pytest.mark.parametrize("blocks", [-1, 1])
def test_a_tar_shorter_or_longer_than_its_index_says_is_refused_when_it_is_opened(
    copied: Path, blocks: int
) -> None:
    """Be it in the zeros at its end, where no item lies."""
    tar = copied / HURT
    whole = tar.read_bytes()
    assert whole.endswith(bytes(2048))
    tar.write_bytes(whole[:-512] if blocks < 0 else whole + bytes(512))
    with pytest.raises(Corrupt, match=rf"{HURT}: does not fit its index"):
        ShardSet(copied).reader(["train"])
    assert len(ShardSet(copied).reader(["val", "test"]))
    assert verify(copied) == [f"{tar}: {len(whole) + 512 * blocks} bytes, packed with {len(whole)}"]


def test_tars_exchanged_with_their_indices_are_refused_when_they_are_opened(copied: Path) -> None:
    other = copied / "train/000000.tar"
    for one in (copied / HURT, (copied / HURT).with_suffix(".idx")):
        two = other.with_suffix(one.suffix)
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    with pytest.raises(Corrupt, match=r"train/00000\d\.idx: differs from the sha256"):
        ShardSet(copied).reader(["train"])


def every_item(folder: Path) -> list:
    reader = ShardSet(folder).reader(["train"])
    return [reader[place] for place in range(len(reader))]


def test_exchanged_shards_are_named_by_each_other(copied: Path) -> None:
    exchanged(copied / HURT)
    one, other = copied / "train/000000.tar", copied / HURT
    assert verify(copied) == [
        f"{one}: holds what belongs in {other}",
        f"{other}: holds what belongs in {one}",
    ]


# ── single bits


def flips(folder: Path, trials: int, files: list[Path]) -> Iterator[tuple[Path, int]]:
    """Flip one bit after another, each anywhere in all files' bytes; give (file, place)."""
    draw = random.Random(trials)
    sizes = [file.stat().st_size for file in files]
    for _ in range(trials):
        file = draw.choices(files, sizes)[0]
        whole = file.read_bytes()
        damaged, place = bytearray(whole), draw.randrange(len(whole))
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        yield file, place
        file.write_bytes(whole)


@pytest.mark.parametrize("trials", [60, pytest.param(500, marks=pytest.mark.full)])
def test_flipped_bits_in_tars_and_indices_are_all_reported(copied: Path, trials: int) -> None:
    files = sorted(copied.glob("train/*.tar")) + sorted(copied.glob("train/*.idx"))
    reported = silent = wrong = in_tars = 0
    truth = as_webdataset_has_it(copied)
    for file, place in flips(copied, trials, files):
        faults = verify(copied)
        reported += any(str(file) in fault for fault in faults)
        in_tars += file.suffix == ".tar"
        try:
            wrong += as_webdataset_has_it(copied) != truth
            silent += file.suffix == ".tar"
        except Exception:
            assert file.suffix == ".tar", place
    assert verify(copied) == []
    print(
        f"\n{trials} flips in tars and indices: {reported} reported by verify; webdataset is silent"
        f" on {silent} of the {in_tars} in tars, {wrong} of which changed what it gives"
    )
    assert reported == trials
    assert wrong > 0


@pytest.mark.parametrize("trials", [60, pytest.param(500, marks=pytest.mark.full)])
def test_flipped_bits_in_members_are_all_caught_by_reading(copied: Path, trials: int) -> None:
    draw, tars = random.Random(trials), sorted(copied.glob("train/*.tar"))
    for _ in range(trials):
        tar = draw.choice(tars)
        record = draw.choice(read_index(tar.with_suffix(".idx")).records)
        member = draw.choice([m for m in ("jpg", "json") if record[f"{m}_size"] != ABSENT])
        at = int(record[f"{member}_at"]) + draw.randrange(int(record[f"{member}_size"]))
        bit = 1 << draw.randrange(8)
        change(tar, at, lambda data, bit=bit: bytes([data[0] ^ bit]), 1)
        message = rf"{tar.stem}\.tar: slot {record['slot']}, member {member}: bytes differ"
        with pytest.raises(Corrupt, match=message):
            every_item(copied)
        change(tar, at, lambda data, bit=bit: bytes([data[0] ^ bit]), 1)
    assert every_item(copied)


@pytest.mark.parametrize("name", ["manifest.json", "stage.json", "items.parquet"])
@pytest.mark.parametrize("trials", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_flipped_bits_in_the_other_files_are_all_reported(
    copied: Path, name: str, trials: int
) -> None:
    for file, place in flips(copied, trials, [copied / name]):
        try:
            faults = verify(copied)
        except Exception as error:  # its kind or format is another, which is refused by name
            faults = [str(error)]
        assert any(str(copied) in fault for fault in faults), (file, place)
    assert verify(copied) == []


def test_what_a_status_says_is_reported(copied: Path) -> None:
    status = copied / "status.json"
    status.write_text(status.read_text().replace('"done"', '"dome"'))
    assert verify(copied) == [f"{status}: is 'dome' although the stage is finished"]


def test_several_processes_find_the_same_faults(copied: Path) -> None:
    flip_in_a_photo(copied / HURT)
    missing(copied / "train/000000.idx")
    one = verify(copied)
    assert len(one) == 2
    assert verify(copied, workers=2) == one


def test_what_is_verified_is_not_changed(copied: Path) -> None:
    before = {path: sha256_file(path) for path in copied.rglob("*") if path.is_file()}
    verify(copied)
    assert {path: sha256_file(path) for path in copied.rglob("*") if path.is_file()} == before


def test_every_member_has_its_crc(some: Path) -> None:
    for tar in some.glob("train/*.tar"):
        index = read_index(tar.with_suffix(".idx"))
        there = sum(int((index.records[f"{m}_size"] != ABSENT).sum()) for m in MEMBERS)
        assert there == len(list(members(tar)))
