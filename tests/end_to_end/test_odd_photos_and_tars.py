"""Small odd photos and tars: used as they are meant, or named with the reason; nothing is lost."""

import io
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, features

from tests.support.tars import samples, write_tar
from tests.support.verbs import call

PIXELS = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(out, kind, **options)
    return out.getvalue()


def frames(kind: str) -> bytes:
    more = [Image.fromarray(PIXELS[::-1].copy()) for _ in range(3)]
    return saved(kind, save_all=True, append_images=more)


JPEG = saved("JPEG")
GREY_16 = Image.fromarray(np.linspace(0, 4095, 1200).astype(np.uint16).reshape(40, 30))
USED = {
    "png-called.jpg": saved("PNG"),
    "no-colours.jpg": saved("JPEG", Image.fromarray(PIXELS[..., 0])),
    "print.jpg": saved("JPEG", Image.fromarray(PIXELS).convert("CMYK")),
    "palette.png": saved("PNG", Image.fromarray(PIXELS).convert("P")),
    "see-through.png": saved("PNG", Image.fromarray(PIXELS).convert("RGBA")),
    "twelve-bits.tif": saved("TIFF", GREY_16),
    "moving.gif": frames("GIF"),
    "moving.webp": frames("WEBP"),
    "pages.tiff": frames("TIFF"),
    "bitmap.bmp": saved("BMP"),
    "one-pixel.jpg": saved("JPEG", Image.fromarray(PIXELS[:1, :1])),
    "bytes-behind.jpg": JPEG + b"\0" * 999,
    "UPPER.JPG": JPEG,
    "with blank & ümlaut #1.jpg": JPEG,
    "photo.avif": saved("AVIF") if features.check("avif") else JPEG,
}
REFUSED = {
    "empty.jpg": b"",
    "half.jpg": JPEG[: len(JPEG) // 2],
    "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
    "words.jpg": b"Too many requests",
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "film.jpg": b"\0\0\0\x18ftypmp42" + bytes(40),
    "paper.jpg": b"%PDF-1.4\n",
}


def packed(rows: list[str], images: Path, out: Path) -> pd.DataFrame:
    """items.parquet of these rows after two that are well."""
    for number in range(2):
        (images / f"good{number}.jpg").write_bytes(saved("JPEG", Image.fromarray(PIXELS[number:])))
    rows = ["good0,good0.jpg,a,1", "good1,good1.jpg,b,1", *rows]
    table = "\n".join(["posting_id,image,title,label_group", *rows])
    (out.parent / "c.csv").write_text(table)
    said = call("pack", out.parent / "c.csv", "--images", images, "--out", out)
    assert said.code == 0, said.text
    items = pd.read_parquet(out / "items.parquet").fillna("")
    assert items.has_image[:2].all()
    assert len(items) == len(rows)
    return items


@pytest.mark.parametrize("name", USED)
def test_a_photo_that_can_be_used(name: str, tmp_path: Path) -> None:
    (tmp_path / "ph").mkdir()
    (tmp_path / "ph" / name).write_bytes(USED[name])
    odd = packed([f'odd,"{name}",c,2'], tmp_path / "ph", tmp_path / "s").iloc[2]
    assert odd.has_image, odd.reason
    assert odd.width > 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_photo_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    (tmp_path / "ph").mkdir()
    (tmp_path / "ph" / name).write_bytes(REFUSED[name])
    items = packed([f"with,{name},c,2", f"without,{name},,2"], tmp_path / "ph", tmp_path / "s")
    for item in items[2:].itertuples():
        assert not item.has_image
        assert name in item.reason
        assert len(item.reason) > len(name) + 10
    assert items.status.tolist() == ["packed", "packed", "packed", "rejected"]


def _composed(folder: Path) -> str:
    """The name in the catalogue is composed, that on the disk of a Mac is not."""
    (folder / unicodedata.normalize("NFD", "é.jpg")).write_bytes(JPEG)
    return "é.jpg"


def _link_inside(folder: Path) -> str:
    (folder / "real.jpg").write_bytes(JPEG)
    (folder / "link.jpg").symlink_to("real.jpg")
    return "link.jpg"


def _link_outside(folder: Path) -> str:
    (folder.parent / "outside.jpg").write_bytes(JPEG)
    (folder / "link.jpg").symlink_to("../outside.jpg")
    return "link.jpg"


def _link_in_a_circle(folder: Path) -> str:
    (folder / "link.jpg").symlink_to("link.jpg")
    return "link.jpg"


def _above(folder: Path) -> str:
    (folder.parent / "outside.jpg").write_bytes(JPEG)
    return "../outside.jpg"


def _folder(folder: Path) -> str:
    (folder / "folder.jpg").mkdir()
    return "folder.jpg"


def _pipe(folder: Path) -> str:
    """Whoever opens it waits for ever."""
    os.mkfifo(folder / "pipe.jpg")
    return "pipe.jpg"


PLACES: list[tuple[Callable[[Path], str], bool | None]] = [
    (_composed, None), (_link_inside, True), (_link_outside, False), (_link_in_a_circle, False),
    (_above, False), (_folder, False), (_pipe, False), (lambda folder: "x" * 5000, False),
    (lambda folder: "none.jpg", False), (lambda folder: "/etc/hostname", False),
    (lambda folder: "file:///etc/hostname", False), (lambda folder: ".", False),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("make", "used"), PLACES)
def test_a_photo_in_an_odd_place(
    make: Callable[[Path], str], used: bool | None, tmp_path: Path
) -> None:
    (tmp_path / "ph").mkdir()
    name = make(tmp_path / "ph")
    odd = packed([f"odd,{name},c,2"], tmp_path / "ph", tmp_path / "s").iloc[2]
    assert used is None or odd.has_image == used
    assert odd.has_image or name[:20] in odd.reason
    assert odd.status == "packed"


# ── tars


def links(kind: bytes) -> Callable[[Path], None]:
    """A tar whose second photo is a link to the first."""

    def write(path: Path) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(2):
                info = tarfile.TarInfo(f"{number}.jpg")
                if number:
                    info.type, info.linkname = kind, "0.jpg"
                info.size = 0 if number else len(JPEG)
                tar.addfile(info, None if number else io.BytesIO(JPEG))

    return write


def of(*members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Callable[[Path], None]:
    return lambda path: write_tar(path, members, form)


MAC = [("._0.jpg", b"\0\5\26\7"), ("0.jpg", JPEG), ("__MACOSX/._0.jpg", b"\0\5\26\7")]
MAC += [(".DS_Store", b"\0\0\0\1Bud1"), ("._1.txt", b"\0\5\26\7"), ("1.txt", b"shoe")]
LONG = f"{'d' * 90}/{'e' * 90}/"
TARS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "as they should be": (of(*samples(0, 3)), 3, ""),
    "made on a Mac": (of(*MAC), 2, ""),
    "in folders": (of(("x/0.jpg", JPEG), ("y/0.jpg", JPEG)), 2, ""),
    "capitals": (of(("0.JPG", JPEG), ("1.Jpeg", JPEG)), 2, ""),
    "GNU names": (of((f"{LONG}0.jpg", JPEG), form=tarfile.GNU_FORMAT), 1, ""),
    "pax names": (of((f"{LONG}ü.jpg", JPEG), form=tarfile.PAX_FORMAT), 1, ""),
    "titles only": (of(("0.txt", b"shoe"), ("1.txt", b"hat")), 2, ""),
    "a damaged photo": (of(("0.jpg", JPEG), ("1.jpg", JPEG[:50]), ("1.txt", b"hat")), 2, ""),
    "hard links": (links(tarfile.LNKTYPE), 0, "1.jpg.*(link|dereference)"),
    "soft links": (links(tarfile.SYMTYPE), 0, "1.jpg.*(link|dereference)"),
    "one name twice": (of(("0.jpg", JPEG), ("0.jpg", JPEG)), 0, "0.jpg"),
    "two photos of an item": (of(("0.jpg", JPEG), ("0.png", JPEG)), 0, "0.png"),
    "another kind": (of(("0.jpg", JPEG), ("0.npy", b"x")), 0, "npy.*--leave npy"),
    "json that is a list": (of(("0.jpg", JPEG), ("0.json", b"[1]")), 0, "'0'.*json"),
    "json that is none": (of(("0.jpg", JPEG), ("0.json", b"{")), 0, "'0'.*json"),
    "no member": (of(), 0, "no item"),
    "no tar": (lambda path: path.write_bytes(b"<html>" * 200), 0, "0.tar"),
    "empty file": (lambda path: path.write_bytes(b""), 0, "0.tar"),
}


@pytest.mark.parametrize("kind", TARS)
def test_a_tar(kind: str, tmp_path: Path) -> None:
    write, items, refusal = TARS[kind]
    write(tmp_path / "0.tar")
    before = (tmp_path / "0.tar").read_bytes()
    said = call("index-tars", tmp_path)
    assert (tmp_path / "0.tar").read_bytes() == before
    if refusal:
        assert said.code == 2, said.text
        assert re.search(refusal, said.text.splitlines()[-1]), said.text
        assert not (tmp_path / "manifest.json").exists()
    else:
        assert said.code == 0, said.text
        assert len(pd.read_parquet(tmp_path / "items.parquet")) == items


@pytest.mark.parametrize("pattern", ["npy", "*.npy", "depth.*"])
def test_members_left_by_a_pattern(pattern: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.depth.npy", b"x")])
    said = call("index-tars", tmp_path, "--leave", f"{pattern},depth.npy")
    assert said.code == 0, said.text


def test_the_tar_itself_instead_of_its_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(0, 2))
    said = call("index-tars", tmp_path / "0.tar")
    assert said.code == 2, said.text
    assert str(tmp_path) in said.text
    assert "folder" in said.text
