"""Blocks of items, pairs of them, and the memory that blocks take.

Complete items, items with a photo only and items with a title only lie in separate blocks, so that
all pairs of a block pair are compared in the same modalities with the same weights.
"""

from dataclasses import dataclass

import numpy as np

from dist_train.matching.vectors import ItemVectors
from shards.storage.errors import BadInput

CHUNK = 2_048
"""Rows of each side of one matrix product: its scores stay in the cache while they are read."""
LARGEST_BLOCK, SMALLEST_BLOCK = 65_536, 1_024
BLOCKS, MOST_BLOCKS = 12, 1_024
"""Number of blocks of a small catalogue (78 block pairs are enough for dozens of workers) and of
the largest (half a million block pairs, one file each)."""
PAIRS_IN_MEMORY = 2_000_000
"""Pairs of a block pair that are held before they are written to a file."""
PROGRAM = 720_000_000
"""Bytes of Python with torch, FAISS, pandas and Arrow, before any row is read."""
PAIR_BYTES = 28 * 3
"""Bytes of a pair in the tables of a block pair: as found, concatenated, sorted."""
ITEM_BYTES = 60
"""Bytes of an item in the process that finishes the join: name, row, position, degree."""
PRODUCT_BYTES = 4 + 40
"""Bytes of a product: itself, and if it is a candidate its places, value and re-computed score."""


@dataclass(frozen=True)
class Block:
    """Ascending row numbers of items that have exactly `modalities`."""

    modalities: tuple[str, ...]
    rows: range | np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Row numbers int64 of the positions `start` to `stop`."""
        return np.asarray(self.rows[start:stop], np.int64)


@dataclass(frozen=True)
class BlockPair:
    """A query block against a database block: the unit of work, of commit and of resume.

    `area` counts the unordered pairs, self-matches included, that no other block pair holds.
    """

    number: int
    query: int
    database: int
    area: int


def block_size(items: int) -> int:
    """Rows of a block, a multiple of CHUNK if larger than one: a function of the items alone."""
    wanted = max(min(-(-items // BLOCKS), LARGEST_BLOCK), -(-items // MOST_BLOCKS))
    return -(-wanted // CHUNK) * CHUNK if wanted > SMALLEST_BLOCK else SMALLEST_BLOCK


def blocks_of(vectors: ItemVectors, size: int) -> list[Block]:
    """All items that have a vector, cut into blocks of at most `size`."""
    found: list[Block] = []
    for kind, mask in vectors.kinds.items():
        modalities = tuple(vectors.modalities) if kind == "complete" else (kind,)
        rows = range(len(mask)) if mask.all() else np.flatnonzero(mask)
        found += [Block(modalities, rows[n : n + size]) for n in range(0, len(rows), size)]
    return found


def common_modalities(one: Block, other: Block) -> tuple[str, ...]:
    """The modalities that the items of both blocks have."""
    return tuple(name for name in one.modalities if name in other.modalities)


def disjoint_area(vectors: ItemVectors) -> int:
    """Unordered pairs, self-matches included, that no block pair holds: no common modality."""
    N, nothing = len(vectors), int((~vectors.any_modality).sum())
    pairs = nothing * (N - nothing) + nothing * (nothing + 1) // 2
    single = [int(mask.sum()) for kind, mask in vectors.kinds.items() if kind != "complete"]
    return pairs + (single[0] * single[1] if len(single) == 2 else 0)


@dataclass(frozen=True)
class Bounds:
    """Rows of a block, blocks held in memory, and the most bytes that the process may take."""

    block: int
    held: int
    bytes: int


def join_bounds(items: int, stored: int, prepared: int, width: int, memory: int) -> Bounds:
    """The largest blocks that `memory` bytes allow, and how many of them can be held.

    `stored` and `prepared` are bytes of a row, as float32 and as the kernel multiplies it; `width`
    is D. The block size is a function of the arguments alone. Raises BadInput when not even the
    smallest blocks fit.
    """
    tables = PAIR_BYTES * PAIRS_IN_MEMORY + 24 * CHUNK * width
    fixed = PROGRAM + PRODUCT_BYTES * CHUNK**2 + tables
    block, row = block_size(items), stored + prepared
    while fixed + 2 * block * row > memory and block > CHUNK:
        block = max(CHUNK, block // 2)
    least = fixed + 2 * min(block, items) * row
    if least > memory:
        raise BadInput(
            f"--memory {memory / 1e9:.2f}GB is too little for {width} numbers a row: "
            f"at least {least / 1e9:.2f}GB"
        )
    blocks = -(-items // block) + 2
    held = int(max(2, min(blocks, (memory - fixed) // max(1, block * row))))
    return Bounds(block, held, fixed + held * block * row)


def join_peak(bounds: Bounds, items: int, row: int, pairs: int, block_pairs: int) -> int:
    """Bytes that a worker is expected to hold at the peak, the finish of the join included.

    `row` is bytes of a row in a block; `pairs` are found in all `block_pairs` together.
    """
    blocks = min(bounds.held * bounds.block, items) * row
    tables = PAIR_BYTES * min(PAIRS_IN_MEMORY, pairs // max(1, block_pairs))
    return PROGRAM + PRODUCT_BYTES * CHUNK**2 + blocks + tables + ITEM_BYTES * items
