"""Trivial matchers. What they score is the floor under every trained model."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from dist_train.evaluation.runs import runs
from dist_train.evaluation.titles import decode_escapes

# Products of one title's words with others', held at a time: 12 bytes each, 240 MB.
PRODUCTS_AT_ONCE = 20_000_000
PAIRS_AT_ONCE = 1_000_000


def same_photo_pairs(hashes) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of items with the same photo hash.

    hashes: (N,) strings; "" or None means no photo, and equals nothing.
    Returns (i, j), (P,) int64 each, i < j. P grows with the square of a hash's items.
    """
    codes, names = pd.factorize(np.asarray(hashes, dtype=object))
    shown = np.array([bool(name) for name in names], dtype=bool)
    rows = np.flatnonzero(codes >= 0)
    rows = rows[shown[codes[rows]]]
    rows = rows[np.argsort(codes[rows], kind="stable")]
    return _pairs_within_runs(rows, codes[rows])


def title_pairs(titles, *, floor: float = 0.2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of items whose titles share enough words.

    The score is the cosine of word TF-IDF vectors with binary counts: a word said twice is no
    better evidence. Rare words weigh more. Titles without a word pair with nothing.
    titles: (N,) strings or None. Returns (i, j, score), (P,) int64, int64, float32, i < j and
    score >= floor > 0. Time grows with the sum over words of (titles with the word) squared.
    """
    if floor <= 0:
        raise ValueError(f"floor must be above 0, not {floor}: every pair has a score of 0")
    words = _word_vectors(titles)
    found = [_block_pairs(words, *block, floor) for block in _blocks(words)]
    if not found:
        none = np.empty(0, dtype=np.int64)
        return none, none.copy(), np.empty(0, dtype=np.float32)
    i, j, score = (np.concatenate(part) for part in zip(*found, strict=True))
    return i, j, score


def title_scores(titles, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The score that `title_pairs` gives, for given pairs: (P,) float32, 0 without a common word.

    titles: (N,) strings or None, all of them, for they say which words are rare; i, j: (P,) rows.
    """
    words = _word_vectors(titles)
    scores = np.empty(len(i), np.float32)
    for start in range(0, len(i), PAIRS_AT_ONCE):
        cut = slice(start, start + PAIRS_AT_ONCE)
        both = words[i[cut]].multiply(words[j[cut]])
        scores[cut] = np.minimum(np.asarray(both.sum(axis=1)).ravel(), np.float32(1))
    return scores


def _pairs_within_runs(rows, keys) -> tuple[np.ndarray, np.ndarray]:
    """All pairs among rows of equal key; keys sorted, rows ascending within a key."""
    begins, earlier = runs(keys)
    ends = np.cumsum(earlier)
    within = np.arange(earlier.sum()) - np.repeat(ends - earlier, earlier)
    first = rows[np.repeat(begins, earlier) + within]
    return first.astype(np.int64), np.repeat(rows, earlier).astype(np.int64)


def _word_vectors(titles) -> sparse.csr_matrix:
    """(N, words) float32, unit rows; a zero row where there is no word."""
    texts = [decode_escapes(title) if isinstance(title, str) else "" for title in titles]
    # one-letter words are kept: sizes and counts tell variants of a product apart
    vectorizer = TfidfVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b", dtype=np.float32)
    tokens = vectorizer.build_analyzer()
    if not any(tokens(text) for text in texts):
        return sparse.csr_matrix((len(texts), 1), dtype=np.float32)
    return vectorizer.fit_transform(texts).tocsr()


def _blocks(words: sparse.csr_matrix) -> Iterator[tuple[int, int]]:
    """Cut the rows so that no block makes more products than may be held (one row may)."""
    titles_with = np.bincount(words.indices, minlength=words.shape[1])
    products = np.zeros(words.shape[0] + 1, dtype=np.int64)
    np.cumsum(words.astype(bool) @ titles_with, out=products[1:])
    start = 0
    while start < words.shape[0]:
        limit = products[start] + PRODUCTS_AT_ONCE
        stop = max(start + 1, int(np.searchsorted(products, limit, side="right")) - 1)
        yield start, stop
        start = stop


def _block_pairs(words, start: int, stop: int, floor: float):
    """Pairs with i in start..stop-1 and j > i."""
    cosine = (words[start:stop] @ words[start:].T).tocoo()
    i, j = cosine.row.astype(np.int64) + start, cosine.col.astype(np.int64) + start
    kept = (j > i) & (cosine.data >= np.float32(floor))
    i, j, score = i[kept], j[kept], np.minimum(cosine.data[kept], np.float32(1))
    order = np.lexsort((j, i))
    return i[order], j[order], score[order]
