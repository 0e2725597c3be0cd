"""Trivial matchers: same photo, similar titles. A trained model is worth what it adds to them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from shards.catalogue.titles import readable_title

# Products of a word's weight in one title and in another, held at a time: 12 bytes each, 240 MB.
PRODUCTS_AT_ONCE = 20_000_000
# Pairs whose rows of terms, some hundred numbers each, are held at a time.
PAIRS_AT_ONCE = 100_000
SCORE_FLOOR = 0.2
"""The lowest score of the title pairs that are kept. All pairs score 0 or more."""
Titles = Sequence[str | None] | np.ndarray


def same_photo_pairs(hashes: Sequence[str | None] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of items with the same photo hash.

    hashes: (N,) strings; "" or None means no photo, and equals nothing.
    Returns (i, j), (P,) int64 each, i < j. P grows with the square of a hash's items.
    """
    names = pd.Series(hashes, dtype=object)
    code = pd.factorize(names.mask(names == ""))[0]
    rows = np.argsort(code, kind="stable")
    rows = rows[code[rows] >= 0]
    # Each row is paired with all rows before it in its run of equal hashes.
    begins = np.searchsorted(code[rows], code[rows])
    earlier = np.arange(len(rows)) - begins
    within = np.arange(earlier.sum()) - np.repeat(np.cumsum(earlier) - earlier, earlier)
    first = rows[np.repeat(begins, earlier) + within]
    return first.astype(np.int64), np.repeat(rows, earlier).astype(np.int64)


def title_pairs(titles: Titles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of items whose titles share enough words.

    The score is the cosine of word TF-IDF vectors with binary counts: a repeated word is no
    better evidence. Rare words weigh more. Titles without a word pair with nothing.
    titles: (N,). Returns (i, j, score), (P,) int64, int64, float32, i < j and
    score >= SCORE_FLOOR. Time grows with the sum over words of (titles with the word) squared.
    """
    words = word_vectors(titles)
    nothing = np.empty(0, np.int64)
    found = [(nothing, nothing, np.empty(0, np.float32))]
    titles_with = np.bincount(words.indices, minlength=words.shape[1])
    products = words.astype(bool) @ titles_with
    for start, stop in blocks_of_cost(products, PRODUCTS_AT_ONCE):
        cosine = (words[start:stop] @ words[start:].T).tocoo()
        i, j = cosine.row.astype(np.int64) + start, cosine.col.astype(np.int64) + start
        kept = (j > i) & (cosine.data >= np.float32(SCORE_FLOOR))
        i, j, score = i[kept], j[kept], np.minimum(cosine.data[kept], np.float32(1))
        found.append((i, j, score))
    i, j, score = (np.concatenate(column) for column in zip(*found, strict=True))
    return i, j, score


def title_scores(titles: Titles, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The score of `title_pairs` for given pairs: (P,) float32, 0 without a common word.

    titles: (N,), all of them, because they decide which words are rare; i, j: (P,) rows.
    """
    return cosines(word_vectors(titles), i, j)


def cosines(vectors: sparse.csr_matrix, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The cosines of pairs of rows, float32 (P,), at most 1 and 0 without a common term.

    vectors: (N, V) float32 unit rows; i, j: (P,) rows.
    """
    scores = np.empty(len(i), np.float32)
    for start in range(0, len(i), PAIRS_AT_ONCE):
        cut = slice(start, start + PAIRS_AT_ONCE)
        both = vectors[i[cut]].multiply(vectors[j[cut]])
        scores[cut] = np.minimum(np.asarray(both.sum(axis=1)).ravel(), np.float32(1))
    return scores


def word_vectors(titles: Titles) -> sparse.csr_matrix:
    """TF-IDF of words with binary counts: see `term_vectors`."""
    # One-letter words are kept: sizes and counts distinguish variants of a product.
    return term_vectors(titles, binary=True, token_pattern=r"(?u)\b\w+\b")


def term_vectors(titles: Titles, **options: Any) -> sparse.csr_matrix:
    """TF-IDF of titles (N,), float32 (N, V): unit rows, a zero row where there is no term.

    options: those of scikit-learn's TfidfVectorizer, which say what a term is. Where no title has
    one, V is 1.
    """
    texts = [readable_title(title) if isinstance(title, str) else "" for title in titles]
    try:
        found = TfidfVectorizer(dtype=np.float32, **options).fit_transform(texts)
    except ValueError:  # no title has a term, or none that is in min_df titles
        found = sparse.csr_matrix((len(texts), 1), dtype=np.float32)
    return sparse.csr_matrix(found)


def blocks_of_cost(cost: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks (start, stop) whose cost (N,) sums to at most `most`, or of one row."""
    total, start = np.r_[0, np.cumsum(cost)], 0
    while start < len(cost):
        stop = int(np.searchsorted(total, total[start] + most, side="right")) - 1
        stop = max(start + 1, stop)
        yield start, stop
        start = stop
