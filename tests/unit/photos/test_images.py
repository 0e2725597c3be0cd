"""A folder of photos that is the wrong one, or not mounted, is no folder without photos."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dist_train import cli
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput

SMALL = PackOptions(size=16)


def catalogue(folder: Path, rows: int, named: int, photos: int = 0) -> Path:
    """A catalogue of `rows`, of which `named` name a photo and `photos` have it in images/."""
    lines = ["posting_id,image,title,label_group"]
    (folder / "images").mkdir()
    for row in range(rows):
        lines.append(f"p{row},{f'{row}.jpg' if row < named else ''},title {row},g{row // 3}")
        if row < photos:
            Image.new("RGB", (20, 20), (row, 0, 0)).save(folder / "images" / f"{row}.jpg")
    (folder / "c.csv").write_text("\n".join(lines) + "\n")
    return folder / "c.csv"


def test_a_folder_without_any_photo_is_refused_before_a_shard_is_begun(tmp_path: Path) -> None:
    path, right = catalogue(tmp_path, 400, 400, 400), tmp_path / "images"
    (wrong := tmp_path / "wrong").mkdir()
    with pytest.raises(
        BadInput, match=r"wrong: not one of the photos .*400 × .*--images .*mounted"
    ):
        pack(path, wrong, tmp_path / "s", SMALL)
    assert list((tmp_path / "s").rglob("*.tar")) == []
    counts = pack(path, right, tmp_path / "s", SMALL)  # the folder is free again
    assert counts is not None
    assert counts["photos"] == 400


def test_a_set_without_any_of_its_photos_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = catalogue(tmp_path, 40, 20, 20)

    def unmounted(found: object, images: Path, out: Path, options: PackOptions) -> None:
        images.rename(images.with_name("moved"))
        images.mkdir()

    monkeypatch.setattr("shards.pack.pack.check_survey", unmounted)
    with pytest.raises(
        BadInput, match=r"s: not one of the photos .*could be packed: 20 × .*not found.*remove"
    ):
        pack(path, tmp_path / "images", tmp_path / "s", SMALL)
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert json.loads((tmp_path / "s" / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("rows", "named", "photos"), [(400, 0, 0), (400, 400, 200), (400, 400, 3), (20, 3, 0)]
)
def test_titles_alone_some_photos_and_a_few_lost_ones_are_packed(
    tmp_path: Path, rows: int, named: int, photos: int
) -> None:
    counts = pack(
        catalogue(tmp_path, rows, named, photos), tmp_path / "images", tmp_path / "s", SMALL
    )
    assert counts is not None
    assert (counts["packed"], counts["photos"]) == (rows, photos)


def test_products_of_which_nothing_was_packed_are_not_listed_as_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = "".join(f"p{n},{'' if n % 3 else 'a title'},g{n}\n" for n in range(60))
    (tmp_path / "c.csv").write_text("posting_id,title,label_group\n" + rows)
    arguments = ["dist-train", "pack", str(tmp_path / "c.csv"), "--out", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", arguments)
    cli.main()
    packed = ShardSet(tmp_path / "s").packed
    products = packed.label_group[packed.split == "train"].nunique()
    assert f"{products} products to train on" in capsys.readouterr().out
