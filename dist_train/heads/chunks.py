"""Exponentials of a batch against class centres, a chunk of classes at a time, in one process.

The matrix of all of them never exists: each pass computes a chunk of it in one buffer, uses it, and
computes the next in the same place. Exponentials are not shifted by a maximum: with scale * cosine
within 64 of 0, 5e10 of them add up inside float32. What has one number an item is float64.

Buffers are (classes of a chunk * K, B): classes in rows, so that any number of them is contiguous.
"""

from collections.abc import Iterator

import torch

SMALLEST_NORM = 1e-12
"""A vector no longer than this has no direction: its cosines and its gradient are 0."""


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, D) at length one, differentiable; one no longer than SMALLEST_NORM becomes 0.

    Divided by a power of two first, which changes no digit, so that no square overflows.
    """
    largest = rows.detach().abs().amax(1, keepdim=True)
    size = torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - 1)
    known = ~(largest <= SMALLEST_NORM)  # so that NaN stays NaN
    near_one = torch.where(known, rows, 0) / torch.where(known, size, 1)
    norm = torch.where(known, near_one, 1).norm(dim=1, keepdim=True)
    return near_one / norm


class Exponentials:
    """exp(scale * cosine) of the global batch (B, D), unit rows, with the centres that a step sees.

    `weight` (C * K, D): K = `each` centres a class, neighbours; `seen` (n,) ascending class
    numbers, or None for all C. `classes` (m,) are those of the items `items` (m,) of the batch.
    """

    def __init__(
        self,
        batch: torch.Tensor,
        scale: float,
        weight: torch.Tensor,
        each: int,
        seen: torch.Tensor | None,
        chunk: int,
        items: torch.Tensor,
        classes: torch.Tensor,
    ) -> None:
        self.batch, self.weight, self.each, self.seen = batch, weight, each, seen
        self.count = len(weight) // each if seen is None else len(seen)
        size = min(max(chunk // each, 1), self.count)
        at = classes if seen is None else torch.searchsorted(seen, classes)
        self.at, order = at.sort(stable=True)
        self.items = items[order]
        starts = range(0, self.count, size or 1)
        bounds = torch.searchsorted(self.at, torch.tensor([*starts, self.count], device=at.device))
        self.spans = [(a * each, min(a + size, self.count) * each) for a in starts]
        self.bounds = bounds.tolist()  # one transfer a pass, not one a chunk
        self.norm = weight.new_empty(self.count * each, 1)
        # Lengths of the seen centres; those without direction get infinity, so that they become 0.
        for a, b in self.spans:
            torch.linalg.vector_norm(self._picked(a, b), dim=1, keepdim=True, out=self.norm[a:b])
        self.norm[self.norm <= SMALLEST_NORM] = torch.inf
        self._scaled = (batch * scale).T
        self._rows = weight.new_empty(size * each, weight.shape[1])
        self._buffer = batch.new_empty(size * each, len(batch))

    def targets(self) -> torch.Tensor:
        """Unit centres of the classes of `items`, (m, K, D)."""
        classes = self.at if self.seen is None else self.seen[self.at]
        return unit_rows(self._of(classes)).unflatten(0, (-1, self.each))

    def sums(self) -> torch.Tensor:
        """Sum over the nearest centres of the seen classes but the item's own, (B,) float64."""
        total = self.batch.new_zeros(len(self.batch), dtype=torch.float64)
        for rows, targets, unit in self._chunks():
            logits = self._logits(unit)
            nearest = logits[:, 0] if self.each == 1 else logits.amax(1)
            total += self._without_own(nearest, rows, targets).exp_().sum(0)
            del nearest  # freed before the next chunk's is computed
        return total

    def gradients(
        self, factor: torch.Tensor, own: torch.Tensor, best: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the batch (B, D) and of the seen centres (n * K, D).

        d loss / d cosine is `factor` (B,) * exp(scale * cosine) for the other classes, and `own`
        (m,) for the own class of each of `items`, whose nearest sub-centre is number `best` (m,),
        as a unit row `centre` (m, D).
        """
        batch, each = self.batch, self.each
        weighted, weighted_own = batch * factor[:, None], batch[self.items] * own[:, None]
        d_rows = batch.new_empty(self.count * each, batch.shape[1])
        d_batch, at = torch.zeros_like(batch), self.at * each + best
        for rows, targets, unit in self._chunks():
            # Exponentials (n * K, B): at the nearest centre of each other class, 0 elsewhere.
            logits = self._logits(unit)
            if each == 1:
                exponentials = self._without_own(logits[:, 0], rows, targets).exp_()
            else:
                top, nearest = logits.max(1, keepdim=True)
                self._without_own(top[:, 0], rows, targets)
                exponentials = logits.zero_().scatter_(1, nearest, top.exp_()).flatten(0, 1)
                del top, nearest  # freed before the products below
            d_batch.addmm_(exponentials.T, unit)
            d_unit = torch.mm(exponentials, weighted, out=d_rows[rows])
            d_unit.index_add_(0, at[targets] - rows.start, weighted_own[targets])
            # Through the normalisation: the component along the centre has no effect.
            along = (d_unit * unit).sum(1, keepdim=True)
            d_unit.addcmul_(unit, along, value=-1).div_(self.norm[rows])
        d_batch *= factor[:, None]
        d_batch[self.items] += own[:, None] * centre
        return d_batch, d_rows

    def _chunks(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows seen, their targets among `items`, unit centres (n * K, D)) chunk by chunk."""
        for (a, b), first, last in zip(self.spans, self.bounds[:-1], self.bounds[1:], strict=True):
            out = self._rows[: b - a]
            torch.div(self._picked(a, b), self.norm[a:b], out=out)
            yield slice(a, b), slice(first, last), out

    def _picked(self, a: int, b: int) -> torch.Tensor:
        """The seen centres number `a` to `b` - 1."""
        if self.seen is None:
            return self.weight[a:b]
        return self._of(self.seen[a // self.each : b // self.each])

    def _of(self, classes: torch.Tensor) -> torch.Tensor:
        """The centres of `classes` (n,), (n * K, D)."""
        return self.weight.unflatten(0, (-1, self.each))[classes].flatten(0, 1)

    def _logits(self, unit: torch.Tensor) -> torch.Tensor:
        """scale * cosine, (n, K, B), in the buffer."""
        logits = torch.mm(unit, self._scaled, out=self._buffer[: len(unit)])
        return logits.unflatten(0, (-1, self.each))

    def _without_own(self, logits: torch.Tensor, rows: slice, targets: slice) -> torch.Tensor:
        """`logits` (n, B) of classes, those of items with their own class set to -inf."""
        at = self.at[targets] - rows.start // self.each
        logits[at, self.items[targets]] = -torch.inf
        return logits
