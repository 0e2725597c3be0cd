"""Class centres: which rank has which, how each begins, and which ones a step sees.

Every value is a function of the class alone, never of the number of ranks.
"""

import torch

INIT_BLOCK = 256
"""Classes whose centres are drawn together."""
INIT_STD = 0.05
GOLDEN = -0x61C8864680B583EB
MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Constants of SplitMix64, as signed 64-bit integers."""
BITS = 53
"""Bits of a hash that float64 holds exactly."""


def class_range(classes: int, rank: int, world: int) -> tuple[int, int]:
    """First and one past the last class of a rank: contiguous, balanced, lower ranks have more."""
    size, more = divmod(classes, world)
    first = rank * size + min(rank, more)
    return first, first + size + (rank < more)


def initial_centres(first: int, last: int, width: int, seed: int, each: int = 1) -> torch.Tensor:
    """The initial centres of the classes `first` to `last` - 1, ((last - first) * each, width).

    A function of (seed, class id) alone; the `each` sub-centres of a class are neighbours.
    """
    out = torch.empty((last - first) * each, width)
    for block in range(first // INIT_BLOCK, -(-last // INIT_BLOCK)):
        begin = block * INIT_BLOCK
        low, high = max(first, begin), min(last, begin + INIT_BLOCK)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        rows = torch.randn(INIT_BLOCK * each, width, generator=generator) * INIT_STD
        out[(low - first) * each : (high - first) * each] = rows[
            (low - begin) * each : (high - begin) * each
        ]
    return out


def classes_of_step(
    first: int, last: int, own: torch.Tensor, rate: float, seed: int, step: int
) -> torch.Tensor:
    """Ascending numbers, counted from `first`, of the classes that `step` sees, (n,) int64.

    All of `own` (those of the batch, counted from `first`), each other with probability `rate`.
    After An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face
    Recognition CNNs by Partial FC (CVPR 2022), where each rank draws as many as it holds; here each
    class is drawn by a hash of (seed, step, class id), so that the number of ranks changes nothing.
    """
    ids = torch.arange(first, last, device=own.device)
    seen = uniform(ids, seed, step) < rate
    seen[own] = True
    return seen.nonzero().squeeze(1)


def uniform(ids: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """A number in [0, 1) for each id (n,), float64, from a hash of (seed, step, id).

    SplitMix64 (Steele et al., 2014). Equal on every device; int64 products wrap.
    """
    for key in (seed, step):
        ids = ids * GOLDEN + key
        ids = (ids ^ _shifted(ids, 30)) * MIX[0]
        ids = (ids ^ _shifted(ids, 27)) * MIX[1]
        ids = ids ^ _shifted(ids, 31)
    return _shifted(ids, 64 - BITS).double() / 2**BITS


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift; torch's own shift fills with the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
