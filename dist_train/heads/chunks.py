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


class Chunks:
    """The centres that a step sees, and where among them the classes of the batch are.

    `weight` (C * K, D): K centres a class, neighbours; `seen` (n,) ascending class numbers, or
    None for all C. `classes` (m,) are those of the items `items` (m,) of the batch.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        each: int,
        seen: torch.Tensor | None,
        chunk: int,
        items: torch.Tensor,
        classes: torch.Tensor,
    ) -> None:
        self.weight, self.each, self.seen = weight, each, seen
        self.count = len(weight) // each if seen is None else len(seen)
        self.size = min(max(chunk // each, 1), self.count)
        at = classes if seen is None else torch.searchsorted(seen, classes)
        self.at, order = at.sort(stable=True)
        self.items = items[order]
        starts = range(0, self.count, self.size or 1)
        bounds = torch.searchsorted(self.at, torch.tensor([*starts, self.count], device=at.device))
        self.spans = [(a * each, min(a + self.size, self.count) * each) for a in starts]
        self.bounds = bounds.tolist()  # one transfer a pass, not one a chunk
        self.norm = weight.new_empty(self.count * each, 1)
        self._rows = weight.new_empty(self.size * each, weight.shape[1])
        # Lengths of the seen centres; those without direction get infinity, so that they become 0.
        for a, b in self.spans:
            torch.linalg.vector_norm(self._picked(a, b), dim=1, keepdim=True, out=self.norm[a:b])
        self.norm[self.norm <= SMALLEST_NORM] = torch.inf

    def targets(self) -> torch.Tensor:
        """Unit centres of the classes of `items`, (m, K, D)."""
        classes = self.at if self.seen is None else self.seen[self.at]
        rows = self._of(classes)
        return unit_rows(rows).view(len(self.at), self.each, rows.shape[1])

    def unit(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
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
        rows, width = self.weight.shape
        return self.weight.view(rows // self.each, self.each, width)[classes].flatten(0, 1)


class Exponentials:
    """exp(scale * cosine) of the global batch (B, D), unit rows, with the seen classes."""

    def __init__(self, batch: torch.Tensor, chunks: Chunks, scale: float) -> None:
        self.batch, self.chunks = batch, chunks
        self._scaled = (batch * scale).T
        self._buffer = batch.new_empty(chunks.size * chunks.each, len(batch))

    def sums(self) -> torch.Tensor:
        """Sum over the nearest centres of the seen classes but the item's own, (B,) float64."""
        total = self.batch.new_zeros(len(self.batch), dtype=torch.float64)
        for rows, targets, unit in self.chunks.unit():
            logits = self._logits(unit)
            nearest = logits[:, 0] if self.chunks.each == 1 else logits.amax(1)
            total += self._without_own(nearest, rows, targets).exp_().sum(0)
            del nearest  # freed before the next chunk's is computed
        return total

    def gradients(
        self, factor: torch.Tensor, own: torch.Tensor, best: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the batch (B, D) and of the seen centres (n * K, D).

        d loss / d cosine is `factor` (B,) * exp(scale * cosine) for the other classes, and `own`
        (m,) for the own class of each of `chunks.items`, whose nearest sub-centre is number `best`
        (m,), as a unit row `centre` (m, D).
        """
        chunks, batch = self.chunks, self.batch
        weighted, weighted_own = batch * factor[:, None], batch[chunks.items] * own[:, None]
        d_rows = batch.new_empty(chunks.count * chunks.each, batch.shape[1])
        d_batch, at = torch.zeros_like(batch), chunks.at * chunks.each + best
        for rows, targets, unit in chunks.unit():
            exponentials = self._by_centre(rows, targets, unit)
            d_batch.addmm_(exponentials.T, unit)
            d_unit = torch.mm(exponentials, weighted, out=d_rows[rows])
            d_unit.index_add_(0, at[targets] - rows.start, weighted_own[targets])
            # Through the normalisation: the component along the centre has no effect.
            along = (d_unit * unit).sum(1, keepdim=True)
            d_unit.addcmul_(unit, along, value=-1).div_(chunks.norm[rows])
        d_batch *= factor[:, None]
        d_batch[chunks.items] += own[:, None] * centre
        return d_batch, d_rows

    def _by_centre(self, rows: slice, targets: slice, unit: torch.Tensor) -> torch.Tensor:
        """Exponentials (n * K, B): at the nearest centre of each other class, 0 elsewhere."""
        logits = self._logits(unit)
        if self.chunks.each == 1:
            return self._without_own(logits[:, 0], rows, targets).exp_()
        top, nearest = logits.max(1, keepdim=True)
        self._without_own(top[:, 0], rows, targets)
        return logits.zero_().scatter_(1, nearest, top.exp_()).flatten(0, 1)

    def _logits(self, unit: torch.Tensor) -> torch.Tensor:
        """scale * cosine, (n, K, B), in the buffer."""
        logits = torch.mm(unit, self._scaled, out=self._buffer[: len(unit)])
        return logits.view(-1, self.chunks.each, logits.shape[1])

    def _without_own(self, logits: torch.Tensor, rows: slice, targets: slice) -> torch.Tensor:
        """`logits` (n, B) of classes, those of items with their own class set to -inf."""
        at = self.chunks.at[targets] - rows.start // self.chunks.each
        logits[at, self.chunks.items[targets]] = -torch.inf
        return logits
