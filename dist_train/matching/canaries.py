"""Planted pairs of known score: the join must find them, and they are taken out of its result.

A canary is a copy of an item turned by a known angle. It goes through blocks, first pass, scores
and files as all others do, so a tile that was lost or a floor that slipped is seen.
"""

from dataclasses import dataclass

import numpy as np

from dist_train.embedding.store import Rows
from dist_train.matching.views import ViewPart, Views

COUNT = 16


@dataclass(frozen=True)
class Canaries:
    """Canary c stands in row `items` + c and was made from row `sources`[c]."""

    items: int
    sources: np.ndarray

    def expected(self, views: Views, floor: float) -> dict[tuple[int, int], float]:
        """(source, canary) to score of those that reach the floor."""
        rows = self.items + np.arange(len(self.sources))
        scores = views.scores(self.sources, rows)["score"]
        return {
            (int(i), int(j)): float(s)
            for i, j, s in zip(self.sources, rows, scores, strict=True)
            if s >= np.float32(floor)
        }


def with_canaries(views: Views, floor: float, count: int = COUNT) -> tuple[Views, Canaries]:
    """The views with `count` canaries behind them, their scores spread from the floor to one.

    Which and where is a function of the number of items alone.
    """
    items = len(views)
    candidates = np.flatnonzero(views.complete if views.complete.any() else views.some)
    count = min(count, len(candidates))
    sources = candidates[np.linspace(0, max(len(candidates) - 1, 0), count).astype(np.int64)]
    wanted = np.linspace(min(floor + 0.01, 0.98), 0.99, count)
    rng = np.random.default_rng(items)
    parts = {}
    for name, part in views.parts.items():
        here = part.present[sources]
        turned = _turned(part.rows.take(sources), wanted, rng) * here[:, None]
        rows = Rows([*part.rows.parts, turned.astype(part.rows.parts[0].dtype)])
        parts[name] = ViewPart(rows, np.concatenate([part.present, here]), part.weight)
    return Views(parts), Canaries(items, sources)


def _turned(rows: np.ndarray, cosines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit rows at these cosines to `rows` (n, D); with D = 1 the rows themselves."""
    noise = rng.standard_normal(rows.shape)
    noise -= np.einsum("nd,nd->n", noise, rows)[:, None] * rows
    length = np.linalg.norm(noise, axis=1, keepdims=True)
    noise = np.divide(noise, length, out=np.zeros_like(noise), where=length > 1e-6)
    return cosines[:, None] * rows + np.sqrt(1 - cosines**2)[:, None] * noise
