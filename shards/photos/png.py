"""A large PNG in strips: Pillow decodes each as a PNG of few rows, so that no more is in memory.

Rows of a PNG are encoded as differences to the row above (PNG specification, §9). So a strip is
decoded twice: as plain bytes below the last row before it, which gives the bytes of its rows, and
then as a separate image, in which Pillow finds colours, alpha and 16 bits as in the complete one.
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
"""The colour type whose pixels have so many bytes."""
COLOURS = (b"PLTE", b"tRNS", b"iCCP", b"gAMA", b"cHRM", b"sRGB")
FRAMES = (b"IHDR", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
FED = 2**16
"""Compressed bytes that are decompressed at a time."""


class Header(NamedTuple):
    """The fields of IHDR, and the chunks that define colours."""

    width: int
    height: int
    depth: int
    kind: int
    interlaced: bool
    colours: bytes

    @property
    def pixel(self) -> int:
        """Bytes of the pixel to the left, which rows are encoded against; 1 where it has less."""
        return max(1, self.depth * CHANNELS[self.kind] // 8)

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return -(-self.width * self.depth * CHANNELS[self.kind] // 8)


def in_strips(data: bytes, rows: int) -> Iterator[Image.Image] | None:
    """Images of `rows` rows (the last of fewer) of the PNG `data`; None when it is interlaced.

    They raise OSError for a PNG that is cut, zlib.error and what Pillow raises for a damaged one.
    """
    chunks = _chunks(data)
    _, head = next(chunks)
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (0, 4))
    colours = b"".join(_chunk(kind, body) for kind, body in chunks if kind in COLOURS)
    header = Header(width, height, head[8], head[9], bool(head[12]), colours)
    return None if header.interlaced else _strips(data, header, rows)


def metadata_image(data: bytes) -> Image.Image:
    """An image of one pixel with the metadata of the PNG `data`, such as its orientation."""
    others = [_chunk(kind, body) for kind, body in _chunks(data) if kind not in FRAMES + COLOURS]
    return Image.open(io.BytesIO(_png(1, 8, 0, np.zeros((1, 1), np.uint8), b"".join(others))))


def _strips(data: bytes, head: Header, rows: int) -> Iterator[Image.Image]:
    above = np.zeros((1, head.row), np.uint8)
    no_filter = np.zeros((1, 1), np.uint8)
    for lines in _lines(data, head, rows):
        filters, encoded = lines[:, :1], lines[:, 1:]
        plain = np.empty_like(encoded)
        pixels, found = (a.reshape(len(a), -1, head.pixel) for a in (encoded, plain))
        last = above.reshape(1, -1, head.pixel)
        # The bytes of a pixel do not depend on each other; an image takes at most four.
        step = head.pixel if head.pixel <= 4 else head.pixel // 2
        for first in range(0, head.pixel, step):
            channels = slice(first, first + step)
            rows_below = np.concatenate([last[..., channels], pixels[..., channels]])
            shape, kind = rows_below.shape, AS_BYTES[rows_below.shape[2]]
            kinds = np.concatenate([no_filter, filters])
            as_png = _png(shape[1], 8, kind, rows_below.reshape(len(kinds), -1), b"", kinds)
            found[..., channels] = np.asarray(Image.open(io.BytesIO(as_png))).reshape(shape)[1:]
        above = plain[-1:]
        strip = _png(head.width, head.depth, head.kind, plain, head.colours)
        yield Image.open(io.BytesIO(strip), formats=["PNG"])


def _lines(data: bytes, head: Header, rows: int) -> Iterator[np.ndarray]:
    """Yield the encoded rows with their filters, (n, 1 + row) uint8, `rows` at a time."""
    line, left = 1 + head.row, head.height
    inflate, held, fed = zlib.decompressobj(), bytearray(), b""
    bodies = (
        bytes(body[begin : begin + FED])
        for kind, body in _chunks(data)
        if kind == b"IDAT"
        for begin in range(0, len(body), FED)
    )
    while left:
        while len(held) < rows * line and not inflate.eof:
            if not fed and not (fed := next(bodies, b"")):
                held += inflate.flush()
                break
            held += inflate.decompress(fed, rows * line - len(held))
            fed = inflate.unconsumed_tail
        wanted = min(rows, left) * line
        if len(held) < wanted:
            raise OSError("image file is truncated")
        yield np.frombuffer(bytes(held[:wanted]), np.uint8).reshape(-1, line)
        del held[:wanted]
        left -= wanted // line


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(type, body) of the chunks of a PNG."""
    modality, at = memoryview(data), len(SIGNATURE)
    while at + 8 <= len(data):
        size = int.from_bytes(modality[at : at + 4], "big")
        yield bytes(modality[at + 4 : at + 8]), modality[at + 8 : at + 8 + size]
        at += 12 + size


def _chunk(kind: bytes, body: bytes | memoryview) -> bytes:
    crc = zlib.crc32(body, zlib.crc32(kind))
    return b"".join([len(body).to_bytes(4, "big"), kind, body, crc.to_bytes(4, "big")])


def _png(
    width: int,
    depth: int,
    kind: int,
    rows: np.ndarray,
    others: bytes,
    filters: np.ndarray | None = None,
) -> bytes:
    """A PNG of `rows` (n, bytes), encoded as `filters` (n, 1) name or plain; uncompressed.

    `others` are further chunks.
    """
    if filters is None:
        filters = np.zeros((len(rows), 1), np.uint8)
    size = width.to_bytes(4, "big") + len(rows).to_bytes(4, "big")
    head = _chunk(b"IHDR", size + bytes([depth, kind, 0, 0, 0]))
    body = zlib.compress(np.concatenate([filters, rows], axis=1).tobytes(), 0)
    return b"".join([SIGNATURE, head, others, _chunk(b"IDAT", body), _chunk(b"IEND", b"")])
