"""The vectors that are searched, and the one score that decides.

The score of two items is w_i cos_image + w_t cos_text over the parts that both have, the weights
of these summing to one: two items that share only a title are scored by their titles alone.

An index over both parts holds (sqrt(w_i) image, sqrt(w_t) text). So that every inner product is the
score, an item asks with another scale for each kind of row: of the complete rows with the same
row, or, where it has one part itself, with that part divided by sqrt(w); of the rows with one part
with that part alone, divided by sqrt(w).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq

from dist_train.config.options import Modality
from dist_train.embedding.store import EmbeddingSet, Rows, corrupt_error
from dist_train.matching.rows import finite, read_rows, take_rows
from shards.storage.errors import BadInput

EXACT_ROWS = 512
"""Pairs whose rows are in memory at one time, in float64: few, so that they stay near."""
Take = Callable[[str, np.ndarray], np.ndarray]
Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class ModalityVectors:
    """One part of the vectors: its rows, which of them are there, its weight."""

    rows: Rows
    present: np.ndarray
    weight: float


class ItemVectors:
    """N items seen through one part or through both."""

    def __init__(self, parts: dict[str, ModalityVectors]) -> None:
        """`parts` by name (image, text), their weights summing to one."""
        self.parts = parts
        self.complete = np.logical_and.reduce([part.present for part in parts.values()])
        self.some = np.logical_or.reduce([part.present for part in parts.values()])

    def __len__(self) -> int:
        return len(self.complete)

    @property
    def width(self) -> int:
        """D of the rows that an index holds."""
        return sum(part.rows.width for part in self.parts.values())

    def database(self, rows: range) -> np.ndarray:
        """Rows as an index holds them: float32 (n, D)."""
        return np.hstack([
            _block(part, rows) * np.float32(np.sqrt(part.weight))
            for part in self.parts.values()
        ])  # fmt: skip

    @cached_property
    def kinds(self) -> dict[str, np.ndarray]:
        """Masks (N,) of the kinds of rows: complete, and with one part only if any."""
        single = {name: part.present & ~self.complete for name, part in self.parts.items()}
        return {"complete": self.complete} | {n: mask for n, mask in single.items() if mask.any()}

    def queries(self, rows: range, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """How items ask for the rows of a kind: float32 (n, D), and who can ask (n,)."""
        if kind != "complete":
            asks = self.parts[kind].present[rows.start : rows.stop]
            scales = {name: float(name == kind) for name in self.parts}
            shares = {name: scale / np.sqrt(self.parts[name].weight)
                      for name, scale in scales.items()}  # fmt: skip
        else:
            asks = self.some[rows.start : rows.stop]
            whole = self.complete[rows.start : rows.stop, None]
            shares = {name: np.where(whole, np.sqrt(p.weight), 1 / np.sqrt(p.weight))
                      for name, p in self.parts.items()}  # fmt: skip
        columns = [
            _block(part, rows) * np.float32(shares[name]) for name, part in self.parts.items()
        ]
        return np.hstack(columns), asks

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The stored values of a part, float64 (n, D)."""
        return take_rows(self.parts[name].rows, rows)

    def scores(self, i: np.ndarray, j: np.ndarray, take: Take | None = None) -> Scores:
        """The scores that decide, float32 (P,): `score`, `score_image`, `score_text`.

        Dot products of the stored rows summed in float64 and rounded once; NaN for a part that
        one of the two lacks, and for the score of a pair without a common part. `take` gives the
        stored rows where they are at hand already.
        """
        out = {f"score_{name}": np.full(len(i), np.nan, np.float32) for name in ("image", "text")}
        total, weights = np.zeros(len(i)), np.zeros(len(i))
        for name, part in self.parts.items():
            both = part.present[i] & part.present[j]
            dots = _dots(name, take or self.take, i[both], j[both])
            out[f"score_{name}"][both] = dots
            total[both] += part.weight * dots
            weights[both] += part.weight
        with np.errstate(invalid="ignore"):
            return {"score": (total / weights).astype(np.float32)} | out


def weighted_rows(
    views: ItemVectors, names: Sequence[str], stored: dict[str, np.ndarray]
) -> np.ndarray:
    """Rows float32 (n, D) whose products are the scores by the parts `names`.

    The stored rows of these, each times the root of its weight among them, side by side.
    """
    total = sum(views.parts[name].weight for name in names)
    return np.hstack([
        np.asarray(stored[name], np.float32)
        * np.float32(np.sqrt(views.parts[name].weight / total))
        for name in names
    ])  # fmt: skip


def subset(views: ItemVectors, rows: np.ndarray) -> ItemVectors:
    """Some rows (n,) of the views, in memory."""
    parts = {
        name: ModalityVectors(
            Rows([take_rows(part.rows, rows).astype(np.float32)]), part.present[rows], part.weight
        )
        for name, part in views.parts.items()
    }
    return ItemVectors(parts)


def open_views(
    embeddings: EmbeddingSet, names: Sequence[Modality], image_weight: float
) -> ItemVectors:
    """The views `names` of an embedding set; one modality alone has weight one.

    Raises BadInput where no item has any of them.
    """
    weights = {"image": image_weight, "text": 1 - image_weight}
    parts: dict[str, ModalityVectors] = {
        name: ModalityVectors(
            embeddings.rows(name),
            _present(embeddings, name),
            weights[name] if len(names) > 1 else 1.0,
        )
        for name in names
    }
    if not any(part.present.any() for part in parts.values()):
        raise BadInput(f"{embeddings.path}: no item has a vector of {' or '.join(names) or 'any'} "
                       "modality; there is nothing to index")  # fmt: skip
    return ItemVectors(parts)


def views_of_array(vectors: np.ndarray) -> ItemVectors:
    """One modality over unit vectors (N, D) in memory."""
    return ItemVectors(
        {"image": ModalityVectors(Rows([vectors]), np.ones(len(vectors), bool), 1.0)}
    )


def _present(embeddings: EmbeddingSet, name: Modality) -> np.ndarray:
    """Which rows (N,) have a part, from two columns: names and titles would fill the memory."""
    here = np.zeros(len(embeddings.rows(name)), bool)
    with corrupt_error(embeddings.path / "items.parquet") as path, pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["row", f"has_{name}"]):
            row, has = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
            here[row[row >= 0]] = has[row >= 0]
    return here


def _block(part: ModalityVectors, rows: range) -> np.ndarray:
    return finite(part.rows, rows, read_rows(part.rows, rows).astype(np.float32))


def _dots(name: str, take: Take, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    out = np.empty(len(i))
    for start in range(0, len(i), EXACT_ROWS):
        cut = slice(start, start + EXACT_ROWS)
        out[cut] = np.einsum("pd,pd->p", take(name, i[cut]), take(name, j[cut]))
    return out
