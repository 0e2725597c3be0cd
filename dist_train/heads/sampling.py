"""Which classes a step sees: those of its items, and a random share of the others (Partial FC).

An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs
by Partial FC (CVPR 2022). There each rank draws as many as it holds; here each class is drawn by
a hash of (seed, step, class id), so that the number of ranks changes nothing.
"""

import torch

GOLDEN = -0x61C8864680B583EB
MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
BITS = 53


def classes_of_step(
    first: int, last: int, own: torch.Tensor, rate: float, seed: int, step: int
) -> torch.Tensor:
    """Ascending numbers, from `first` on, of the classes that `step` sees, (n,) int64.

    All of `own` (those of the batch, numbered from `first`), each other with probability `rate`.
    """
    ids = torch.arange(first, last, device=own.device)
    seen = uniform(ids, seed, step) < rate
    seen[own] = True
    return seen.nonzero().squeeze(1)


def uniform(ids: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """A number in [0, 1) for each id (n,), float64: SplitMix64 (Steele et al., 2014) of all three.

    Runs on any device; int64 products wrap.
    """
    for key in (seed, step):
        ids = _mixed(ids * GOLDEN + key)
    return _shifted(ids, 64 - BITS).double() / 2**BITS


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * MIX[0]
    x = (x ^ _shifted(x, 27)) * MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical, where torch shifts the sign in."""
    return (x >> by) & ((1 << (64 - by)) - 1)
