"""Candidates: the pairs of items that are worth comparing in full.

Each source finds the best k neighbours of every item by one measure. A pair that several sources
find is one candidate, which knows its sources.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sparse_dot_topn import sp_matmul_topn

from dist_train.decisions.title_vectors import TitleVectors
from dist_train.embedding.store import Rows
from dist_train.matching.faiss_library import TRAIN_PER_LIST, faiss, number_of_lists, set_nprobe
from dist_train.matching.kernels import use_threads
from dist_train.matching.nearest import Nearest, ranks
from dist_train.matching.pairs import PairSet
from dist_train.matching.vectors import ItemVectors, ModalityVectors, read_rows

SOURCES = ("score", "image", "text", "words", "characters", "photo")
"""The fused score, each modality alone, the words and the characters of titles, the same photo."""
EXACT_ITEMS = 50_000
"""Items up to which every vector is compared with every other; more are searched by lists."""
NPROBE = 16
"""Lists of similar vectors that are searched for an item."""
ADDED = 65_536
"""Vectors that are read at a time."""
QUERIES = 1024
"""Items whose nearest vectors are in memory at one time."""
TITLES = 10_000
"""Items whose nearest titles are in memory at one time."""
LOWEST_COSINE = 0.05
"""Titles must be more alike than this."""
COMMON = 20_000
"""Titles with a term, above which it finds no neighbours: the time grows with the square."""
SPARE = 8
"""Neighbours beyond k of which the exact score and the row number decide who is among k."""
SCORED_AT_ONCE = 5_000_000


class Candidates(NamedTuple):
    """P unordered pairs of items, i < j, ascending by (i, j)."""

    i: np.ndarray
    """(P,) int32 vector rows."""
    j: np.ndarray
    """(P,) int32 vector rows."""
    sources: np.ndarray
    """(P,) uint8: bit b is set where SOURCES[b] found the pair."""


def find_candidates(
    pairs: PairSet,
    vectors: ItemVectors,
    titles: TitleVectors | None,
    photo_group: np.ndarray,
    k: int,
) -> Candidates:
    """The best k neighbours of each of N items by every source, as one set of pairs.

    pairs: of a join over `vectors`; titles: None where there are none; photo_group: (N,), equal
    for items of the same photo and below 0 without one. Each source adds at most N k pairs; memory
    holds those of all sources twice, 8 bytes each, beside one modality in float32 (float16 above
    EXACT_ITEMS items). Raises Corrupt for a file that cannot be read.
    """
    use_threads()
    keys, sources = np.zeros(0, np.int64), np.zeros(0, np.uint8)
    for name, found in _found_by_source(pairs, vectors, titles, photo_group, k):
        bit = np.uint8(1 << SOURCES.index(name))
        place = np.searchsorted(keys, found)
        known = np.searchsorted(keys, found, "right") > place
        sources[place[known]] |= bit
        sources = np.insert(sources, place[~known], bit)
        keys = np.insert(keys, place[~known], found[~known])
    i = (keys // len(vectors)).astype(np.int32)
    return Candidates(i, (keys % len(vectors)).astype(np.int32), sources)


def recall_by_source(candidates: Candidates, codes: np.ndarray) -> dict[str, float]:
    """The share of all pairs of one product that each source found, and "all" together.

    codes: (N,) int number of the label of each item, -1 where it has none; pairs with such an item
    do not count. Sources that found no pair at all are left out. Empty without a pair of a product.
    """
    sizes = np.bincount(codes[codes >= 0]).astype(np.int64)
    if not (labelled := int((sizes * (sizes - 1) // 2).sum())):
        return {}
    found, right = np.zeros((2, 1 << len(SOURCES)), np.int64)
    for start in range(0, len(candidates.i), SCORED_AT_ONCE):
        i, j, sources = (column[start : start + SCORED_AT_ONCE] for column in candidates)
        same = (codes[i] == codes[j]) & (codes[i] >= 0)
        found += np.bincount(sources, minlength=len(found))
        right += np.bincount(sources[same], minlength=len(found))
    has = {name: np.arange(len(found)) >> bit & 1 == 1 for bit, name in enumerate(SOURCES)}
    recall = {name: right[bit].sum() / labelled for name, bit in has.items() if found[bit].any()}
    return {name: float(share) for name, share in recall.items()} | {
        "all": float(right.sum() / labelled)
    }


def _found_by_source(
    pairs: PairSet,
    vectors: ItemVectors,
    titles: TitleVectors | None,
    photo_group: np.ndarray,
    k: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Each source that there is, and the keys of its pairs: ascending, each once."""
    yield "score", _best_scores(pairs, len(vectors), k)
    if len(vectors.modalities) > 1:  # a single one is the score itself
        for name, modality in vectors.modalities.items():
            yield name, _nearest_vectors(modality, k)
    for name, terms in titles._asdict().items() if titles else ():
        yield name, _nearest_titles(terms, k)
    yield "photo", _same_photo(photo_group, k)


def _best_scores(pairs: PairSet, items: int, k: int) -> np.ndarray:
    """Keys of the best k pairs of every item by the score of the join."""
    nearest = Nearest(np.arange(items), k, np.full(items, -np.inf, np.float32))
    for batch in pairs.batches():
        i, j, score = (batch[name].to_numpy() for name in ("i", "j", "score"))
        nearest.add(np.r_[i, j], np.r_[j, i], np.r_[score, score])
    item, rank = np.nonzero(nearest.ids >= 0)
    return np.unique(_keys(item, nearest.ids[item, rank], items))


def _nearest_vectors(modality: ModalityVectors, k: int) -> np.ndarray:
    """Keys of the nearest k of every item by cosine; items without the modality have none."""
    rows, items = modality.rows, np.flatnonzero(modality.present)
    index = _vector_index(rows, items)
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(items), QUERIES):
        some = items[start : start + QUERIES]
        queries = read_rows(rows, some).astype(np.float32)
        wanted = min(k + 1 + SPARE, len(items))
        _, place, near = index.search_and_reconstruct(queries, wanted)
        # Sums in float64: in float32 the number of threads would decide between near ties.
        scores = np.einsum("qd,qnd->qn", queries, near, dtype=np.float64).astype(np.float32)
        query, rank = np.nonzero(place >= 0)
        i, j = some[query], items[place[query, rank]]
        found.append(_best_keys(i, j, scores[query, rank], k, len(rows)))
    return np.unique(np.concatenate(found))


def _vector_index(rows: Rows, items: np.ndarray) -> Any:
    """A FAISS index of the rows `items` (n,); its ids are places in `items`."""
    if len(items) <= EXACT_ITEMS:
        index = faiss.IndexFlatIP(rows.width)
    else:
        lists = number_of_lists(len(items))
        index = faiss.index_factory(rows.width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.by_residual = False  # so that it stores the rows themselves, exact to float16
        wanted = np.linspace(0, len(items) - 1, min(len(items), TRAIN_PER_LIST * lists))
        sample = items[np.unique(wanted.astype(np.int64))]
        index.train(read_rows(rows, sample).astype(np.float32))
        set_nprobe(index, NPROBE)
    for start in range(0, len(items), ADDED):
        index.add(read_rows(rows, items[start : start + ADDED]).astype(np.float32))
    return index


def _nearest_titles(vectors: sparse.csr_matrix, k: int) -> np.ndarray:
    """Keys of the nearest k of every item by the cosine of sparse vectors (N, V).

    Terms of more than COMMON titles do not count. Where more than k + SPARE titles are equally
    near, sparse_dot_topn chooses: always the same ones, but not always those of the lowest rows.
    """
    items = vectors.shape[0]
    by_term = vectors.T.tocsr()
    titles_with = np.diff(by_term.indptr)
    by_term.data[np.repeat(titles_with > COMMON, titles_with)] = 0
    by_term.eliminate_zeros()
    options = {"threshold": LOWEST_COSINE, "n_threads": faiss.omp_get_max_threads()}
    found = [np.zeros(0, np.int64)]
    for start in range(0, items, TITLES):
        some = vectors[start : start + TITLES]
        near = sp_matmul_topn(some, by_term, k + 1 + SPARE, **options).tocoo()
        found.append(_best_keys(near.row + start, near.col, near.data, k, items))
    return np.unique(np.concatenate(found))


def _same_photo(photo_group: np.ndarray, k: int) -> np.ndarray:
    """Keys of every item with the next k items, by row, of its photo group."""
    order = np.argsort(photo_group, kind="stable")
    order = order[photo_group[order] >= 0]
    group, found = photo_group[order], [np.zeros(0, np.int64)]
    for step in range(1, min(k + 1, len(order))):
        same = group[step:] == group[:-step]
        found.append(_keys(order[:-step][same], order[step:][same], len(photo_group)))
    return np.sort(np.concatenate(found))


def _best_keys(i: np.ndarray, j: np.ndarray, scores: np.ndarray, k: int, items: int) -> np.ndarray:
    """Keys of the best k pairs (P,) of each i, without itself: by score, then the lower j."""
    order = np.lexsort((j, -scores, i))
    i, j = (side[order][i[order] != j[order]] for side in (i, j))
    kept = ranks(i) < k
    return _keys(i[kept], j[kept], items)


def _keys(i: np.ndarray, j: np.ndarray, items: int) -> np.ndarray:
    """One number (P,) int64 for each unordered pair of N `items`: lower row times N plus higher."""
    return np.minimum(i, j).astype(np.int64) * items + np.maximum(i, j)
