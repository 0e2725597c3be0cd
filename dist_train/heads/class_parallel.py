"""Softmax over classes that are sharded across ranks, with a margin on the item's own class.

No B x C tensor exists (see chunks.py). Three collectives a pass whatever W: all-gather of
embeddings and labels together, all-reduce of two numbers an item, reduce-scatter of the gradient of
the embeddings. The centres' gradient stays on its rank.
"""

from typing import Any

import torch

from dist_train.heads.centres import class_range, initial_centres
from dist_train.heads.chunks import Chunks, Exponentials, unit_rows
from dist_train.heads.collectives import gather, scatter_sum, sum_in_place, world
from dist_train.heads.margins import MARGINS, Margin, value_and_slope
from dist_train.heads.row_optimizer import coalesced
from dist_train.heads.sampling import classes_of_step
from shards.errors import BadInput


class MarginHead(torch.nn.Module):
    """Class centres of this rank's classes and the margin softmax loss over all of them.

    Stays outside `accelerator.prepare()`: DDP would overwrite the shards with rank 0's.
    """

    def __init__(
        self, *, classes: int, width: int, loss: str, scale: float, chunk: int, seed: int,
        rank: int = 0, world: int = 1, centres: int = 1, sample: float = 1.0,
        detached: bool = False, shares: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """`classes` C over all ranks, `width` D; this rank holds its rows of C * K x D.

        `centres` K a class, an item counting with the nearest; `sample` the share of the other
        classes that a step sees; `detached` leaves the margin out of the gradient; `shares` (C,)
        what part of the margin each class gets. `chunk` is in centres.
        """
        super().__init__()
        self.first, self.last = class_range(classes, rank, world)
        self.classes, self.scale, self.chunk, self.seed = classes, scale, chunk, seed
        self.centres, self.sample, self.detached = centres, sample, detached
        self.margin_of: Margin = MARGINS[loss]
        start = initial_centres(self.first, self.last, width, seed, centres)
        self.weight = torch.nn.Parameter(start)
        if sample < 1:  # else the rows of every pass of a step would wait side by side
            self.weight.register_post_accumulate_grad_hook(_put_together)
        own = None if shares is None else shares[self.first : self.last].clone()
        self.register_buffer("shares", own, persistent=False)

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, margin: float, step: int = 0
    ) -> torch.Tensor:
        """Mean loss over the global batch, equal on all ranks.

        `embeddings` (b, D) of this rank, any length; `labels` (b,) global class ids. Every rank
        gives the same b. The gradient is scaled by W, as DDP and ZeRO average over ranks. With
        `sample` below 1 the centres get a sparse gradient of the rows that `step` sees. Raises
        BadInput for float16 and for labels that are no class.
        """
        if torch.float16 in (embeddings.dtype, self.weight.dtype):
            raise BadInput(
                "the head got float16: exp(64) does not fit and a loss scale would differ from "
                "rank to rank; use precision bf16 or fp32"
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = unit_rows(embeddings.to(self.weight.dtype))
            return _ShardedMarginSoftmax.apply(unit, self.weight, labels, self, margin, step)

    def margins(self, classes: torch.Tensor, margin: float) -> torch.Tensor | float:
        """The margin of each of `classes` (m,), numbered from this rank's first."""
        return margin if self.shares is None else margin * self.shares[classes]


class _ShardedMarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unit: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
        head: MarginHead, margin: float, step: int,
    ) -> torch.Tensor:  # fmt: skip
        everyone, targets = gather(unit, labels)
        _check(targets, head.classes)
        chunks = _chunks(weight, targets, head, step)
        chunks.measure()
        exponentials = Exponentials(everyone, chunks, head.scale)
        cosine, best, centre = _nearest(everyone[chunks.items], chunks.targets())
        margins = head.margins(targets[chunks.items] - head.first, margin)
        with_margin, slope = value_and_slope(head.margin_of, cosine, margins, head.detached)
        sums = torch.zeros(2, len(everyone), dtype=torch.float64, device=unit.device)
        sums[0] = exponentials.sums()
        sums[1, chunks.items] = head.scale * with_margin.double()
        sum_in_place(sums)
        # log(other classes / own class): from it the loss of a well-classified item keeps its
        # digits, which lse - target would lose.
        rest = sums[0].log() - sums[1]
        lse = torch.logaddexp(sums[0].log(), sums[1])
        ctx.save_for_backward(weight, lse, rest, best, centre, slope)
        ctx.exponentials, ctx.head = exponentials, head
        return torch.logaddexp(rest, torch.zeros_like(rest)).mean().to(unit.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, lse, rest, best, centre, slope = ctx.saved_tensors
        head, exponentials = ctx.head, ctx.exponentials
        items, dtype = exponentials.chunks.items, weight.dtype
        each = grads[0].double() * head.scale / len(lse)
        # Below -scale there is no other class, and 1 / exp(lse) could leave float32's range.
        factor = each * (-lse.clamp(min=-head.scale - 1)).exp()
        onto = -each * torch.sigmoid(rest[items]) * slope
        d_everyone, d_rows = exponentials.gradients(factor.to(dtype), onto.to(dtype), best, centre)
        # Centres whose gradient is no number make that of the embeddings so, and with it the
        # encoder's on all ranks: whoever looks at the latter alone leaves the step out as well.
        d_everyone += 0 * torch.linalg.vector_norm(d_rows)
        d_weight = _as_gradient(d_rows, exponentials.chunks)
        ctx.exponentials = None  # its buffers would live as long as somebody holds the loss
        # DDP and ZeRO take the mean over ranks of what is a sum.
        return scatter_sum(d_everyone).mul_(world()), d_weight, None, None, None, None


def _chunks(weight: torch.Tensor, targets: torch.Tensor, head: MarginHead, step: int) -> Chunks:
    items = ((targets >= head.first) & (targets < head.last)).nonzero().squeeze(1)
    classes = targets[items] - head.first
    seen = None
    if head.sample < 1:
        seen = classes_of_step(head.first, head.last, classes, head.sample, head.seed, step)
    return Chunks(weight, head.centres, seen, head.chunk, items, classes)


def _nearest(
    items: torch.Tensor, centres: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of items (m, D) and the centres of their classes (m, K, D): cosine with the nearest (m,),
    its number (m,) and itself (m, D).
    """
    nearest, best = (items[:, None] * centres).sum(2).max(1)
    return nearest, best, centres[torch.arange(len(best), device=best.device), best]


def _as_gradient(d_rows: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    if chunks.seen is None:
        return d_rows
    shape = chunks.weight.shape
    return torch.sparse_coo_tensor(
        chunks.row_numbers()[None], d_rows, shape, is_coalesced=True, check_invariants=False
    )


def _put_together(weight: torch.Tensor) -> None:
    assert weight.grad is not None
    weight.grad = coalesced(weight.grad)


def _check(targets: torch.Tensor, classes: int) -> None:
    wrong = (targets < 0) | (targets >= classes)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise BadInput(
            f"row {row} of the global batch: class {int(targets[row])}, there are {classes}; pack "
            "the catalogue again, its class ids do not fit"
        )
