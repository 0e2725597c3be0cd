"""What is said of photos that cannot be used: before the pack, at its end, and in remarks.csv."""

import csv
import io
import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dist_train import cli
from shards.pack.items import describe_remarks
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.photos.remarks import REMEDIES
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput

SMALL = PackOptions(size=16)


def catalogue(folder: Path, names: list[str], titles: bool = True) -> Path:
    """A catalogue whose postings name these photos."""
    with (folder / "c.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["posting_id", "image", "title"])
        writer.writerows([f"a{n}", name, f"t {n}" * titles] for n, name in enumerate(names))
    return folder / "c.csv"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of eight photos, p0.jpg to p7.jpg."""
    (folder := tmp_path / "photos").mkdir()
    for n in range(8):
        Image.new("RGB", (24, 20), (n * 30, 0, 0)).save(folder / f"p{n}.jpg")
    return folder


def pillow_bytes(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 20), "red").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    "form",
    ["/p{}.jpg", "\\p{}.jpg", "photos\\p{}.jpg", "photos/p{}.jpg", "P{}.JPG", "p{}", "P{}",
     "C:\\x\\photos\\p{}.jpg", " p{}.jpg ", "p{}.JPG"],
)  # fmt: skip
def test_names_of_other_systems_are_packed(tmp_path: Path, photos: Path, form: str) -> None:
    counts = pack(
        catalogue(tmp_path, [form.format(n) for n in range(8)]), photos, tmp_path / "s", SMALL
    )
    assert counts is not None
    assert (counts["photos"], counts["with_reason"]) == (8, 0)


FILES = {
    "zero bytes": b"", "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid x\n",
    "web page": b"<!DOCTYPE html>\n<html>404</html>", "path of a link": b"../blobs/h3",
    "unknown kind": b"%PDF-1.7 no photo at all", "damaged photo": pillow_bytes("PNG")[:60],
    "HEIC photo": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("https://cdn.shop.example/p{}.jpg", "address instead of a file"),
        ("p{}.jpg|p0.jpg", "several names in one cell"), ("nowhere/p{}.jpg", "file not found"),
        ("../p{}.jpg", "path leads out of the image folder"), 
        *((name, name) for name in FILES),
    ],
)  # fmt: skip
def test_the_reason_its_first_example_and_its_remedy_are_named_before_a_shard_is_begun(
    tmp_path: Path, photos: Path, form: str, kind: str
) -> None:
    if form in FILES:
        for n in range(8):
            (photos / f"p{n}.jpg").write_bytes(FILES[form])
        form = "p{}.jpg"
    names = [form.format(n) for n in range(8)]
    with pytest.raises(BadInput) as refused:
        pack(catalogue(tmp_path, names), photos, tmp_path / "s", SMALL)
    message = str(refused.value)
    assert "\n" not in message
    assert f"{photos}: not one of the photos that {tmp_path / 'c.csv'} names" in message
    assert "8 looked for: 8 × photo: " in message
    found = next(one for one in REMEDIES if kind in one)
    assert found in message
    assert REMEDIES[found] in message
    assert any(f"row {n + 1}: photo {name}: " in message for n, name in enumerate(names))
    assert not list((tmp_path / "s").rglob("*.tar"))


def test_links_out_of_the_folder_name_the_option_that_follows_them(
    tmp_path: Path, photos: Path
) -> None:
    (linked := tmp_path / "linked").mkdir()
    for photo in photos.iterdir():
        (linked / photo.name).symlink_to(Path("..") / "photos" / photo.name)
    path = catalogue(tmp_path, [f"p{n}.jpg" for n in range(8)])
    with pytest.raises(BadInput, match=r"8 × photo: link leads out of .* --follow-links"):
        pack(path, linked, tmp_path / "s", SMALL)
    followed = PackOptions(size=16, follow_links=True)
    counts = pack(path, linked, tmp_path / "s", followed)
    assert counts is not None
    assert counts["photos"] == 8


def test_some_photos_that_cannot_be_used_are_counted_by_reason_in_a_warning(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"p{n}.jpg" for n in range(5)] + ["x.jpg", "y.jpg", "https://a.example/z.jpg"]
    with caplog.at_level(logging.WARNING):
        counts = pack(catalogue(tmp_path, names), photos, tmp_path / "s", SMALL)
    assert counts is not None
    assert (counts["packed"], counts["photos"]) == (8, 5)
    (warning,) = [one.getMessage() for one in caplog.records if "looked for" in one.getMessage()]
    assert "3 of 8 photos looked for cannot be used" in warning
    assert "2 × photo: file not found, for example row " in warning
    assert "1 × photo: address instead of a file, for example row 8: " in warning
    found = pd.read_csv(tmp_path / "s" / "remarks.csv")
    assert found.posting_id.tolist() == ["a5", "a6", "a7"]
    assert found.kind.tolist() == ["photo: file not found"] * 2 + [
        "photo: address instead of a file"
    ]
    assert describe_remarks(tmp_path / "s")[0].startswith(
        "2 × photo: file not found, for example a5: photo x.jpg: file not found ("
    )


def test_the_end_of_a_pack_sums_its_remarks_up(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = catalogue(tmp_path, ["p0.jpg", "x.jpg", "", "y.jpg"], titles=False)
    words = ["pack", str(path), "--images", str(photos), "--out", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", ["dist-train", *words])
    for _ in range(2):  # the second finds the finished set
        cli.main()
        said = capsys.readouterr().out
        assert "1 postings packed, 3 rejected, 3 with a remark" in said
        assert f"remarks, each in {tmp_path / 's' / 'remarks.csv'}:\n  2 × photo: file not" in said
        assert "1 × neither a photo nor a title, for example a2: " in said


def test_without_photos_titles_alone_are_packed(tmp_path: Path, photos: Path) -> None:
    path = catalogue(tmp_path, ["p0.jpg", "none.jpg", ""])
    without = PackOptions(size=16, photos=False)
    with pytest.raises(BadInput, match="--no-photos and --images"):
        pack(path, photos, tmp_path / "s", without)
    with pytest.raises(BadInput, match=r"--images DIR, or .* --no-photos"):
        pack(path, None, tmp_path / "s", SMALL)
    counts = pack(path, None, tmp_path / "s", without)
    assert counts is not None
    assert (counts["packed"], counts["photos"], counts["with_reason"]) == (3, 0, 0)
    counts = pack(catalogue(tmp_path, ["p0.jpg", ""], titles=False), None, tmp_path / "t", without)
    reasons = ShardSet(tmp_path / "t").items.reason.tolist()
    assert reasons == ["no title, and photos are not packed", "neither a photo nor a title"]


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_kinds_of_phones_are_packed(tmp_path: Path, photos: Path, kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    draw = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    image = Image.fromarray(draw).resize((64, 48), Image.Resampling.BICUBIC)
    image.save(photos / f"a.{kind.lower()}", kind, quality=90)
    path = catalogue(tmp_path, [f"a.{kind.lower()}"])
    counts = pack(path, photos, tmp_path / "s", PackOptions())
    assert counts is not None
    assert counts["photos"] == 1
    data = ShardSet(tmp_path / "s").photo("a0")
    assert data is not None
    found = np.asarray(Image.open(io.BytesIO(data)), float)
    assert np.abs(found - np.asarray(image, float)).mean() < 8


def test_a_photo_within_a_cell_is_no_remark_of_its_length(tmp_path: Path, photos: Path) -> None:
    pack(
        catalogue(tmp_path, ["data:image/png;base64," + "A" * 50_000]),
        photos,
        tmp_path / "s",
        SMALL,
    )
    assert len(ShardSet(tmp_path / "s").items.reason[0]) < 1_200
