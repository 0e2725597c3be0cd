"""A large PNG in strips: Pillow decodes each as a PNG of few rows, so that no more is in memory.

Rows of a PNG are told as differences to the row above (PNG specification, §9). So a strip is
decoded twice: as plain bytes below the last row before it, which gives the bytes of its rows, and
then as a picture of its own, by which Pillow finds colours, alpha and 16 bits as in the whole.
"""

import io
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
AS_BYTES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Colour type of pixels of so many bytes."""
COLOURS = (b"PLTE", b"tRNS", b"iCCP", b"gAMA", b"cHRM", b"sRGB")
FRAMES = (b"IHDR", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
FED = 2**16


class Header(NamedTuple):
    """What IHDR says, and the chunks that tell of colours."""

    width: int
    height: int
    depth: int
    kind: int
    interlaced: bool
    colours: bytes

    @property
    def pixel(self) -> int:
        """Bytes of the pixel to the left, by which rows are told; 1 where it has less."""
        return max(1, self.depth * CHANNELS[self.kind] // 8)

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return -(-self.width * self.depth * CHANNELS[self.kind] // 8)


def in_strips(data: bytes, rows: int) -> Iterator[Image.Image] | None:
    """Pictures of `rows` rows (the last of fewer) of the PNG `data`; None when it is interlaced.

    They raise OSError for a PNG that is cut, zlib.error and what Pillow raises for a broken one.
    """
    head = _header(data)
    return None if head.interlaced else _strips(data, head, rows)


def told_beside(data: bytes) -> Image.Image:
    """A picture of one pixel that tells what `data` tells beside its pixels: how it is turned."""
    beside = [_chunk(kind, body) for kind, body in _chunks(data) if kind not in FRAMES + COLOURS]
    return Image.open(io.BytesIO(_png(1, 8, 0, np.zeros((1, 1), np.uint8), b"".join(beside))))


def _strips(data: bytes, head: Header, rows: int) -> Iterator[Image.Image]:
    above = np.zeros((1, head.row), np.uint8)
    for lines in _lines(data, head, rows):
        filters, told = lines[:, :1], lines[:, 1:]
        plain = np.empty_like(told)
        pixels, found = (a.reshape(len(a), -1, head.pixel) for a in (told, plain))
        last = above.reshape(1, -1, head.pixel)
        # Bytes of a pixel do not depend on each other; more than four make no picture.
        step = head.pixel if head.pixel <= 4 else head.pixel // 2
        for first in range(0, head.pixel, step):
            part = slice(first, first + step)
            found[..., part] = _unfiltered(filters, pixels[..., part], last[..., part])
        above = plain[-1:]
        strip = _png(head.width, head.depth, head.kind, plain, head.colours)
        yield Image.open(io.BytesIO(strip), formats=["PNG"])


def _unfiltered(filters: np.ndarray, told: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Bytes (rows, width, n) of what is `told` of them below the row `above`."""
    rows, width, size = told.shape
    below = np.concatenate([above, told]).reshape(rows + 1, -1)
    kinds = np.concatenate([np.zeros((1, 1), np.uint8), filters])
    picture = Image.open(io.BytesIO(_png(width, 8, AS_BYTES[size], below, b"", kinds)))
    return np.asarray(picture).reshape(rows + 1, width, size)[1:]


def _lines(data: bytes, head: Header, rows: int) -> Iterator[np.ndarray]:
    """The rows as they are told, (n, 1 + row) uint8, `rows` at a time."""
    line, left = 1 + head.row, head.height
    pieces = _inflated(data, rows * line)
    while left:
        piece = next(pieces, b"")
        wanted = min(rows, left) * line
        if len(piece) < wanted:
            raise OSError("image file is truncated")
        yield np.frombuffer(piece, np.uint8, wanted).reshape(-1, line)
        left -= wanted // line


def _inflated(data: bytes, size: int) -> Iterator[bytes]:
    """What the IDAT chunks hold, in pieces of `size` bytes; the last may be shorter."""
    inflate, held = zlib.decompressobj(), bytearray()
    for kind, body in _chunks(data):
        for begin in range(0, len(body) if kind == b"IDAT" else 0, FED):
            fed = bytes(body[begin : begin + FED])
            while fed and not inflate.eof:
                held += inflate.decompress(fed, size - len(held))
                fed = inflate.unconsumed_tail
                if len(held) == size:
                    yield bytes(held)
                    held.clear()
    yield bytes(held + inflate.flush())


def _header(data: bytes) -> Header:
    chunks = _chunks(data)
    _, head = next(chunks)
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (0, 4))
    colours = b"".join(_chunk(kind, body) for kind, body in chunks if kind in COLOURS)
    return Header(width, height, head[8], head[9], bool(head[12]), colours)


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view, at = memoryview(data), len(SIGNATURE)
    while at + 8 <= len(data):
        size = int.from_bytes(view[at : at + 4], "big")
        yield bytes(view[at + 4 : at + 8]), view[at + 8 : at + 8 + size]
        at += 12 + size


def _chunk(kind: bytes, body: bytes | memoryview) -> bytes:
    crc = zlib.crc32(body, zlib.crc32(kind))
    return b"".join([len(body).to_bytes(4, "big"), kind, body, crc.to_bytes(4, "big")])


def _png(
    width: int, depth: int, kind: int, rows: np.ndarray, beside: bytes,
    filters: np.ndarray | None = None,
) -> bytes:  # fmt: skip
    """A PNG of `rows` (n, bytes), told as `filters` (n, 1) say or as they are; uncompressed."""
    if filters is None:
        filters = np.zeros((len(rows), 1), np.uint8)
    size = width.to_bytes(4, "big") + len(rows).to_bytes(4, "big")
    head = _chunk(b"IHDR", size + bytes([depth, kind, 0, 0, 0]))
    body = zlib.compress(np.concatenate([filters, rows], axis=1).tobytes(), 0)
    return b"".join([SIGNATURE, head, beside, _chunk(b"IDAT", body), _chunk(b"IEND", b"")])
