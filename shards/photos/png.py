"""A large PNG in strips: Pillow decodes each as a PNG of few rows, so that no more is in memory.

Rows of a PNG are encoded as differences to the row above (PNG specification, §9). So a strip is
decoded twice: as plain bytes below the last row before it, which gives the bytes of its rows, and
then as a separate image, in which Pillow finds colours, alpha and 16 bits as in the complete one.
"""

import io
import zlib
from collections.abc import Iterator

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


def in_strips(data: bytes, rows: int) -> Iterator[Image.Image]:
    """Images of `rows` rows (the last of fewer) of the PNG `data`, which is not interlaced.

    Raises OSError for a PNG that is cut, zlib.error and what Pillow raises for a damaged one.
    """
    chunks = _chunks(data)
    _, head = next(chunks)
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (0, 4))
    depth, kind = head[8], head[9]
    colours = b"".join(_chunk(name, body) for name, body in chunks if name in COLOURS)
    bits = depth * CHANNELS[kind]
    # Bytes of the pixel to the left, which rows are encoded against; 1 where it has less.
    pixel, row = max(1, bits // 8), -(-width * bits // 8)
    # The bytes of a pixel do not depend on each other; an image takes at most four.
    step = pixel if pixel <= 4 else pixel // 2
    above = np.zeros((1, 1 + row), np.uint8)
    for encoded in _lines(data, row, height, rows):
        lines = np.concatenate([above, encoded])
        filters, pixels = lines[:, :1], lines[:, 1:].reshape(len(lines), -1, pixel)
        decoded = []
        for first in range(0, pixel, step):
            channels = pixels[..., first : first + step]
            separate = np.concatenate([filters, channels.reshape(len(lines), -1)], axis=1)
            png = _png(channels.shape[1], 8, AS_BYTES[channels.shape[2]], separate)
            decoded.append(np.asarray(Image.open(io.BytesIO(png))).reshape(channels.shape))
        # The rows now stand for themselves: their filter is 0.
        lines = np.pad(np.concatenate(decoded, 2).reshape(-1, row), ((0, 0), (1, 0)))
        above = lines[-1:]
        strip = _png(width, depth, kind, lines[1:], colours)
        yield Image.open(io.BytesIO(strip), formats=["PNG"])


def metadata_image(data: bytes) -> Image.Image:
    """An image of one pixel with the metadata of the PNG `data`, such as its orientation."""
    others = [_chunk(kind, body) for kind, body in _chunks(data) if kind not in FRAMES + COLOURS]
    return Image.open(io.BytesIO(_png(1, 8, 0, np.zeros((1, 2), np.uint8), b"".join(others))))


def _lines(data: bytes, row: int, height: int, rows: int) -> Iterator[np.ndarray]:
    """Yield the encoded rows with their filters, (n, 1 + row) uint8, `rows` at a time."""
    line, left = 1 + row, height
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
    content, at = memoryview(data), len(SIGNATURE)
    while at + 8 <= len(data):
        size = int.from_bytes(content[at : at + 4], "big")
        yield bytes(content[at + 4 : at + 8]), content[at + 8 : at + 8 + size]
        at += 12 + size


def _chunk(kind: bytes, body: bytes | memoryview) -> bytes:
    crc = zlib.crc32(body, zlib.crc32(kind))
    return b"".join([len(body).to_bytes(4, "big"), kind, body, crc.to_bytes(4, "big")])


def _png(width: int, depth: int, kind: int, lines: np.ndarray, others: bytes = b"") -> bytes:
    """A PNG of `lines` (n, 1 + bytes), each behind its filter; uncompressed.

    `others` are further chunks.
    """
    size = width.to_bytes(4, "big") + len(lines).to_bytes(4, "big")
    head = _chunk(b"IHDR", size + bytes([depth, kind, 0, 0, 0]))
    body = zlib.compress(lines.tobytes(), 0)
    return b"".join([SIGNATURE, head, others, _chunk(b"IDAT", body), _chunk(b"IEND", b"")])
