"""Class centres before training: which rank has which, and how each begins.

Every value is a function of the class alone, never of the number of ranks.
"""

import torch

from dist_train.heads.collectives import gather

INIT_BLOCK = 256
INIT_STD = 0.05


def class_range(classes: int, rank: int, world: int) -> tuple[int, int]:
    """First and one past the last class of a rank: contiguous, balanced, lower ranks take more."""
    size, more = divmod(classes, world)
    first = rank * size + min(rank, more)
    return first, first + size + (rank < more)


def initial_centres(first: int, last: int, width: int, seed: int, each: int = 1) -> torch.Tensor:
    """The initial centres of the classes `first` to `last`, ((last - first) * each, width).

    A function of (seed, class id) alone; the `each` sub-centres of a class are neighbours.
    """
    out = torch.empty((last - first) * each, width)
    for block in range(first // INIT_BLOCK, -(-last // INIT_BLOCK)):
        begin = block * INIT_BLOCK
        low, high = max(first, begin), min(last, begin + INIT_BLOCK)
        rows = _init_block(block, width, seed, each)[(low - begin) * each : (high - begin) * each]
        out[(low - first) * each : (high - first) * each] = rows
    return out


def _init_block(block: int, width: int, seed: int, each: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
    return torch.randn(INIT_BLOCK * each, width, generator=generator) * INIT_STD


class ClassMeans:
    """The mean vector of each class of a rank, of vectors that all ranks bring round by round.

    In a round every rank adds as many rows; the rows of a class are summed in the order of rounds
    and, within one, of ranks. So with whole batches dealt out in turn the order is that of the
    batches, and the sums are bit for bit the same for any number of ranks.
    """

    def __init__(self, first: int, last: int, width: int, device: torch.device) -> None:
        self.first, self.last = first, last
        self.sums = torch.zeros(last - first, width, dtype=torch.float64, device=device)

    def add(self, vectors: torch.Tensor, labels: torch.Tensor) -> None:
        """`vectors` (b, D) float32 and `labels` (b,), -1 for a row that pads; all ranks call it."""
        everyone, classes = gather(vectors, labels)
        mine = ((classes >= self.first) & (classes < self.last)).nonzero().squeeze(1)
        self.sums.index_add_(0, classes[mine] - self.first, everyone[mine].double())

    def into(self, weight: torch.Tensor, each: int) -> int:
        """Move the centres ((last - first) * each, D) of classes that have a mean; how many have.

        Takes the mean's direction; a random rest an eighth as long as it keeps sub-centres apart.
        """
        known = self.sums.norm(dim=1) > 0
        unit = torch.nn.functional.normalize(self.sums[known], dim=1).to(weight.dtype)
        by_class = weight.view(len(self.sums), each, weight.shape[1])
        size = INIT_STD * weight.shape[1] ** 0.5
        rest = by_class[known] if each > 1 else torch.zeros_like(by_class[known])
        by_class[known] = unit[:, None] * size + rest / 8
        return int(known.sum())
