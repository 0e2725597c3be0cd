"""Caps on pixels: the option of packing, Pillow's own, and that of every reader."""

import io

import pytest
from PIL import Image

from shards.photos import decode
from shards.photos import photo as packing
from shards.photos.decode import PhotoRefused, decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo


def picture(kind: str, size: tuple[int, int] = (400, 300)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", decode.FORMATS)
def test_our_cap_is_the_one_that_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    data = picture(kind)
    for cap in (5_000, 25_000, 100_000):
        with pytest.raises(PhotoRefused, match=r"^(400 x 300|120000) pixels, over max_pixels$"):
            prepare_photo(data, PackOptions(size=64, max_pixels=cap))
    photo = prepare_photo(data, PackOptions(size=64, max_pixels=200_000))
    assert (photo.width, photo.height) == (85, 64)
    assert decode_photo(data, 32).size == (43, 32)
    assert Image.MAX_IMAGE_PIXELS == 10_000


def test_broken_bytes_of_a_large_photo_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(PhotoRefused, match="not a readable photo"):
        prepare_photo(picture("PNG")[:-60], PackOptions())


def test_what_readers_would_refuse_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data, cap = picture("JPEG"), 400 * 300
    options = PackOptions(size=64, keep=True, max_pixels=10**9)
    assert prepare_photo(data, options).jpeg == data
    monkeypatch.setattr(packing, "MAX_PIXELS", cap - 1)
    photo = prepare_photo(data, options)
    assert (photo.width, photo.height) == (85, 64)
    monkeypatch.setattr(decode, "MAX_PIXELS", cap - 1)
    assert decode_photo(photo.jpeg, 32).size == (42, 32)
