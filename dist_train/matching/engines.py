"""Engines: for a block of asking items, every candidate at a floor and the nearest k.

An engine may return too much, never too little; the scores of Views decide afterwards.
"""

import heapq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dist_train.matching.views import Views
from dist_train.runtime import row_blocks

SLACK = 1e-4
"""Room below the floor for float32 sums in another order; far above their error."""


@dataclass(frozen=True)
class Found:
    """Candidates (asking, found) as row numbers (P,), and the nearest rows (n, k), -1 for none."""

    asking: np.ndarray
    found: np.ndarray
    nearest: np.ndarray


class Engine(Protocol):
    """Anything that finds candidates."""

    def search(self, rows: range, floor: float, k: int) -> Found:
        """Candidates of the asking `rows` scoring at least `floor`, and their k nearest."""
        ...


class GemmEngine:
    """Multiplies blocks of the stored rows, on the GPU or the CPU, in float32."""

    def __init__(self, views: Views, device: torch.device) -> None:
        self.views, self.device = views, device

    def search(self, rows: range, floor: float, k: int) -> Found:
        """See Engine."""
        queries = self._on_device(self.views.queries(rows))
        asking, found, near = [], [], []
        for block in row_blocks(len(self.views), smallest=4096, largest=16_384):
            scores = queries @ self._on_device(self.views.database(block)).T
            at = (scores >= floor - SLACK).nonzero().cpu().numpy()
            asking.append(at[:, 0])
            found.append(at[:, 1] + block.start)
            best = torch.topk(scores, min(k + 1, len(block)), dim=1)
            near.append((best.values.cpu().numpy(), best.indices.cpu().numpy() + block.start))
        scores, ids = (np.hstack([part[n] for part in near]) for n in (0, 1))
        return Found(
            np.concatenate(asking) + rows.start, np.concatenate(found),
            nearest_rows(scores, ids, np.asarray(rows), k),
        )  # fmt: skip

    def _on_device(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)


def floor_of_sample(views: Views, pairs_per_item: float, device: torch.device) -> float:
    """The score above which a sample of rows says there are about `pairs_per_item` N pairs.

    Rounded up to 1/1000 and at least 0.05, so that it is the same on every machine.
    """
    rows = np.unique(np.linspace(0, len(views) - 1, min(len(views), 256)).astype(np.int64))
    rows = rows[views.some[rows]]
    asking = [torch.from_numpy(views.queries(range(r, r + 1))) for r in rows]
    if not asking:
        return 0.05
    queries = torch.cat(asking).to(device)
    # Each pair is seen from both its items, and each item sees itself.
    keep = max(1, int((2 * pairs_per_item + 1) * len(rows)))
    best: list[float] = []
    for block in row_blocks(len(views), smallest=4096, largest=16_384):
        scores = queries @ torch.from_numpy(views.database(block)).to(device).T
        top = torch.topk(scores.flatten(), min(keep, scores.numel())).values.tolist()
        best = heapq.nlargest(keep, best + top)
    lowest = best[-1] if len(best) == keep else -1.0
    return max(0.05, float(np.ceil(lowest * 1000) / 1000))


def nearest_rows(scores: np.ndarray, ids: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """The best k ids (n, k) of each row by score, then by id; the row's `own` id left out."""
    scores = np.where((ids == own[:, None]) | (ids < 0), -np.inf, scores)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    best = np.take_along_axis(ids, order, 1)
    best[np.isneginf(np.take_along_axis(scores, order, 1))] = -1
    padding = np.full((len(own), k - best.shape[1]), -1, best.dtype)
    return np.hstack([best, padding])
