"""Exponentials of a batch against class centres, a chunk of classes at a time, in one process.

The matrix of all of them never exists: each pass makes a chunk of it in one buffer, uses it, and
makes the next in the same place. Exponentials are not shifted by a maximum: with scale * cosine
within 64 of 0, 5e10 of them add up inside float32. What has one number an item is float64.

Buffers are (classes of a chunk * K, B): classes in rows, so that any number of them is contiguous.
"""

from collections.abc import Iterator

import torch

NORM_FLOOR = 1e-12
"""A vector no longer than this has no direction: its cosines and its gradient are 0."""


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, D) at length one, differentiable; a row shorter than NORM_FLOOR becomes 0.

    Divided by a power of two first, which changes no digit, so that no square overflows.
    """
    largest = rows.detach().abs().amax(1, keepdim=True)
    size = torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - 1)
    known = ~(largest <= NORM_FLOOR)  # so that what is no number stays none
    near_one = torch.where(known, rows, 0) / torch.where(known, size, 1)
    norm = torch.where(known, near_one, 1).norm(dim=1, keepdim=True)
    return near_one / norm


class Chunks:
    """The centres that a step sees, and where in them the classes of the batch lie.

    `weight` (C * K, D): K centres a class, neighbours; `seen` (n,) ascending class numbers, or
    None for all C. `classes` (m,) are those of the items `items` (m,) of the batch.
    """

    def __init__(
        self, weight: torch.Tensor, each: int, seen: torch.Tensor | None, chunk: int,
        items: torch.Tensor, classes: torch.Tensor,
    ) -> None:  # fmt: skip
        self.weight, self.each, self.seen = weight, each, seen
        self.count = len(weight) // each if seen is None else len(seen)
        self.size = min(max(chunk // each, 1), self.count)
        at = classes if seen is None else torch.searchsorted(seen, classes)
        self.at, order = at.sort(stable=True)
        self.items = items[order]
        starts = range(0, self.count, self.size or 1)
        bounds = torch.searchsorted(self.at, torch.tensor([*starts, self.count], device=at.device))
        self.spans = [(a, min(a + self.size, self.count)) for a in starts]
        self.bounds = bounds.tolist()  # one transfer a pass, not one a chunk
        self.norm = weight.new_empty(self.count * each, 1)
        self._rows = weight.new_empty(self.size * each, weight.shape[1])

    def targets(self) -> torch.Tensor:
        """Unit centres of the classes of `items`, (m, K, D)."""
        classes = self.at if self.seen is None else self.seen[self.at]
        rows = self._of(classes)
        return unit_rows(rows).view(len(self.at), self.each, rows.shape[1])

    def row_numbers(self) -> torch.Tensor:
        """The rows of `weight` that are seen, ascending, (n * K,)."""
        assert self.seen is not None
        each = torch.arange(self.each, device=self.seen.device)
        return (self.seen[:, None] * self.each + each).flatten()

    def measure(self) -> None:
        """Lengths of the seen centres; those without direction get infinity, so that they are 0."""
        for a, b in self._row_spans():
            torch.linalg.vector_norm(
                self._picked(a, b), dim=1, keepdim=True, out=self.norm[a:b]
            )  # fmt: skip
        self.norm[self.norm <= NORM_FLOOR] = torch.inf

    def unit(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows seen, their targets among `items`, unit centres (n * K, D)) chunk by chunk."""
        for (a, b), first, last in zip(
            self._row_spans(), self.bounds[:-1], self.bounds[1:], strict=True
        ):
            out = self._rows[: b - a]
            torch.div(self._picked(a, b), self.norm[a:b], out=out)
            yield slice(a, b), slice(first, last), out

    def _row_spans(self) -> list[tuple[int, int]]:
        return [(a * self.each, b * self.each) for a, b in self.spans]

    def _picked(self, a: int, b: int) -> torch.Tensor:
        if self.seen is None:
            return self.weight[a:b]
        return self._of(self.seen[a // self.each : b // self.each])

    def _of(self, classes: torch.Tensor) -> torch.Tensor:
        """The centres of `classes` (n,), (n * K, D)."""
        rows, width = self.weight.shape
        return self.weight.view(rows // self.each, self.each, width)[classes].flatten(0, 1)


class Exponentials:
    """exp(scale * cosine) of the batch `everyone` (B, D), unit rows, with the seen classes."""

    def __init__(self, everyone: torch.Tensor, chunks: Chunks, scale: float) -> None:
        self.everyone, self.chunks = everyone, chunks
        self._scaled = (everyone * scale).T
        self._buffer = everyone.new_empty(chunks.size * chunks.each, len(everyone))

    def sums(self) -> torch.Tensor:
        """Sum over the seen classes but the item's own, (B,) float64."""
        total = self.everyone.new_zeros(len(self.everyone), dtype=torch.float64)
        for rows, targets, unit in self.chunks.unit():
            total += self._by_class(rows, targets, unit).exp_().sum(0)
        return total

    def gradients(
        self, factor: torch.Tensor, onto: torch.Tensor, best: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the batch (B, D) and of the seen centres (n * K, D).

        d loss / d cosine is `factor` (B,) * exp(scale * cosine) for the other classes, and `onto`
        (m,) for the own class of each of `chunks.items`, whose nearest sub-centre is number `best`
        (m,), as a unit row `centre` (m, D).
        """
        chunks, everyone = self.chunks, self.everyone
        weighted, own = everyone * factor[:, None], everyone[chunks.items] * onto[:, None]
        d_rows = everyone.new_empty(chunks.count * chunks.each, everyone.shape[1])
        d_batch, at = torch.zeros_like(everyone), chunks.at * chunks.each + best
        for rows, targets, unit in chunks.unit():
            exponentials = self._by_centre(rows, targets, unit)
            d_batch.addmm_(exponentials.T, unit)
            d_unit = torch.mm(exponentials, weighted, out=d_rows[rows])
            d_unit.index_add_(0, at[targets] - rows.start, own[targets])
            # Through the normalisation: what points along the centre falls away.
            along = (d_unit * unit).sum(1, keepdim=True)
            d_unit.addcmul_(unit, along, value=-1).div_(chunks.norm[rows])
        d_batch *= factor[:, None]
        d_batch[chunks.items] += onto[:, None] * centre
        return d_batch, d_rows

    def _by_class(self, rows: slice, targets: slice, unit: torch.Tensor) -> torch.Tensor:
        """scale * cosine with the nearest centre of each class, (n, B); own classes -inf."""
        logits = self._logits(unit)
        nearest = logits[:, 0] if self.chunks.each == 1 else logits.amax(1)
        return self._without_own(nearest, rows, targets)

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
        at = self.chunks.at[targets] - rows.start // self.chunks.each
        logits[at, self.chunks.items[targets]] = -torch.inf
        return logits
