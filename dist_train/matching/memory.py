"""What a worker of the join needs in memory, told before it begins."""

from dataclasses import dataclass

from dist_train.matching.blocks import CHUNK, block_size
from dist_train.matching.join import SPILL
from dist_train.matching.kernels import BYTES
from shards.storage.errors import BadInput

PROGRAM = 720_000_000
"""Bytes of Python with torch, FAISS, pandas and Arrow, before any row is read."""
PAIR_BYTES = 28 * 3
"""A pair in the tables of a tile: as found, as laid together, as sorted."""
ITEM_BYTES = 60
"""An item on the process that ends the join: its name, its row, its place, its degree."""
PRODUCT_BYTES = 4 + 40
"""A product, and of what it leaves the places, the values and the scores of the second look."""


@dataclass(frozen=True)
class Bounds:
    """Rows of a block, blocks in memory, and the most that all of it may take, in bytes."""

    block: int
    held: int
    bytes: int


def join_bounds(items: int, stored: int, prepared: int, width: int, memory: int) -> Bounds:
    """The largest blocks that `memory` bytes allow, and how many of them stay at hand.

    `stored` and `prepared` are bytes a row, `width` numbers a row. The blocks are a function of
    these alone. Raises BadInput when not even the smallest blocks fit.
    """
    fixed = PROGRAM + PRODUCT_BYTES * CHUNK**2 + PAIR_BYTES * SPILL + 24 * CHUNK * width
    block = block_size(items)
    row = stored + prepared
    while fixed + 2 * block * row > memory and block > CHUNK:
        block = max(CHUNK, block // 2)
    least = fixed + 2 * min(block, items) * row
    if least > memory:
        raise BadInput(f"--memory {memory / 1e9:.2f}GB is too little for {width} numbers a row: "
                       f"at least {least / 1e9:.2f}GB")  # fmt: skip
    blocks = -(-items // block) + 2
    held = int(max(2, min(blocks, (memory - fixed) // max(1, block * row))))
    return Bounds(block, held, fixed + held * block * row)


def row_bytes(width: int, kernel: str, kinds: int) -> tuple[int, int]:
    """Bytes of a row of D = `width` in a block: as it is, float32, and as the kernel multiplies it.

    `kinds` is how many kinds of items there are (`ItemVectors.kinds`): a complete item is prepared once
    for each of the parts that others may lack.
    """
    return 4 * width, BYTES[kernel] * width * kinds


def join_peak(bounds: Bounds, items: int, row: int, pairs: int, tiles: int) -> int:
    """What a worker is expected to hold at most, the last one with the match lists too.

    `row` are bytes of a row in a block, `pairs` those of all `tiles`.
    """
    blocks = min(bounds.held * bounds.block, items) * row
    tables = PAIR_BYTES * min(SPILL, pairs // max(1, tiles))
    return PROGRAM + PRODUCT_BYTES * CHUNK**2 + blocks + tables + ITEM_BYTES * items
