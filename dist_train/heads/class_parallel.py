"""Softmax over classes that are sharded across ranks, a chunk of logits at a time.

No B x C tensor exists: forward adds up exp(logit) over chunks of classes, backward computes the
chunk again. With |logit| <= 64 the sum of exponentials stays inside float32 for 5e10 classes, so
no pass for the maximum is needed. Four collectives a step whatever W: all-gather of the embeddings
and of the labels, one all-reduce of two numbers an item, reduce-scatter of the gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_train.heads.margins import MARGINS, Margin

INIT_BLOCK = 256
NORM_FLOOR = 1e-12


class MarginHead(torch.nn.Module):
    """Class centres of this rank's classes and the margin softmax loss over all of them.

    Stays outside `accelerator.prepare()`: DDP would overwrite the shards with rank 0's.
    """

    def __init__(
        self, *, classes: int, width: int, loss: str, scale: float, chunk: int, seed: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        """`classes` C over all ranks, `width` D; this rank holds its rows of C x D."""
        super().__init__()
        self.first, self.last = class_range(classes, rank, world)
        self.classes, self.scale, self.chunk = classes, scale, chunk
        self.margin_of: Margin = MARGINS[loss]
        self.weight = torch.nn.Parameter(initial_centres(self.first, self.last, width, seed))

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, margin: float
    ) -> torch.Tensor:
        """Mean loss over the global batch, equal on all ranks.

        `embeddings` (b, D) of this rank, any length; `labels` (b,) global class ids. Every rank
        gives the same b. The gradient is scaled by W, as DDP and ZeRO average over ranks.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = F.normalize(embeddings.to(self.weight.dtype), dim=1, eps=NORM_FLOOR)
            return _ShardedMarginSoftmax.apply(unit, self.weight, labels, self, margin)


def class_range(classes: int, rank: int, world: int) -> tuple[int, int]:
    """First and one past the last class of a rank: contiguous, balanced, lower ranks take more."""
    size, more = divmod(classes, world)
    first = rank * size + min(rank, more)
    return first, first + size + (rank < more)


def initial_centres(first: int, last: int, width: int, seed: int) -> torch.Tensor:
    """Rows `first` to `last` of the initial C x D centres, a function of (seed, class id) alone."""
    blocks = range(first // INIT_BLOCK, -(-last // INIT_BLOCK))
    rows = [_init_block(block, width, seed) for block in blocks]
    if not rows:
        return torch.empty(0, width)
    start = first - blocks[0] * INIT_BLOCK
    return torch.cat(rows)[start : start + last - first].clone()


def _init_block(block: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
    return torch.randn(INIT_BLOCK, width, generator=generator) * 0.05


class _ShardedMarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unit: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
        head: MarginHead, margin: float,
    ) -> torch.Tensor:  # fmt: skip
        everyone, targets = _gather(unit), _gather(labels)
        mine = ((targets >= head.first) & (targets < head.last)).nonzero().squeeze(1)
        own = targets[mine] - head.first
        cosine = (everyone[mine] * F.normalize(weight[own], dim=1, eps=NORM_FLOOR)).sum(1)
        with_margin, slope = _value_and_slope(head.margin_of, cosine, margin)
        sums = torch.stack([torch.zeros_like(everyone[:, 0])] * 2)
        for columns in _chunks(weight, head.chunk):
            logits = _logits(everyone, weight[columns], head.scale)
            inside, at = _targets_in(mine, own, columns)
            logits[inside, at] = -torch.inf
            sums[0] += logits.exp_().sum(1)
        sums[1, mine] = head.scale * with_margin
        _sum_in_place(sums)
        # log(other classes / own class): from it the loss of a well-classified item keeps its
        # digits, which lse - target would lose.
        rest = sums[0].log() - sums[1]
        lse = torch.logaddexp(sums[0].log(), sums[1])
        ctx.save_for_backward(everyone, weight, lse, rest, mine, own, slope)
        ctx.head, ctx.local = head, len(unit)
        return torch.logaddexp(rest, torch.zeros_like(rest)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        everyone, weight, lse, rest, mine, own, slope = ctx.saved_tensors
        head = ctx.head
        each = grads[0] * head.scale / len(everyone)
        target_grad = -torch.sigmoid(rest)[mine] * slope
        d_everyone, d_weight = torch.zeros_like(everyone), torch.empty_like(weight)
        for columns in _chunks(weight, head.chunk):
            rows = weight[columns]
            norm = rows.norm(dim=1, keepdim=True).clamp(min=NORM_FLOOR)
            unit_rows = rows / norm
            d_cosine = (_logits(everyone, rows, head.scale) - lse[:, None]).exp_()
            inside, at = _targets_in(mine, own, columns)
            d_cosine[inside, at] = target_grad[torch.isin(mine, inside)]
            d_cosine *= each
            d_everyone += d_cosine @ unit_rows
            d_unit = d_cosine.T @ everyone
            along = (d_unit * unit_rows).sum(1, keepdim=True)
            d_weight[columns] = (d_unit - along * unit_rows) / norm
        return _scatter_sum(d_everyone, ctx.local), d_weight, None, None, None


def _value_and_slope(
    margin_of: Margin, cosine: torch.Tensor, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        at = cosine.detach().requires_grad_()
        value = margin_of(at, margin)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), slope


def _chunks(weight: torch.Tensor, chunk: int) -> list[slice]:
    return [slice(a, min(a + chunk, len(weight))) for a in range(0, len(weight), chunk)]


def _logits(everyone: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    return (everyone @ F.normalize(rows, dim=1, eps=NORM_FLOOR).T).mul_(scale)


def _targets_in(
    mine: torch.Tensor, own: torch.Tensor, columns: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    inside = (own >= columns.start) & (own < columns.stop)
    return mine[inside], own[inside] - columns.start


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(values: torch.Tensor) -> torch.Tensor:
    if _world() == 1:
        return values
    out = values.new_empty(_world() * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(out, values.contiguous())
    return out


def _sum_in_place(values: torch.Tensor) -> None:
    if _world() > 1:
        dist.all_reduce(values)


def _scatter_sum(values: torch.Tensor, local: int) -> torch.Tensor:
    if _world() == 1:
        return values
    out = values.new_empty(local, *values.shape[1:])
    dist.reduce_scatter_tensor(out, values.contiguous())
    return out * _world()
