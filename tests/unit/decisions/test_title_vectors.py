"""Vectors of titles against terms counted by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.decisions.title_vectors import title_vectors
from dist_train.evaluation import baselines
from dist_train.evaluation.baselines import cosines

WORDS = ["red", "Red", "shoe", "XL", "5", "250gr", "kopi", "kopi-kopi", "🌸"]
TITLES = st.lists(
    st.one_of(st.none(), st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)), max_size=12
)


def runs(title: str | None) -> Counter[str]:
    """Runs of three and four characters within words that have a blank at either end."""
    padded = [f" {word} " for word in (title or "").lower().split()]
    return Counter(
        word[start : start + length]
        for word in padded
        for length in (3, 4)
        for start in range(len(word) - length + 1)
    )


def character_cosines(titles: list[str | None]) -> np.ndarray:
    """All against all, (N, N) in float64."""
    counts = [runs(title) for title in titles]
    titles_with = Counter(run for count in counts for run in count)
    kept = sorted(run for run, number in titles_with.items() if number > 1)
    weight = [math.log((1 + len(titles)) / (1 + titles_with[run])) + 1 for run in kept]
    rows = [[math.log(c[r]) + 1 if c[r] else 0.0 for r in kept] for c in counts]
    dense = np.reshape(rows, (len(titles), len(kept))) * np.reshape(weight, (1, len(kept)))
    dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-9)
    return dense @ dense.T


@settings(max_examples=40, deadline=None)
@given(TITLES)
def test_characters_equal_runs_counted_by_hand(titles):
    vectors = title_vectors(titles).characters
    found = (vectors @ vectors.T).toarray()
    np.testing.assert_allclose(found, character_cosines(titles), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(TITLES)
def test_rows_are_of_unit_length_or_empty_where_there_is_no_term(titles):
    vectors = title_vectors(titles)
    for rows in vectors:
        assert rows.dtype == np.float32
        assert rows.shape[0] == len(titles)
        assert rows.shape[1] >= 1
        lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1))).ravel()
        np.testing.assert_allclose(lengths[np.diff(rows.indptr) > 0], 1, atol=1e-6)
    without = [not title or not title.strip("🌸 ") for title in titles]
    assert np.array_equal(np.diff(vectors.words.indptr) == 0, without)


@pytest.mark.parametrize("titles", [[], [""], [None, "", "🌸"], ["one"], ["abc", "xyz"]])
def test_without_a_common_term_the_vectors_are_empty(titles):
    characters = title_vectors(titles).characters
    assert (characters.shape, characters.nnz) == ((len(titles), 1), 0)


def test_misspelt_joined_escaped_and_styled_titles_share_characters():
    titles = ["Kopi hitam", "kopihitam", "kopi hitem", "𝐊𝐨𝐩𝐢 ｈｉｔａｍ", "caf\\xc3\\xa9", "cafe"]
    vectors = title_vectors(titles)
    alike = cosines(vectors.characters, np.array([0, 0, 0, 4, 0]), np.array([1, 2, 3, 5, 5]))
    assert (alike[:2] > 0.4).all()
    np.testing.assert_allclose(alike[2:], [1, 1, 0], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(TITLES.filter(lambda titles: len(titles) > 1))
def test_cosines_are_the_same_bits_in_blocks_of_any_size(titles):
    i, j = np.triu_indices(len(titles), k=1)
    for rows in title_vectors(titles):
        at_once = cosines(rows, i, j)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(baselines, "PAIRS_AT_ONCE", 3)
            assert np.array_equal(cosines(rows, i, j), at_once)
        assert at_once.dtype == np.float32
        assert np.array_equal(at_once, cosines(rows, j, i))
        assert (at_once <= 1).all()
        np.testing.assert_allclose(at_once, (rows @ rows.T).toarray()[i, j], atol=1e-6)
