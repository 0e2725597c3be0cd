"""Trivial matchers against all pairs compared one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from dist_train.evaluation import baselines
from dist_train.evaluation.baselines import same_photo_pairs, title_pairs, title_scores
from shards.catalogue.titles import readable_title

WORDS = ["red", "Red", "shoe", "XL", "5", "250gr", "kopi", "🌸"]
TITLES = st.lists(
    st.one_of(st.none(), st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)), max_size=12
)


@given(st.lists(st.sampled_from(["a", "b", "c", "", None]), max_size=12))
def test_same_photo_pairs_are_all_equal_pairs(hashes):
    i, j = same_photo_pairs(np.array(hashes, dtype=object))
    expected = {
        (a, b)
        for a in range(len(hashes))
        for b in range(a + 1, len(hashes))
        if hashes[a] and hashes[a] == hashes[b]
    }
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == sorted(expected)
    assert i.dtype == j.dtype == np.int64


def test_a_photo_shared_by_very_many_is_still_fully_paired():
    hashes = ["x", ""] * 300
    i, j = same_photo_pairs(hashes)
    assert len(i) == 300 * 299 // 2
    assert (i < j).all()
    assert (i % 2 == 0).all()
    assert (j % 2 == 0).all()
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i)


def cosines(titles) -> np.ndarray:
    """All against all, with words split by hand."""
    vectorizer = TfidfVectorizer(binary=True, analyzer=words_of, dtype=np.float64)
    if not any(words_of(title) for title in titles):
        return np.zeros((len(titles), len(titles)))
    dense = vectorizer.fit_transform(titles).toarray()
    return dense @ dense.T


def words_of(title):
    return [word for word in (title or "").lower().split() if word != "🌸"]


@settings(deadline=None)
@given(TITLES, st.sampled_from([0.1, 0.35, 0.8]), st.sampled_from([1, 30, 10_000]))
def test_title_pairs_equal_all_against_all(titles, floor, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "PRODUCTS_AT_ONCE", at_once)
        patch.setattr(baselines, "SCORE_FLOOR", floor)
        i, j, score = title_pairs(titles)
    expected = cosines(titles)
    found = np.zeros_like(expected)
    found[i, j] = score
    assert (i < j).all()
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i)
    np.testing.assert_allclose(score, expected[i, j], atol=1e-6)
    clear = np.triu(expected > floor + 1e-6, k=1)
    assert (found[clear] > 0).all()
    assert (score >= np.float32(floor)).all()
    assert (score <= 1).all()
    assert (i.dtype, j.dtype, score.dtype) == (np.int64, np.int64, np.float32)


def test_no_more_products_are_held_at_once_than_may_be():
    titles = ["kopi hitam", "kopi", "teh", "kopi susu", "gula kopi"] * 20
    vectors, held, blocks_of_cost = baselines.word_vectors(titles), [], baselines.blocks_of_cost

    def watched(cost, most):
        for start, stop in blocks_of_cost(cost, most):
            # One product for each word of a row and each title that has this word.
            titles_with = (vectors > 0).sum(axis=0)
            held.append(int((vectors[start:stop] > 0).dot(titles_with.T).sum()))
            assert held[-1] <= 500
            yield start, stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "PRODUCTS_AT_ONCE", 500)
        patch.setattr(baselines, "blocks_of_cost", watched)
        title_pairs(titles)
    assert sum(held) == 20 * (4 * 80 + 4 * 20)
    assert max(held) > 250


def test_a_word_said_twice_counts_once_and_case_does_not_matter():
    titles = ["Kopi kopi hitam", "KOPI HITAM", "teh", "gula merah"]
    i, j, score = title_pairs(titles)
    assert (i.tolist(), j.tolist()) == ([0], [1])
    assert score[0] == pytest.approx(1.0)


def test_escapes_are_decoded_before_words_are_compared():
    i, j, score = title_pairs(["caf\\xc3\\xa9", "café", "teh"])
    assert (i.tolist(), j.tolist()) == ([0], [1])
    assert score[0] == pytest.approx(1.0)


@given(st.text(max_size=8), st.text(max_size=8))
def test_escaped_text_comes_back(before, after):
    if "\\" in before + after or "&" in before + after:
        return
    escaped = "".join(f"\\x{octet:02x}" for octet in after.encode("utf-8", "surrogatepass"))
    expected = after if after.isprintable() else readable_title(escaped)
    assert readable_title(before + escaped) == readable_title(before) + expected


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("\\xe2\\x9c\\xa8 promo", "✨ promo"),
        ("\\xE2\\x9C\\xA8", "✨"),
        ("cut \\xe2\\x9c", "cut \\xe2\\x9c"),
        ("\\xe2\\x9c\\xa8\\xff", "✨\\xff"),
        ("size \\xl", "size \\xl"),
        ("5 x 5", "5 x 5"),
        ("", ""),
    ],
)
def test_malformed_escapes_stay(title, expected):
    assert readable_title(title) == expected


@settings(deadline=None)
@given(TITLES.filter(lambda titles: len(titles) > 1), st.sampled_from([1, 1_000]))
def test_scores_of_given_pairs_equal_all_against_all(titles, at_once):
    i, j = np.triu_indices(len(titles), k=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "PAIRS_AT_ONCE", at_once)
        found = title_scores(titles, i, j)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, cosines(titles)[i, j], atol=1e-6)
