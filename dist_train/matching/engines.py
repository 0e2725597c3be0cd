"""Engines: for a block of asking items, every candidate at a floor and the nearest k.

An engine may return too much, never too little; the scores of Views decide afterwards.
"""

import heapq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dist_train.matching.views import Views, subset
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
        asking, found, near = [], [], []
        queries = asked(self.views, rows, self.device)
        for block in row_blocks(len(self.views), smallest=4096, largest=16_384):
            scores = block_scores(self.views, queries, block, self.device)
            at = (scores >= floor - SLACK).nonzero().cpu().numpy()
            asking.append(at[:, 0] + rows.start)
            found.append(at[:, 1] + block.start)
            best = torch.topk(scores, min(k + 1, len(block)), dim=1)
            near.append((best.values.cpu().numpy(), best.indices.cpu().numpy() + block.start))
        scores, ids = (np.hstack([part[n] for part in near]) for n in (0, 1))
        nearest = nearest_rows(scores, ids, np.asarray(rows), k)
        return Found(np.concatenate(asking), np.concatenate(found), nearest)


Queries = dict[str, tuple[torch.Tensor, torch.Tensor]]


def asked(views: Views, rows: range, device: torch.device, kinds: Views | None = None) -> Queries:
    """What `rows` ask with, for each kind of rows of `kinds` (the views themselves)."""
    found = {kind: views.queries(rows, kind) for kind in (kinds or views).kinds}
    return {
        kind: (torch.from_numpy(queries).to(device), torch.tensor(asks, device=device))
        for kind, (queries, asks) in found.items()
    }


def block_scores(
    views: Views, queries: Queries, block: range, device: torch.device
) -> torch.Tensor:
    """Scores (n, len(block)) float32 of the asking items; -inf without a common part."""
    database = torch.from_numpy(views.database(block)).to(device)
    scores = torch.full((len(next(iter(queries.values()))[0]), len(block)), -torch.inf,
                        device=device)  # fmt: skip
    for kind, (rows, asks) in queries.items():
        columns = torch.tensor(views.kinds[kind][block.start : block.stop], device=device)
        if columns.all() and asks.all():
            return rows @ database.T
        part = rows @ database[columns].T
        part[~asks] = -torch.inf
        scores[:, columns] = part
    return scores


def floor_of_sample(views: Views, pairs_per_item: float, device: torch.device) -> float:
    """The score above which a sample of rows says there are about `pairs_per_item` N pairs.

    Rounded up to 1/1000 and at least 0.05, so that it is the same on every machine.
    """
    rows = np.unique(np.linspace(0, len(views) - 1, min(len(views), 256)).astype(np.int64))
    sample = subset(views, rows)
    queries = asked(sample, range(len(rows)), device, kinds=views)
    # Each pair is seen from both its items, and each item sees itself.
    keep = max(1, int((2 * pairs_per_item + 1) * len(rows)))
    best: list[float] = []
    for block in row_blocks(len(views), smallest=4096, largest=16_384):
        scores = block_scores(views, queries, block, device)
        top = torch.topk(scores.flatten(), min(keep, scores.numel())).values.tolist()
        best = heapq.nlargest(keep, best + top)
    lowest = best[-1] if len(best) == keep else -1.0
    return max(0.05, float(np.ceil(max(lowest, -1.0) * 1000) / 1000))


def nearest_rows(scores: np.ndarray, ids: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """The best k ids (n, k) of each row by score, then by id; the row's `own` id left out."""
    scores = np.where((ids == own[:, None]) | (ids < 0), -np.inf, scores)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    best = np.take_along_axis(ids, order, 1)
    best[np.isneginf(np.take_along_axis(scores, order, 1))] = -1
    padding = np.full((len(own), k - best.shape[1]), -1, best.dtype)
    return np.hstack([best, padding])
