"""From a catalogue to a shard set: counts, files, order of bytes, what is refused."""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from shards.catalogue.split import SPLITS, split_of
from shards.pack.pack import Task, pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.read.verify import verify
from shards.storage.errors import BadInput, Corrupt

SMALL = PackOptions(size=32)


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def write_catalogue(folder: Path, rows: list[dict], photos: dict[str, bytes] | None = None) -> Path:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, data in (photos or {}).items():
        (images / name).write_bytes(data)
    pd.DataFrame(rows).to_csv(folder / "c.csv", index=False)
    return folder / "c.csv"


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file that does not depend on time and place."""
    changing = {"stage.json", "status.json", "manifest.json"}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in changing
    }


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Folder of a catalogue with good, broken and missing photos and titles."""
    rows = [
        {"posting_id": "both", "image": "a.jpg", "title": "a title", "label_group": "g1"},
        {"posting_id": "photo only", "image": "b.jpg", "title": "", "label_group": "g1"},
        {"posting_id": "title only", "image": "", "title": "b title", "label_group": "g2"},
        {"posting_id": "broken photo", "image": "bad.jpg", "title": "c", "label_group": "g2"},
        {"posting_id": "lost photo", "image": "none.jpg", "title": "d", "label_group": ""},
        {"posting_id": "nothing", "image": "", "title": "  ", "label_group": "g3"},
        {"posting_id": "broken alone", "image": "bad.jpg", "title": "", "label_group": "g1"},
        {"posting_id": "out", "image": "../c.csv", "title": "", "label_group": ""},
    ]
    write_catalogue(tmp_path, rows, {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "bad.jpg": b"no photo"})
    return tmp_path


# ── counts and reasons


def test_packed_and_rejected_make_up_the_catalogue(mixed: Path) -> None:
    counts = pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    assert (counts["postings"], counts["packed"], counts["rejected"]) == (8, 5, 3)
    assert (counts["photos"], counts["titles"]) == (2, 4)
    assert sum(counts["items"].values()) == 5
    items = ShardSet(mixed / "s").items
    assert items.posting_id.tolist() == pd.read_csv(mixed / "c.csv").posting_id.tolist()
    assert (items.status == "packed").sum() == 5
    assert len(ShardSet(mixed / "s").reader()) == 5
    assert ShardSet(mixed / "s").manifest["counts"] == counts


def test_every_posting_that_lacks_something_says_why(mixed: Path) -> None:
    counts = pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    items = ShardSet(mixed / "s").items.set_index("posting_id")
    assert (items.reason[["both", "photo only", "title only"]] == "").all()
    assert "bad.jpg" in items.reason["broken photo"]
    assert "not a readable photo" in items.reason["broken alone"]
    assert "not found" in items.reason["lost photo"]
    assert "out of the image folder" in items.reason["out"]
    assert items.reason["nothing"] == "neither a photo nor a title"
    assert counts["with_reason"] == 5
    rejected = items.loc[["nothing", "broken alone", "out"]]
    assert (rejected.status == "rejected").all()
    assert (rejected[["shard", "slot"]] == -1).all(axis=None)


def test_facts_of_photos_and_titles(mixed: Path) -> None:
    pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    items = ShardSet(mixed / "s").items.set_index("posting_id")
    assert items.has_image.to_dict() == {id_: id_ in ("both", "photo only") for id_ in items.index}
    assert items.sha256["both"] == hashlib.sha256(jpeg(1)).hexdigest()
    assert (items.width["both"], items.height["both"]) == (40, 30)
    assert (items.sha256[~items.has_image] == "").all()
    assert items.title["title only"] == "b title"
    assert items.has_text[["nothing", "photo only"]].tolist() == [False, False]


def test_a_title_of_10_megabytes_is_cut_counted_and_reported(tmp_path: Path) -> None:
    rows = [{"posting_id": "1", "title": "é" * 5_000_000}, {"posting_id": "2", "title": "short"}]
    catalogue = write_catalogue(tmp_path, rows)
    counts = pack(catalogue, None, tmp_path / "s", PackOptions(max_title=100))
    items = ShardSet(tmp_path / "s").items
    assert items.title.tolist() == ["é" * 100, "short"]
    assert items.reason.tolist() == ["title of 5000000 characters cut", ""]
    assert counts["with_reason"] == 1
    assert ShardSet(tmp_path / "s").reader()[0].title in items.title.tolist()


def test_a_catalogue_of_nothing_usable_still_packs(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path, [{"posting_id": n, "title": ""} for n in range(3)])
    counts = pack(catalogue, None, tmp_path / "s", SMALL)
    assert (counts["packed"], counts["rejected"]) == (0, 3)
    assert len(ShardSet(tmp_path / "s").reader()) == len(ShardSet(tmp_path / "s").packed) == 0
    assert verify(tmp_path / "s") == []


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop"])
def test_no_name_of_a_photo_stops_the_pack(tmp_path: Path, name: str) -> None:
    rows = [{"posting_id": "1", "title": "t", "image": name}]
    write_catalogue(tmp_path, rows)
    (tmp_path / "images" / "loop").symlink_to("loop")
    (tmp_path / "c.jsonl").write_text(json.dumps(rows[0]))
    counts = pack(tmp_path / "c.jsonl", tmp_path / "images", tmp_path / "s", SMALL)
    assert (counts["packed"], counts["with_reason"], counts["photos"]) == (1, 1, 0)


# ── carried columns


def test_other_columns_are_carried_and_ours_keep_their_names(tmp_path: Path) -> None:
    row = {"posting_id": "1", "title": "t", "price": "9.90", "status": "sold", "shard": "x"}
    catalogue = write_catalogue(tmp_path, [row])
    pack(catalogue, None, tmp_path / "s", SMALL)
    item = ShardSet(tmp_path / "s").items.iloc[0]
    assert (item.price, item.catalogue_status, item.catalogue_shard) == ("9.90", "sold", "x")
    assert (item.status, item.shard) == ("packed", 0)


@pytest.mark.parametrize("name", ["rank", "row", "key", "index", "Index", "count", "facts", "x y"])
def test_carried_columns_of_any_name_reach_items_and_packed(tmp_path: Path, name: str) -> None:
    catalogue = write_catalogue(tmp_path, [{"posting_id": "1", "title": "t", name: "mine"}])
    pack(catalogue, None, tmp_path / "s", SMALL)
    shards = ShardSet(tmp_path / "s")
    assert shards.items[name].tolist() == ["mine"]
    assert shards.packed[name].tolist() == ["mine"]


def test_a_carried_column_named_as_ours_twice(tmp_path: Path) -> None:
    row = {"posting_id": "1", "title": "t", "status": "sold", "catalogue_status": "old"}
    pack(write_catalogue(tmp_path, [row]), None, tmp_path / "s", SMALL)
    item = ShardSet(tmp_path / "s").items.iloc[0]
    assert item.status == "packed"
    assert {"sold", "old"} <= set(item.map(str))


@pytest.mark.parametrize("values", [(3, "on request"), ({"a": 1}, [2]), ("x", None)])
def test_carried_values_of_several_types_do_not_stop_the_pack(
    tmp_path: Path, values: tuple
) -> None:
    rows = [{"posting_id": str(n), "title": "t", "price": v} for n, v in enumerate(values)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = pack(tmp_path / "c.jsonl", None, tmp_path / "s", SMALL)
    assert counts["packed"] == 2
    assert len(ShardSet(tmp_path / "s").items.price) == 2


# ── the same bytes


def test_two_workers_write_the_bytes_of_one(catalogue: Path, tmp_path: Path) -> None:
    packed = []
    for workers in (1, 2):
        out = tmp_path / f"w{workers}"
        options = PackOptions(size=32, shard_items=40, workers=workers)
        pack(catalogue / "catalogue.csv", catalogue / "images", out, options)
        packed.append((hashes(out), ShardSet(out).fingerprint))
    assert packed[0] == packed[1]
    assert sum(name.endswith(".tar") for name in packed[0][0]) >= 8


def test_broken_photos_give_the_same_bytes_every_time(mixed: Path) -> None:
    for out in ("one", "other"):
        pack(mixed / "c.csv", mixed / "images", mixed / out, SMALL)
    assert hashes(mixed / "one") == hashes(mixed / "other")


@pytest.mark.parametrize("kind", ["tsv", "parquet", "jsonl"])
def test_every_kind_of_catalogue_gives_the_same_set(mixed: Path, kind: str) -> None:
    table = pd.read_csv(mixed / "c.csv", dtype=str, keep_default_na=False)
    other = mixed / f"c.{kind}"
    match kind:
        case "tsv":
            table.to_csv(other, index=False, sep="\t")
        case "parquet":
            table.to_parquet(other)
        case "jsonl":
            table.to_json(other, orient="records", lines=True)
    for path, out in ((mixed / "c.csv", "one"), (other, "other")):
        pack(path, mixed / "images", mixed / out, SMALL)
    assert hashes(mixed / "one") == hashes(mixed / "other")


def test_renamed_columns_give_the_same_set(mixed: Path) -> None:
    names = {"posting_id": "sku", "title": "name", "image": "pic", "label_group": "product"}
    table = pd.read_csv(mixed / "c.csv", dtype=str, keep_default_na=False)
    table.rename(columns=names).to_csv(mixed / "d.csv", index=False)
    pack(mixed / "c.csv", mixed / "images", mixed / "one", SMALL)
    pack(mixed / "d.csv", mixed / "images", mixed / "other", SMALL, names)
    assert hashes(mixed / "one") == hashes(mixed / "other")


def test_splits_and_classes_of_a_whole_set(shard_set: Path) -> None:
    items = ShardSet(shard_set).items
    assert items.split.tolist() == [split_of(group) for group in items.label_group]
    train = items[items.split == "train"]
    first = {group: number for number, group in enumerate(train.label_group.unique())}
    assert train.class_id.tolist() == train.label_group.map(first).tolist()
    assert (items.class_id[items.split != "train"] == -1).all()
    assert ShardSet(shard_set).manifest["counts"]["classes"] == len(first)
    assert not set(SPLITS) - {p.name for p in shard_set.iterdir()} - {"unlabelled"}


def test_postings_that_are_added_move_no_product(catalogue: Path, tmp_path: Path) -> None:
    table = pd.read_csv(catalogue / "catalogue.csv", dtype=str, keep_default_na=False)
    found = []
    for number, rows in enumerate((table.iloc[:200], table)):
        rows.to_csv(tmp_path / f"{number}.csv", index=False)
        out = tmp_path / f"s{number}"
        pack(tmp_path / f"{number}.csv", catalogue / "images", out, SMALL)
        found.append(ShardSet(out).items.iloc[:200])
    for column in ("posting_id", "split", "class_id", "sha256", "phash"):
        assert found[0][column].tolist() == found[1][column].tolist()


# ── a second run


def test_a_finished_set_is_left_alone(mixed: Path) -> None:
    first = pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (mixed / "s").rglob("*")}
    start = time.monotonic()
    assert pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL) == first
    assert time.monotonic() - start < 1
    after = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (mixed / "s").rglob("*")}
    assert after == before


def test_the_number_of_workers_is_no_difference(mixed: Path) -> None:
    first = pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    again = PackOptions(size=32, workers=2)
    assert pack(mixed / "c.csv", mixed / "images", mixed / "s", again) == first


def test_the_same_catalogue_by_another_spelling_of_its_path_is_no_difference(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    monkeypatch.chdir(mixed)
    assert pack(Path("c.csv"), Path("images"), Path("s"), SMALL) == first


def test_a_set_and_its_catalogue_may_move_together(mixed: Path, tmp_path: Path) -> None:
    folder = mixed / "apart"
    folder.mkdir()
    shutil.copy(mixed / "c.csv", folder)
    shutil.copytree(mixed / "images", folder / "images")
    first = pack(folder / "c.csv", folder / "images", folder / "s", SMALL)
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert pack(moved / "c.csv", moved / "images", moved / "s", SMALL) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PackOptions(size=33), "size 32 there, 33 requested"),
        (PackOptions(size=32, quality=50), "quality 92 there, 50 requested"),
        (PackOptions(size=32, keep=True), "keep False there, True requested"),
        (PackOptions(size=32, seed=5), "seed 0 there, 5 requested"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_options_into_the_same_folder_are_refused(
    mixed: Path, options: PackOptions, message: str, finished: bool
) -> None:
    pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    if not finished:
        (mixed / "s" / "manifest.json").unlink()
    before = hashes(mixed / "s")
    with pytest.raises(BadInput, match=message):
        pack(mixed / "c.csv", mixed / "images", mixed / "s", options)
    assert hashes(mixed / "s") == before


def test_another_catalogue_other_names_and_other_photos_are_refused(mixed: Path) -> None:
    pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    (mixed / "d.csv").write_text((mixed / "c.csv").read_text() + "new,,a title,\n")
    with pytest.raises(BadInput, match="catalogue"):
        pack(mixed / "d.csv", mixed / "images", mixed / "s", SMALL)
    with pytest.raises(BadInput, match="columns"):
        pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL, {"title": "title"})


def test_another_folder_of_photos_is_refused(mixed: Path) -> None:
    pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    (mixed / "others").mkdir()
    with pytest.raises(BadInput, match="images"):
        pack(mixed / "c.csv", mixed / "others", mixed / "s", SMALL)


def test_a_catalogue_that_changed_in_its_place_is_refused(mixed: Path) -> None:
    pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    (mixed / "c.csv").write_text((mixed / "c.csv").read_text() + "new,,a title,\n")
    with pytest.raises(BadInput, match=r"catalogue\.sha256"):
        pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)


# ── a pack that goes on


@pytest.fixture
def halfway(catalogue: Path, tmp_path: Path) -> tuple[Path, Callable[[], dict[str, str]]]:
    """A set of which every second shard stands, and the call that goes on to the end of it."""
    options = PackOptions(size=24, shard_items=6)
    lines = (catalogue / "catalogue.csv").read_text().splitlines(keepends=True)
    (tmp_path / "c.csv").write_text("".join(lines[:41]))
    ways = tmp_path / "c.csv", catalogue / "images"
    assert pack(*ways, tmp_path / "s", options, task=Task(0, 2)) is None

    def go_on() -> dict[str, str]:
        pack(*ways, tmp_path / "s", options)
        assert verify(tmp_path / "s") == []
        return hashes(tmp_path / "s")

    return tmp_path / "s", go_on


@pytest.fixture(scope="module")
def undisturbed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    lines = (catalogue / "catalogue.csv").read_text().splitlines(keepends=True)
    (folder / "c.csv").write_text("".join(lines[:41]))
    options = PackOptions(size=24, shard_items=6)
    pack(folder / "c.csv", catalogue / "images", folder / "s", options)
    return hashes(folder / "s")


DAMAGES = ("a shorter tar", "a longer tar", "no tar", "a damaged index", "no index", "no facts")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_of_an_unfinished_set_is_built_again(
    halfway: tuple[Path, Callable[[], dict[str, str]]], undisturbed: dict[str, str], damage: str
) -> None:
    out, go_on = halfway
    tar = sorted(out.glob("*/*.tar"))[0]
    whole, index = tar.read_bytes(), tar.with_suffix(".idx")
    match damage:
        case "a shorter tar":
            tar.write_bytes(whole[:-512])
        case "a longer tar":
            tar.write_bytes(whole + bytes(512))
        case "no tar":
            tar.unlink()
        case "a damaged index":
            index.write_bytes(index.read_bytes()[:60] + b"x" + index.read_bytes()[61:])
        case "no index":
            index.unlink()
        case "no facts":
            (out / ".pack" / f"{tar.parent.name}-{tar.stem}.parquet").unlink()
    assert go_on() == undisturbed


@pytest.mark.parametrize("name", ["train/000099.tar", "val/000099.idx", "unlabelled/000000.tar"])
def test_a_shard_that_the_plan_did_not_name_is_no_part_of_the_set(
    halfway: tuple[Path, Callable[[], dict[str, str]]], undisturbed: dict[str, str], name: str
) -> None:
    out, go_on = halfway
    strange = out / name
    strange.parent.mkdir(exist_ok=True)
    shutil.copy(sorted(out.glob(f"*/*{strange.suffix}"))[0], strange)
    with pytest.raises(Corrupt, match=f"{strange}: is no shard of this pack; take it away"):
        go_on()
    assert not (out / "manifest.json").exists()
    strange.unlink()
    assert go_on() == undisturbed


# ── folders


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(mixed: Path) -> None:
    (mixed / "other").mkdir()
    (mixed / "other" / "thesis.txt").write_text("mine")
    for out in (mixed / "other", mixed / "images", mixed / "c.csv"):
        before = hashes(out) if out.is_dir() else out.read_bytes()
        with pytest.raises(BadInput, match=f"{out}: holds files of something else"):
            pack(mixed / "c.csv", mixed / "images", out, SMALL)
        assert (hashes(out) if out.is_dir() else out.read_bytes()) == before


def test_a_folder_below_a_file_is_refused_by_name(mixed: Path) -> None:
    with pytest.raises(BadInput, match=r"c\.csv"):
        pack(mixed / "c.csv", mixed / "images", mixed / "c.csv" / "s", SMALL)


def test_an_empty_folder_is_taken(mixed: Path) -> None:
    (mixed / "s").mkdir()
    assert pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)["packed"] == 5


def test_a_missing_folder_of_photos_is_named(mixed: Path) -> None:
    with pytest.raises(BadInput, match="--images"):
        pack(mixed / "c.csv", None, mixed / "s", SMALL)
    with pytest.raises(BadInput, match="none: no such folder"):
        pack(mixed / "c.csv", mixed / "none", mixed / "s", SMALL)
    assert not (mixed / "s").exists()


def test_a_finished_set_holds_its_files_and_no_others(mixed: Path) -> None:
    pack(mixed / "c.csv", mixed / "images", mixed / "s", SMALL)
    manifest = json.loads((mixed / "s" / "manifest.json").read_text())
    assert set(hashes(mixed / "s")) == set(manifest["files"])
    assert json.loads((mixed / "s" / "status.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", 0), ("quality", 0), ("quality", 96), ("shard_items", 0), ("workers", 0)],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(BadInput, match=f"{name}: {value}"):
        PackOptions(**{name: value})
