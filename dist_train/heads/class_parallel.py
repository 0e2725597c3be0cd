"""Softmax over classes that are sharded across ranks, with a margin on the item's own class.

No B x C tensor exists (see chunks.py). Three collectives a pass whatever W: all-gather of
embeddings and labels together, all-reduce of two numbers an item, reduce-scatter of the gradient of
the embeddings. The centres' gradient stays on its rank.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from dist_train.heads.centres import (
    INIT_STD,
    RowAdamW,
    classes_of_step,
    coalesce_gradient,
    initial_centres,
)
from dist_train.heads.chunks import Exponentials, unit_rows
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import atomic_path

# Their names since torch 2.14, which warns at every call of the older ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def arcface(cosine: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    """cos(theta + margin), continued below theta = pi - margin by a line that keeps it monotone.

    Deng et al., ArcFace (CVPR 2019); `margin` in radians, 0 to pi / 2.
    """
    m = torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)
    # The squared sine of the nearest cosine to 1: it keeps d sin / d cos finite at the poles, and
    # short of them nothing changes.
    smallest = torch.finfo(cosine.dtype).eps
    sine = (1 - cosine * cosine).clamp(min=smallest).sqrt()
    rotated = cosine * m.cos() - sine * m.sin()
    return torch.where(cosine > -m.cos(), rotated, cosine - m * m.sin())


def cosface(cosine: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
    """cos(theta) - margin. Wang et al., CosFace (CVPR 2018)."""
    return cosine - torch.as_tensor(margin, dtype=cosine.dtype, device=cosine.device)


MARGINS: dict[str, Callable[..., torch.Tensor]] = {"arcface": arcface, "cosface": cosface}
"""From target cosines (n,) and their margins (n,) to the cosines that the softmax sees.

By differentiable torch operations that are finite on all of [-1, 1]. One more is one function.
"""


def margin_shares(sizes: torch.Tensor, smallest: float) -> torch.Tensor:
    """Fraction of the margin that each class gets, (C,) float64 from sizes (C,): rare ones more.

    n^(-1/4), moved and stretched so that the largest class gets `smallest` and the rarest 1 (Ha
    et al., Google Landmark Recognition 2020, third place). With equal sizes all get 1.
    """
    rare = sizes.clamp(min=1).double().pow(-0.25)
    span = rare.max() - rare.min()
    if span == 0:
        return torch.ones_like(rare)
    return smallest + (1 - smallest) * (rare - rare.min()) / span


class MarginHead(torch.nn.Module):
    """Class centres of this rank's classes and the margin softmax loss over all of them."""

    def __init__(
        self, *, classes: int, width: int, loss: str, scale: float, chunk: int, seed: int,
        rank: int = 0, world: int = 1, centres: int = 1, sample: float = 1.0,
        detached: bool = False, shares: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """`classes` C over all ranks, `width` D; this rank holds its rows of C * K x D.

        `centres` K a class: an item is compared with the nearest. `sample` is the share of the
        other classes that a step sees; `detached` leaves the margin out of the gradient; `shares`
        (C,) is the fraction of the margin that each class gets. `chunk` counts centres.
        """
        super().__init__()
        # The classes of a rank: contiguous, balanced, lower ranks have more.
        size, more = divmod(classes, world)
        self.first = rank * size + min(rank, more)
        self.last = self.first + size + (rank < more)
        self.classes, self.scale, self.chunk, self.seed = classes, scale, chunk, seed
        self.centres, self.sample, self.detached = centres, sample, detached
        self.margin_of = MARGINS[loss]
        start = initial_centres(self.first, self.last, width, seed, centres)
        self.weight = torch.nn.Parameter(start)
        if sample < 1:  # else the sparse rows of every pass of a step would be kept side by side
            self.weight.register_post_accumulate_grad_hook(coalesce_gradient)
        own = None if shares is None else shares[self.first : self.last].clone()
        self.register_buffer("shares", own, persistent=False)

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, margin: float, step: int = 0
    ) -> torch.Tensor:
        """Mean loss over the global batch, equal on all ranks.

        `embeddings` (b, D) of this rank, any length; `labels` (b,) global class ids. Every rank
        gives the same b. The gradient is scaled by W, as DDP and ZeRO average over ranks. With
        `sample` below 1 the centres get a sparse gradient of the rows that `step` sees. Raises
        BadInput for labels that are no class.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = unit_rows(embeddings.to(self.weight.dtype))
            return _ShardedMarginSoftmax.apply(unit, self.weight, labels, self, margin, step)


def world() -> int:
    """W; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (b, D) and int64 labels (b,) of all ranks, (B, D) and (B,), in one collective.

    A label travels as further columns of `rows`, in digits that their dtype holds exactly, the
    highest with the sign: two of float32, five of bfloat16. Rounded, it would be another class.
    """
    if world() == 1:
        return rows, labels
    # float32 holds integers of 24 bits exactly, bfloat16 of 8; a label with its sign has 40.
    bits, width = 20 if rows.dtype.itemsize >= 4 else 8, rows.shape[1]
    highest, *others = (labels >> shift for shift in range(40 - bits, -1, -bits))
    digits = torch.stack([highest, *(one % (1 << bits) for one in others)], 1)
    packed = torch.cat([rows, digits.to(rows.dtype)], 1)
    out = packed.new_empty(world() * len(packed), packed.shape[1])
    _all_gather(out, packed)
    gathered = torch.zeros(len(out), dtype=torch.int64, device=out.device)
    for column in out[:, width:].to(torch.int64).unbind(1):
        gathered = (gathered << bits) + column
    return out[:, :width].contiguous(), gathered


class _ShardedMarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        head: MarginHead,
        margin: float,
        step: int,
    ) -> torch.Tensor:
        batch, targets = gather(unit, labels)
        wrong = (targets < 0) | (targets >= head.classes)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise BadInput(
                f"row {row} of the global batch: class {int(targets[row])}, there are "
                f"{head.classes}; pack the catalogue again, its class ids do not fit"
            )

        # The items of the batch whose class this rank holds, and the centres that the step sees.
        items = ((targets >= head.first) & (targets < head.last)).nonzero().squeeze(1)
        classes = targets[items] - head.first
        seen = None
        if head.sample < 1:
            seen = classes_of_step(head.first, head.last, classes, head.sample, head.seed, step)
        exponentials = Exponentials(
            batch, head.scale, weight, head.centres, seen, head.chunk, items, classes
        )

        # Cosine (m,) of each of these items with the nearest of its class's K centres (m, K, D).
        centres, items = exponentials.targets(), exponentials.items
        cosine, best = (batch[items][:, None] * centres).sum(2).max(1)
        centre = centres[torch.arange(len(best), device=best.device), best]
        del centres  # only the nearest is needed from here on

        # With its margin, and d(that) / d(cosine) by autograd. Detached, the slope is 1, as in
        # Partial FC (An et al., CVPR 2022), whose margin is computed without gradient.
        shares = 1 if head.shares is None else head.shares[targets[items] - head.first]
        with torch.enable_grad():
            at = cosine.detach().requires_grad_()
            reduced = head.margin_of(at, margin * shares)
            (slope,) = torch.autograd.grad(reduced.sum(), at)
        slope = torch.ones_like(slope) if head.detached else slope

        # Two numbers an item over all ranks: sum of the other classes, own logit.
        sums = torch.zeros(2, len(batch), dtype=torch.float64, device=unit.device)
        sums[0] = exponentials.sums()
        sums[1, items] = head.scale * reduced.detach().double()
        if world() > 1:
            dist.all_reduce(sums)
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
        dtype, of_item = weight.dtype, grads[0].double() * head.scale / len(lse)
        # Below -scale there is no other class, and 1 / exp(lse) could leave float32's range.
        factor = of_item * (-lse.clamp(min=-head.scale - 1)).exp()
        own = -of_item * torch.sigmoid(rest[exponentials.items]) * slope
        d_batch, d_rows = exponentials.gradients(factor.to(dtype), own.to(dtype), best, centre)
        # NaN or Inf in the centres' gradient is passed on to that of the embeddings, and with it to
        # the encoder's on all ranks: a rank that checks only the latter skips the step as well.
        d_batch += 0 * torch.linalg.vector_norm(d_rows)
        d_weight = d_rows
        if exponentials.seen is not None:
            # The rows of `weight` that are seen, ascending: coalesced as it is.
            sub_centres = torch.arange(head.centres, device=weight.device)
            rows = (exponentials.seen[:, None] * head.centres + sub_centres).flatten()
            d_weight = torch.sparse_coo_tensor(
                rows[None], d_rows, weight.shape, is_coalesced=True, check_invariants=False
            )
        ctx.exponentials = None  # its buffers would live as long as the loss is referenced
        own_rows = d_batch
        if world() > 1:
            # This rank's rows (b, D) of the sum over ranks.
            own_rows = d_batch.new_empty(len(d_batch) // world(), d_batch.shape[1])
            _reduce_scatter(own_rows, d_batch.contiguous())
        # DDP and ZeRO take the mean over ranks of what is a sum.
        return own_rows.mul_(world()), d_weight, None, None, None, None


class ClassMeans:
    """The mean vector of each class of a rank, from vectors that all ranks add round by round.

    In a round every rank adds equally many rows; the rows of a class are summed in the order of
    rounds and, within one, of ranks. With whole batches dealt out in turn this is the order of the
    batches, and the sums are equal to the bit for any number of ranks.
    """

    def __init__(self, head: MarginHead) -> None:
        self.head, shape = head, (head.last - head.first, head.weight.shape[1])
        self.sums = torch.zeros(shape, dtype=torch.float64, device=head.weight.device)

    def add(self, vectors: torch.Tensor, labels: torch.Tensor) -> None:
        """`vectors` (b, D) float32 and `labels` (b,), -1 for padding rows; all ranks call it."""
        rows, classes = gather(vectors, labels)
        first, last = self.head.first, self.head.last
        own = ((classes >= first) & (classes < last)).nonzero().squeeze(1)
        self.sums.index_add_(0, classes[own] - first, rows[own].double())

    def write(self) -> int:
        """Set the head's centres of classes that have a mean; the number of these classes.

        A centre gets the mean's direction, plus an eighth of its random start where there are
        sub-centres, which keeps these apart.
        """
        weight, each = self.head.weight.data, self.head.centres
        known = self.sums.norm(dim=1) > 0
        unit = torch.nn.functional.normalize(self.sums[known], dim=1).to(weight.dtype)
        by_class = weight.unflatten(0, (-1, each))  # a view
        size = INIT_STD * weight.shape[1] ** 0.5
        by_class[known] = unit[:, None] * size + by_class[known] * (each > 1) / 8
        return int(known.sum())


def save_head(folder: Path, head: MarginHead, optimizer: RowAdamW) -> None:
    """Write this rank's classes into `folder`; a rank without classes writes nothing.

    head-<first>-<last>.safetensors holds `weight`, `exp_avg`, `exp_avg_sq` ((last - first) * K, D)
    and `step` ((last - first) * K,) of these classes.
    """
    if head.last == head.first:
        return
    plain = {name: value.cpu().contiguous() for name, value in _tensors(head, optimizer).items()}
    with atomic_path(folder / f"head-{head.first}-{head.last}.safetensors") as temporary:
        save_file(plain, temporary)


def load_head(
    folder: Path, head: MarginHead, optimizer: RowAdamW, classes: int | None = None
) -> None:
    """Fill this rank's classes, equal to the bit, from files of any number of ranks in `folder`.

    `classes`: how many there were when it was written; the rows of later ones stay as they are.
    Raises Corrupt where classes are missing or are in two files, BadInput for another number of
    centres or width.
    """
    known = max(min(head.last, head.classes if classes is None else classes), head.first)
    each, width, loaded = head.centres, head.weight.shape[1], []
    for path in folder.glob("head-*.safetensors"):
        first, last = (int(number) for number in path.stem.split("-")[1:])
        low, high = max(first, head.first), min(last, head.last)
        if low >= high:
            continue
        with safe_open(path, "pt") as file:
            shape = file.get_slice("weight").get_shape()
            if shape != [(last - first) * each, width]:
                raise BadInput(
                    f"{path}: {shape[0] / (last - first):g} centres a class of width {shape[1]}, "
                    f"this head has {each} of {width}; use the same head.centres and encoder"
                )
            for name, target in _tensors(head, optimizer).items():
                rows = file.get_slice(name)[(low - first) * each : (high - first) * each]
                target[(low - head.first) * each : (high - head.first) * each] = rows
        loaded.append((low, high))
    # Every class exactly once: each file begins where the one before it ends.
    loaded.sort()
    if [*(low for low, _ in loaded), known] != [head.first, *(high for _, high in loaded)]:
        found = sum(high - low for low, high in loaded)
        raise Corrupt(
            f"{folder}: {found} of the classes {head.first} to {known} found, where each is wanted "
            "once; restore its head files or continue from another checkpoint"
        )


def _tensors(head: MarginHead, optimizer: RowAdamW) -> dict[str, torch.Tensor]:
    return {"weight": head.weight.detach(), **optimizer.state[head.weight]}
