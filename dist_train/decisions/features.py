"""What is known of each candidate pair, by named columns: the input of the pair model.

Every column is symmetric in the two items. NaN means unknown: a modality that one of them lacks, a
field that one of them leaves empty.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.preprocessing import normalize

from dist_train.decisions import quantities
from dist_train.decisions.title_vectors import TitleVectors
from dist_train.evaluation.baselines import blocks_of_cost, cosines
from dist_train.matching.nearest import ranks
from dist_train.matching.vectors import ItemVectors, ModalityVectors, read_rows
from shards.catalogue.titles import readable_title
from shards.storage.errors import BadInput

PAIRS, ROWS, ENTRIES = 1 << 16, 1 << 10, 1 << 23
"""Pairs scored at a time, rows of vectors at a time, values of candidates sorted at a time."""
GAPS = ("score", "score_image", "score_text", "characters", "averaged")
"""Values whose distance to the best of each item is a feature."""
RANKED = ("score", "averaged")
"""Values of which ranks and means over an item's best candidates are features."""
BEST = (5, 20)
"""How many of an item's best candidates its means are over."""
MOSTLY = 0.9
"""The part of a carried column's values that must be numbers for it to be compared as numbers."""

FEATURES = {
    "score": "Score of the join: cosines of the modalities that both items have, weighted.",
    "score_image": "Cosine of the image vectors.",
    "score_text": "Cosine of the text vectors.",
    "words": "Cosine of the TF-IDF vectors of the titles' words.",
    "characters": "Cosine of the TF-IDF vectors of the titles' runs of 3 and 4 characters.",
    "averaged_image": "Cosine of the image vectors, each averaged with those of the accepted "
    "neighbours of its item.",
    "averaged_text": "Cosine of the text vectors, each averaged with those of the accepted "
    "neighbours of its item.",
    "averaged_words": "Cosine of the word vectors of the titles, each averaged with those of the "
    "accepted neighbours of its item.",
    "averaged": "Mean of averaged_image, averaged_text and averaged_words, where known.",
    **{
        f"{name}_gap_{side}": f"By how much {name} falls short of the best {name} among the "
        f"candidates of an item: the {which} of both items."
        for name in GAPS
        for side, which in (("min", "smaller"), ("max", "larger"))
    },
    **{
        f"{name}_rank_{side}": f"How many candidates of an item have a higher {name}: the {which} "
        "of both items."
        for name in RANKED
        for side, which in (("min", "fewer"), ("max", "more"))
    },
    **{
        f"{name}_mean_{k}_{side}": f"Mean {name} of an item's best {k} candidates: the {which} of "
        "both items."
        for name in RANKED
        for k in BEST
        for side, which in (("min", "lower"), ("max", "higher"))
    },
    "photo_distance": "Bits of 64 in which the perceptual hashes of the photos differ.",
    "title_words_min": "Different words of the shorter title.",
    "title_words_difference": "Different words that the longer title has more.",
    **quantities.FEATURES,
    "feature_COLUMN": "A column that the user names. Numbers: the smaller divided by the larger. "
    "Texts: 1 where they are equal but for case and outer blanks, else 0.",
}
"""The columns of PairFeatures and what each holds."""


class PairFeatures:
    """The features of P candidate pairs of N items.

    What needs all candidates is computed once, in some 52 bytes a pair and at most one modality's
    averaged vectors in float16; the other columns when a block of pairs is requested. The results
    are the same to the bit for all sizes of blocks.
    """

    def __init__(
        self,
        items: pd.DataFrame,
        vectors: ItemVectors,
        titles: TitleVectors | None,
        i: np.ndarray,
        j: np.ndarray,
        accepted: float,
        columns: Sequence[str] = (),
    ) -> None:
        """Read all vectors once for the scores and once for the averages.

        items: by vector row, with `title`, `phash` ("" for no photo) and `columns`, the carried
        columns to compare; i, j: (P,) rows, i != j, each unordered pair once; accepted: the lowest
        score of an item's accepted neighbours. A column for which the catalogue has no source is
        left out. Raises BadInput for a carried column that `items` lacks.
        """
        if missing := [name for name in columns if name not in items]:
            raise BadInput(
                f"--features {missing[0]}: the catalogue has no such column; it has "
                f"{', '.join(items.columns)}"
            )
        self._i, self._j = i, j
        titles = titles if titles is not None and titles.words.nnz else None
        self._values = _base_values(vectors, titles, i, j)
        graph = _accepted_graph(len(items), i, j, self._values["score"], accepted)
        averaged = {
            f"averaged_{name}": _averaged_cosines(modality, graph, i, j)
            for name, modality in vectors.modalities.items()
            if f"score_{name}" in self._values
        }
        if titles is not None:
            averaged["averaged_words"] = _averaged_word_cosines(titles.words, graph, i, j)
        self._values |= averaged | {"averaged": _known_mean(list(averaged.values()))}
        self._best = {
            name: _best(len(items), i, j, self._values[name])
            for name in GAPS
            if name in self._values
        }
        self._ranked = {
            name: _ranks_and_means(len(items), i, j, self._values[name]) for name in RANKED
        }
        self._hashes = _photo_hashes(items.phash)
        self._title_words = self._quantities = None
        if titles is not None:
            words = np.diff(titles.words.indptr).astype(np.float32)
            self._title_words = np.where(words > 0, words, np.float32(np.nan))
            readable = [readable_title(title) for title in items.title.fillna("")]
            self._quantities = quantities.tabulate(readable)
        self._carried = {f"feature_{name}": _comparable(items[name]) for name in columns}
        self.names = list(self.of(slice(0)).columns)
        """The columns that this catalogue has, in their order."""

    def __len__(self) -> int:
        return len(self._i)

    @property
    def score(self) -> np.ndarray:
        """The score (P,) float32 of every pair, NaN without a common modality."""
        return self._values["score"]

    def of(self, selection: slice | np.ndarray) -> pd.DataFrame:
        """The features, float32 (n, F), of the pairs of a slice or by their numbers (n,)."""
        i, j = self._i[selection], self._j[selection]
        columns = {name: values[selection] for name, values in self._values.items()}
        for name, best in self._best.items():
            gaps = (best[i] - columns[name], best[j] - columns[name])
            columns |= _min_max(f"{name}_gap", *gaps)
        for name, (ranks_of_both, means) in self._ranked.items():
            columns |= _min_max(f"{name}_rank", *(rank[selection] for rank in ranks_of_both))
            for k, mean in means.items():
                columns |= _min_max(f"{name}_mean_{k}", mean[i], mean[j])
        if self._hashes is not None:
            known = self._hashes[1][i] & self._hashes[1][j]
            bits = np.bitwise_count(self._hashes[0][i] ^ self._hashes[0][j])
            columns["photo_distance"] = np.where(known, bits, np.nan)
        if self._title_words is not None and self._quantities is not None:
            of_i, of_j = self._title_words[i], self._title_words[j]
            columns["title_words_min"] = np.minimum(of_i, of_j)
            columns["title_words_difference"] = np.abs(of_i - of_j)
            columns |= dict(quantities.features(self._quantities, i, j).items())
        columns |= {name: _compared(field[i], field[j]) for name, field in self._carried.items()}
        return pd.DataFrame({n: np.asarray(c, np.float32) for n, c in columns.items()})


def _min_max(name: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """The smaller and the larger of the values of both items, NaN where one is."""
    return {f"{name}_min": np.minimum(a, b), f"{name}_max": np.maximum(a, b)}


def _base_values(
    vectors: ItemVectors, titles: TitleVectors | None, i: np.ndarray, j: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores and cosines of titles, float32 (P,), by name; only those that some item has."""
    present = [f"score_{name}" for name, of in vectors.modalities.items() if of.present.any()]
    names = ["score", *present, *(("words", "characters") if titles is not None else ())]
    values = {name: np.empty(len(i), np.float32) for name in names}
    for start in range(0, len(i), PAIRS):
        cut = slice(start, start + PAIRS)
        found = vectors.scores(i[cut], j[cut])
        if titles is not None:
            worded = np.diff(titles.words.indptr) > 0
            known = worded[i[cut]] & worded[j[cut]]
            for name, rows in (("words", titles.words), ("characters", titles.characters)):
                found[name] = np.where(known, cosines(rows, i[cut], j[cut]), np.float32(np.nan))
        for name in names:
            values[name][cut] = found[name]
    return values


def _accepted_graph(
    items: int, i: np.ndarray, j: np.ndarray, score: np.ndarray, accepted: float
) -> sparse.csr_matrix:
    """(N, N) float32: the scores of accepted neighbours, 1 on the diagonal, sorted columns."""
    kept = (score >= np.float32(accepted)) & (score > 0)
    pairs = sparse.coo_matrix((score[kept], (i[kept], j[kept])), shape=(items, items))
    return (pairs + pairs.T + sparse.identity(items, np.float32)).tocsr()


def _averaged_cosines(
    modality: ModalityVectors, graph: sparse.csr_matrix, i: np.ndarray, j: np.ndarray
) -> np.ndarray:
    """(P,) float32 cosines of the items' vectors averaged over `graph`.

    The average is over those that have the modality, and NaN where none does. In memory: (N, D)
    float16, which changes a cosine by some 1e-4.
    """
    averaged = np.empty((graph.shape[0], modality.rows.width), np.float16)
    for start in range(0, len(averaged), ROWS):
        block = graph[start : start + ROWS]
        used, place = np.unique(block.indices, return_inverse=True)
        rows = read_rows(modality.rows, used).astype(np.float32)
        weights = block.data * modality.present[block.indices]
        shape = (block.shape[0], len(used))
        sums = sparse.csr_matrix((weights, place, block.indptr), shape) @ rows
        with np.errstate(invalid="ignore"):
            averaged[start : start + ROWS] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    cosine = np.empty(len(i), np.float32)
    for start in range(0, len(i), ROWS):
        cut = slice(start, start + ROWS)
        sides = (averaged[side[cut]].astype(np.float32) for side in (i, j))
        cosine[cut] = np.einsum("pd,pd->p", *sides)
    return cosine


def _averaged_word_cosines(
    words: sparse.csr_matrix, graph: sparse.csr_matrix, i: np.ndarray, j: np.ndarray
) -> np.ndarray:
    """(P,) float32 cosines of the word vectors averaged over `graph`, NaN without any word.

    In memory: 8 bytes for each different word of an item and its neighbours.
    """
    averaged = normalize(graph @ words, copy=False)
    averaged.sort_indices()
    worded = np.diff(averaged.indptr) > 0
    return np.where(worded[i] & worded[j], cosines(averaged, i, j), np.float32(np.nan))


def _known_mean(values: list[np.ndarray]) -> np.ndarray:
    """The mean (P,) float32 of values (P,), of those that are not NaN; NaN where all are."""
    total, known = np.zeros(len(values[0]), np.float32), np.zeros(len(values[0]), np.int8)
    for value in values:
        total += np.nan_to_num(value, nan=0.0)
        known += ~np.isnan(value)
    with np.errstate(invalid="ignore"):
        return total / known.astype(np.float32)


def _best(items: int, i: np.ndarray, j: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The highest value (N,) float32 among the candidates of each item, NaN where none is known."""
    best = np.full(items, np.nan, np.float32)
    np.fmax.at(best, i, value)
    np.fmax.at(best, j, value)
    return best


def _ranks_and_means(
    items: int, i: np.ndarray, j: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """How many candidates of i, and of j, have a higher value; the means of the items' best ones.

    The ranks are float32 (2, P), the means float32 (N,) for each of BEST. Values that are NaN do
    not count; their rank is NaN, as is the mean of an item that has no other.
    """
    rank = np.empty((2, len(i)), np.float32)
    means = {k: np.empty(items, np.float32) for k in BEST}
    degree = np.bincount(i, minlength=items) + np.bincount(j, minlength=items)
    for start, stop in blocks_of_cost(degree, ENTRIES):
        here = [np.flatnonzero((side >= start) & (side < stop)) for side in (i, j)]
        item = np.concatenate([i[here[0]], j[here[1]]]) - start
        values = np.concatenate([value[pairs] for pairs in here])
        order = np.lexsort((-values, item))
        item, values = item[order], values[order]
        place, known = ranks(item), ~np.isnan(values)
        for k, mean in means.items():
            best = known & (place < k)
            sums = np.bincount(item[best], values[best], stop - start)
            with np.errstate(invalid="ignore"):
                mean[start:stop] = sums / np.bincount(item[best], minlength=stop - start)
        # Equal values share the rank of the first of them.
        lower = np.r_[True, (item[1:] != item[:-1]) | (values[1:] < values[:-1])][: len(item)]
        shared = np.empty(len(item), np.float32)
        shared[order] = np.where(known, place[np.flatnonzero(lower)][np.cumsum(lower) - 1], np.nan)
        rank[0, here[0]], rank[1, here[1]] = np.split(shared, [len(here[0])])
    return rank, means


def _photo_hashes(phash: pd.Series) -> tuple[np.ndarray, np.ndarray] | None:
    """The hashes, uint64 (N,), and which items have one; None where no item has."""
    texts = phash.fillna("")
    known = (texts != "").to_numpy()
    hashes = np.array([int(text or "0", 16) for text in texts], np.uint64)
    return (hashes, known) if known.any() else None


def _comparable(column: pd.Series) -> np.ndarray:
    """A carried column (N,): float64 of numbers above 0, NaN for others; or int64 codes of texts.

    The code of an empty text is -1. MOSTLY says which of the two a column is.
    """
    texts = column.astype("string").str.strip().str.casefold().replace("", pd.NA)
    numbers = (
        pd.to_numeric(texts, errors="coerce").astype("Float64").to_numpy(float, na_value=np.nan)
    )
    if np.isfinite(numbers).sum() >= MOSTLY * texts.notna().sum():
        return np.where(np.isfinite(numbers) & (numbers > 0), numbers, np.nan)
    return pd.factorize(texts)[0]


def _compared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What `_comparable` made of both items, compared (n,) as "feature_COLUMN" describes it."""
    if a.dtype.kind == "i":
        return np.where((a < 0) | (b < 0), np.nan, a == b)
    ratio = (np.minimum(a, b) / np.maximum(a, b)).astype(np.float32)
    # Long numbers, such as bar codes, may differ by less than float32 resolves.
    return np.where(a == b, ratio, np.minimum(ratio, np.nextafter(np.float32(1), np.float32(0))))
