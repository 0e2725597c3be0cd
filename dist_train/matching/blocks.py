"""Blocks of items that have the same parts, and the fixed list of tiles: pairs of blocks.

Items with both parts, with a photo only and with a title only lie in blocks of their own, so that
every tile has one meaning: which parts are compared, and with which weights.
"""

from dataclasses import dataclass

import numpy as np

from dist_train.matching.vectors import ItemVectors

CHUNK = 2_048
"""Rows of a product's sides: its scores stay near the processor while they are read."""
LARGEST_BLOCK = 65_536
SMALLEST_BLOCK = 1_024
BLOCKS, MOST_BLOCKS = 12, 1_024
"""Wanted in a small catalogue: 78 tiles are enough for some dozens of workers. And in the largest:
half a million tiles, a file each."""


@dataclass(frozen=True)
class Block:
    """Ascending row numbers of items that have exactly `parts`."""

    number: int
    parts: tuple[str, ...]
    rows: range | np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Row numbers int64 of the places `start` to `stop`."""
        return np.asarray(self.rows[start:stop], np.int64)


@dataclass(frozen=True)
class Tile:
    """A block asking another: the unit of work, of commit and of resume.

    `area` counts the unordered pairs, each item with itself included, that only it answers for.
    """

    number: int
    asking: int
    asked: int
    area: int


def block_size(items: int) -> int:
    """Rows of a block, whole chunks where there are some: a function of the items alone."""
    wanted = max(min(-(-items // BLOCKS), LARGEST_BLOCK), -(-items // MOST_BLOCKS))
    return -(-wanted // CHUNK) * CHUNK if wanted > SMALLEST_BLOCK else SMALLEST_BLOCK


def blocks_of(views: ItemVectors, size: int, first_new: int = 0) -> list[Block]:
    """All items that have a part, cut into blocks of at most `size`.

    Rows from `first_new` on lie in blocks of their own, behind those before them.
    """
    found: list[Block] = []
    for first, last in ((0, first_new), (first_new, len(views))):
        for kind, mask in views.kinds.items():
            parts = tuple(views.parts) if kind == "complete" else (kind,)
            here = mask[first:last]
            rows = range(first, last) if here.all() else first + np.flatnonzero(here)
            for start in range(0, len(rows), size):
                found.append(Block(len(found), parts, rows[start : start + size]))
    return found


def common_parts(one: Block, other: Block) -> tuple[str, ...]:
    """The parts that the items of both blocks have."""
    return tuple(part for part in one.parts if part in other.parts)


def tiles_of(blocks: list[Block], first_new: int = 0) -> list[Tile]:
    """Every unordered pair of blocks with a common part, ordered so that blocks are reused.

    A block meets its partners forwards, the next one backwards: one block changes at a time.
    Pairs of rows that both lie before `first_new` are left out: they were joined before.
    """
    found: list[Tile] = []
    new = next((n for n, block in enumerate(blocks) if block.rows[0] >= first_new), len(blocks))
    for a, one in enumerate(blocks):
        partners = [b for b in range(max(a, new), len(blocks)) if common_parts(one, blocks[b])]
        for b in partners if a % 2 == 0 else reversed(partners):
            area = len(one) * (len(one) + 1) // 2 if a == b else len(one) * len(blocks[b])
            found.append(Tile(len(found), a, b, area))
    return found


def area_wanted(items: int, first_new: int = 0) -> int:
    """Unordered pairs, each item with itself included, of which one lies at `first_new` or after.

    N (N + 1) / 2 of all; of old and new rows N_new N_old + N_new (N_new + 1) / 2.
    """
    return (items * (items + 1) - first_new * (first_new + 1)) // 2


def area_apart(views: ItemVectors, first_new: int = 0) -> int:
    """Those of area_wanted that no tile holds: pairs of items without a common part."""
    return _apart(views, len(views)) - _apart(views, first_new)


def _apart(views: ItemVectors, N: int) -> int:
    """Pairs without a common part among the first N rows."""
    nothing = int((~views.some[:N]).sum())
    apart = nothing * (N - nothing) + nothing * (nothing + 1) // 2
    single = [int((p.present & ~views.complete)[:N].sum()) for p in views.parts.values()]
    return apart + (single[0] * single[1] if len(single) == 2 else 0)
