"""Which file a name in a catalogue stands for, and what is said of names without one."""

import unicodedata
from pathlib import Path

import pytest

from shards.photos.find import find_photo
from shards.photos.remarks import (
    ADDRESS,
    BROKEN_LINK,
    FOLDER,
    LINK_OUTSIDE,
    NOT_FOUND,
    OUTSIDE,
    REMEDIES,
    SEVERAL_FILES,
    SEVERAL_NAMES,
    UNUSABLE_PATH,
    PhotoRefused,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """photos/ with a few files, and links that lead out of it."""
    (root := tmp_path / "photos").mkdir()
    (root / "a").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    for name in ("p0.jpg", "P1.JPG", "a/p2.png", "my photo.jpg", "two.jpg", "two.png", "a b;c.jpg"):
        (root / name).write_bytes(name.encode())
    (root / unicodedata.normalize("NFD", "fóto.jpg")).write_bytes(b"foto")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "out").symlink_to(tmp_path)
    (root / "inner.jpg").symlink_to("p0.jpg")
    (root / "broken.jpg").symlink_to("../nowhere.jpg")
    return root


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("p0.jpg", "p0.jpg"), ("./p0.jpg", "p0.jpg"), ("a/../p0.jpg", "p0.jpg"),
        ("/p0.jpg", "p0.jpg"), ("//p0.jpg", "p0.jpg"), ("/a/p2.png", "a/p2.png"),
        ("a\\p2.png", "a/p2.png"), ("\\p0.jpg", "p0.jpg"), (".\\a\\p2.png", "a/p2.png"),
        ("photos/p0.jpg", "p0.jpg"), ("photos\\p0.jpg", "p0.jpg"),
        ("C:\\shop\\photos\\a\\p2.png", "a/p2.png"), ("/data/photos/p0.jpg", "p0.jpg"),
        ("../photos/p0.jpg", "p0.jpg"), ("../other/photos/p0.jpg", "p0.jpg"),
        ("P0.JPG", "p0.jpg"), ("p0.JPG", "p0.jpg"), ("p1.jpg", "P1.JPG"), ("A/P2.PNG", "a/p2.png"),
        ("p0", "p0.jpg"), ("P1", "P1.JPG"), ("a/p2", "a/p2.png"), ("/p0", "p0.jpg"),
        (" p0.jpg\n", "p0.jpg"), ('["p0.jpg"]', "p0.jpg"), ("'p0.jpg'", "p0.jpg"),
        ("my%20photo.jpg", "my photo.jpg"), ("my photo.jpg", "my photo.jpg"),
        ("a b;c.jpg", "a b;c.jpg"), ("inner.jpg", "p0.jpg"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("follow", [False, True])
def test_a_name_stands_for_the_file_that_it_means(
    root: Path, name: str, file: str, follow: bool
) -> None:
    assert find_photo(root, name, follow).resolve() == (root / file).resolve()


def test_accents_may_be_written_in_one_character_or_two(root: Path) -> None:
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "fóto.jpg")
        assert find_photo(root, name).read_bytes() == b"foto"


def test_the_folder_may_be_named_in_any_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (alias := root.parent / "alias").symlink_to(root)
    for folder in (Path("."), Path("../photos"), alias, root / "a" / ".."):
        for follow in (False, True):
            assert find_photo(folder, "p0.jpg", follow).read_bytes() == b"p0.jpg"
            assert find_photo(folder, str(root / "p0.jpg"), follow).read_bytes() == b"p0.jpg"
            with pytest.raises(PhotoRefused):
                find_photo(folder, "../secret.jpg", follow)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("none.jpg", NOT_FOUND), ("a/none.jpg", NOT_FOUND), ("none", NOT_FOUND), ("", NOT_FOUND),
        ("a\\none.jpg", NOT_FOUND), ("https", NOT_FOUND),
        ("../secret.jpg", OUTSIDE), ("a/../../secret.jpg", OUTSIDE), ("/etc/passwd", OUTSIDE),
        ("..\\secret.jpg", OUTSIDE), ("photos/../../secret.jpg", OUTSIDE),
        ("link.jpg", LINK_OUTSIDE), ("out/secret.jpg", LINK_OUTSIDE), ("LINK.jpg", LINK_OUTSIDE),
        ("broken.jpg", BROKEN_LINK), ("a", FOLDER), ("/a", FOLDER),
        ("https://shop.example/p0.jpg", ADDRESS), ("http://x/photos/p0.jpg", ADDRESS),
        ("s3://bucket/p0.jpg", ADDRESS), ("//cdn.shop.example/p0.jpg", ADDRESS),
        ("https://x/1.jpg,https://x/2.jpg", ADDRESS), ("www.shop.example/p0.jpg", ADDRESS),
        ("p0.jpg|p0.jpg", SEVERAL_NAMES), ("p0.jpg,a/p2.png", SEVERAL_NAMES),
        ("p0.jpg;p0.jpg;p0.jpg", SEVERAL_NAMES), ("p0.jpg P1.JPG", SEVERAL_NAMES),
        ('["p0.jpg", "P1.JPG"]', SEVERAL_NAMES), ("p0.jpg\np0.jpg", SEVERAL_NAMES),
        ("two", SEVERAL_FILES), ("x" * 300, UNUSABLE_PATH), ("a\0b.jpg", UNUSABLE_PATH),
        ("\ud800.jpg", UNUSABLE_PATH),
    ],
)  # fmt: skip
def test_names_without_a_file_are_refused_with_what_is_the_matter(
    root: Path, name: str, kind: str
) -> None:
    with pytest.raises(PhotoRefused) as refused:
        find_photo(root, name)
    assert refused.value.kind == kind
    assert kind in REMEDIES


def test_links_of_the_folder_are_followed_where_they_are_trusted_and_names_never(
    root: Path,
) -> None:
    assert find_photo(root, "link.jpg", follow_links=True).read_bytes() == b"secret"
    assert find_photo(root, "out/secret.jpg", follow_links=True).read_bytes() == b"secret"
    for name in ("../secret.jpg", str(root.parent / "secret.jpg"), "a/../../secret.jpg"):
        with pytest.raises(PhotoRefused, match=OUTSIDE):
            find_photo(root, name, follow_links=True)
    with pytest.raises(PhotoRefused, match=BROKEN_LINK):
        find_photo(root, "broken.jpg", follow_links=True)
