"""The vectors that are compared, and the exact score of two items.

The score is w_i cos_image + w_t cos_text over the modalities that both items have, with the weights
of these scaled to sum to one: two items that share only a title are scored by their titles alone.

An index over both modalities holds (sqrt(w_i) image, sqrt(w_t) text). To make every inner product
the score, an item has one query vector for each kind of database row. For complete rows it is the
item's own index row or, when the item lacks a modality, the other divided by sqrt(w). For rows with
one modality it is that modality alone, divided by sqrt(w).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dist_train.config.training import Modality
from dist_train.embedding.store import EmbeddingSet, Rows
from shards.storage.errors import BadInput, Corrupt

LENGTH_ERROR = 2e-3
"""By how much the length of a stored row may differ from 1: float16 rounds it by at most 5e-4."""
EXACT_ROWS = 512
"""Pairs whose float64 rows are in memory at one time: few enough for the processor's cache."""
StoredRows = Callable[[str, np.ndarray], np.ndarray]
"""Modality and row numbers (n,) to the stored rows, float64 (n, D)."""


@dataclass(frozen=True)
class ModalityVectors:
    """One modality: its unit rows (N, D), the mask (N,) of items that have it, its weight."""

    rows: Rows
    present: np.ndarray
    weight: float


class ItemVectors:
    """The vectors of N items in one modality or two."""

    def __init__(self, modalities: dict[str, ModalityVectors]) -> None:
        """`modalities` by name (image, text); their weights sum to one."""
        self.modalities = modalities
        present = [vectors.present for vectors in modalities.values()]
        self.complete = np.logical_and.reduce(present)
        self.any_modality = np.logical_or.reduce(present)
        self.width = sum(vectors.rows.width for vectors in modalities.values())
        """D of the rows that an index holds."""
        self._roots = {name: np.sqrt(vectors.weight) for name, vectors in modalities.items()}
        masks = {name: v.present & ~self.complete for name, v in modalities.items()}
        masks = {name: mask for name, mask in masks.items() if mask.any()}
        self.kinds: dict[str, np.ndarray] = {"complete": self.complete} | masks
        """Masks (N,) of the kinds of items: complete and, if there are any, with one modality."""

    def __len__(self) -> int:
        return len(self.complete)

    def database(self, rows: range) -> np.ndarray:
        """Index rows, float32 (n, D). Raises Corrupt as `check_rows` does."""
        return self._scaled(rows, self._roots)

    def queries(self, rows: range, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Query vectors, float32 (n, D), for database rows of a kind; which items (n,) have one.

        Raises Corrupt as `check_rows` does.
        """
        if kind == "complete":
            complete, able = self.complete[rows.start : rows.stop, None], self.any_modality
            scales = {n: np.where(complete, root, 1 / root) for n, root in self._roots.items()}
        else:
            able = self.modalities[kind].present
            scales = {name: float(name == kind) / root for name, root in self._roots.items()}
        return self._scaled(rows, scales), able[rows.start : rows.stop]

    def _scaled(self, rows: range, scales: dict[str, np.ndarray | float]) -> np.ndarray:
        """The modalities of consecutive items side by side, each times its scale: () or (n, 1)."""
        columns = []
        for name, vectors in self.modalities.items():
            values = read_rows(vectors.rows, rows).astype(np.float32)
            columns.append(check_rows(vectors, rows, values) * np.float32(scales[name]))
        return np.hstack(columns)

    def stored_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Stored values of a modality, any rows (n,) in any order: float64 (n, D), exact."""
        numbers, place = np.unique(rows, return_inverse=True)
        return read_rows(self.modalities[name].rows, numbers)[place].astype(np.float64)

    def scores(
        self, i: np.ndarray, j: np.ndarray, stored_rows: StoredRows | None = None
    ) -> dict[str, np.ndarray]:
        """Exact scores, float32 (P,), by name: `score`, `score_image`, `score_text`.

        Dot products of the stored rows are summed in float64 and rounded once. A modality that one
        of the two items lacks scores NaN, as does a pair without a common modality. `stored_rows`
        replaces the reading of files where the rows are in memory already.
        """
        out = {f"score_{name}": np.full(len(i), np.nan, np.float32) for name in ("image", "text")}
        total, weights = np.zeros(len(i)), np.zeros(len(i))
        read = stored_rows or self.stored_rows
        for name, vectors in self.modalities.items():
            both = vectors.present[i] & vectors.present[j]
            one, other = i[both], j[both]
            dots = np.empty(len(one))
            for start in range(0, len(one), EXACT_ROWS):
                cut = slice(start, start + EXACT_ROWS)
                dots[cut] = np.einsum("pd,pd->p", read(name, one[cut]), read(name, other[cut]))
            out[f"score_{name}"][both] = dots
            total[both] += vectors.weight * dots
            weights[both] += vectors.weight
        with np.errstate(invalid="ignore"):
            return {"score": (total / weights).astype(np.float32)} | out


def weighted_rows(
    vectors: ItemVectors, names: Sequence[str], stored: dict[str, np.ndarray]
) -> np.ndarray:
    """Rows float32 (n, D) whose inner products are the scores over the modalities `names`.

    The `stored` rows of these stand side by side, each times the root of its scaled weight.
    """
    total = sum(vectors.modalities[name].weight for name in names)
    roots = {name: np.sqrt(vectors.modalities[name].weight / total) for name in names}
    return np.hstack([np.asarray(stored[n], np.float32) * np.float32(roots[n]) for n in names])


def subset(vectors: ItemVectors, rows: np.ndarray) -> ItemVectors:
    """Some items, by row numbers (n,) in any order, with their vectors in memory as float32."""
    modalities = {}
    for name, all_of in vectors.modalities.items():
        stored = vectors.stored_rows(name, rows).astype(np.float32)
        modalities[name] = ModalityVectors(Rows([stored]), all_of.present[rows], all_of.weight)
    return ItemVectors(modalities)


def open_vectors(
    embeddings: EmbeddingSet, names: Sequence[Modality], image_weight: float
) -> ItemVectors:
    """The vectors of an embedding set in the modalities `names`; a single one has weight one.

    Raises BadInput when no item has a vector, Corrupt when items.parquet cannot be read.
    """
    weights = {"image": image_weight, "text": 1 - image_weight}
    # Only these columns: names and titles of all items would fill the memory.
    items = embeddings.read_items([f"has_{name}" for name in names])
    modalities: dict[str, ModalityVectors] = {}
    for name in names:
        weight, present = weights[name] if len(names) > 1 else 1.0, items[f"has_{name}"].to_numpy()
        rows = embeddings.rows(name)
        if len(rows) != len(present):
            raise Corrupt(
                f"{embeddings.path}: {len(rows)} {name} vectors for {len(present)} items; "
                "embed again"
            )
        modalities[name] = ModalityVectors(rows, present, weight)
    if not any(vectors.present.any() for vectors in modalities.values()):
        raise BadInput(
            f"{embeddings.path}: no item has a vector of {' or '.join(names) or 'any'} modality; "
            "there is nothing to index"
        )
    return ItemVectors(modalities)


def vectors_of_array(rows: np.ndarray) -> ItemVectors:
    """Items in one modality with unit rows (N, D) in memory."""
    return ItemVectors({"image": ModalityVectors(Rows([rows]), np.ones(len(rows), bool), 1.0)})


def read_rows(rows: Rows, wanted: range | np.ndarray) -> np.ndarray:
    """Stored rows (n, D) in their own dtype, for ascending row numbers.

    Files are read, each run of neighbours at once, not mapped: the pages of a map would stay in the
    memory of the process. Raises Corrupt where a file is shorter than when it was opened.
    """
    out = np.empty((len(wanted), rows.width), rows.parts[0].dtype)
    numbers = np.asarray(wanted, np.int64)
    edges = np.searchsorted(numbers, [0, *rows.ends])
    for part, end, first, last in zip(rows.parts, rows.ends, edges, edges[1:], strict=False):
        here = numbers[first:last] - (end - len(part))
        if not isinstance(part, np.memmap) or part.filename is None:
            out[first:last] = part[here]
        elif first < last:
            starts = np.flatnonzero(np.r_[True, np.diff(here) != 1])
            with open(part.filename, "rb") as file:
                for run, stop in zip(starts, [*starts[1:], len(here)], strict=True):
                    unread = out[first + run : first + stop].data.cast("B")
                    file.seek(part.offset + int(here[run]) * rows.width * part.itemsize)
                    if file.readinto(unread) < len(unread):
                        raise Corrupt(
                            f"{part.filename}: shorter than when it was opened; embed again"
                        )
    return out


def check_rows(
    vectors: ModalityVectors, wanted: range | np.ndarray, values: np.ndarray
) -> np.ndarray:
    """`values` float32 (n, D) of the rows `wanted` (n,) as they are.

    Raises Corrupt with the file and row of the first NaN or Inf, and of the first row of a file
    whose length is not one although its item has the modality. No score of such a row has a
    meaning, and no margin holds for its products.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", values, values))  # NaN and Inf show in them
    numbers = np.asarray(wanted, np.int64)
    is_wrong = ~np.isfinite(lengths)
    if any(isinstance(part, np.memmap) for part in vectors.rows.parts):
        is_wrong |= vectors.present[numbers] & (np.abs(lengths - 1) > LENGTH_ERROR)
    if is_wrong.any():
        place = int(np.flatnonzero(is_wrong)[0])
        row, ends = int(numbers[place]), vectors.rows.ends
        block = int(np.searchsorted(ends, row, side="right"))
        name = getattr(vectors.rows.parts[block], "filename", None) or "the rows"
        is_finite = np.isfinite(values[place]).all()
        fault = f"has length {lengths[place]:.4g}, not 1" if is_finite else "holds NaN or infinity"
        row -= ends[block] - len(vectors.rows.parts[block])
        raise Corrupt(f"{name}: row {row} (item {numbers[place]}) {fault}; embed again")
    return values
