"""Blocks of items, the fixed list of block pairs, and the memory that blocks take.

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

    number: int
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


def blocks_of(vectors: ItemVectors, size: int, first_new: int = 0) -> list[Block]:
    """All items that have a vector, cut into blocks of at most `size`.

    Rows from `first_new` on lie in separate blocks, after the blocks of the rows before them.
    """
    found: list[Block] = []
    for first, last in ((0, first_new), (first_new, len(vectors))):
        for kind, mask in vectors.kinds.items():
            modalities = tuple(vectors.modalities) if kind == "complete" else (kind,)
            here = mask[first:last]
            rows = range(first, last) if here.all() else first + np.flatnonzero(here)
            for start in range(0, len(rows), size):
                found.append(Block(len(found), modalities, rows[start : start + size]))
    return found


def common_modalities(one: Block, other: Block) -> tuple[str, ...]:
    """The modalities that the items of both blocks have."""
    return tuple(name for name in one.modalities if name in other.modalities)


def block_pairs_of(blocks: list[Block], first_new: int = 0) -> list[BlockPair]:
    """Every unordered pair of blocks with a common modality, in an order that reuses blocks.

    The partners of a block come in ascending order, those of the next block in descending order:
    one block changes at a time. Pairs of rows that both lie before `first_new` are left out.
    """
    found: list[BlockPair] = []
    new = next((n for n, block in enumerate(blocks) if block.rows[0] >= first_new), len(blocks))
    for a, one in enumerate(blocks):
        later = range(max(a, new), len(blocks))
        partners = [b for b in later if common_modalities(one, blocks[b])]
        for b in partners if a % 2 == 0 else reversed(partners):
            area = len(one) * (len(one) + 1) // 2 if a == b else len(one) * len(blocks[b])
            found.append(BlockPair(len(found), a, b, area))
    return found


def required_area(items: int, first_new: int = 0) -> int:
    """Unordered pairs, self-matches included, with at least one row at `first_new` or after.

    N (N + 1) / 2 when all rows are new; else N_new N_old + N_new (N_new + 1) / 2.
    """
    return (items * (items + 1) - first_new * (first_new + 1)) // 2


def disjoint_area(vectors: ItemVectors, first_new: int = 0) -> int:
    """Those of `required_area` that no block pair holds: the items have no common modality."""

    def disjoint(N: int) -> int:
        nothing = int((~vectors.any_modality[:N]).sum())
        pairs = nothing * (N - nothing) + nothing * (nothing + 1) // 2
        masks = [v.present & ~vectors.complete for v in vectors.modalities.values()]
        single = [int(mask[:N].sum()) for mask in masks]
        return pairs + (single[0] * single[1] if len(single) == 2 else 0)

    return disjoint(len(vectors)) - disjoint(first_new)


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
    block = block_size(items)
    row = stored + prepared
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
