"""Titles as sparse vectors: TF-IDF of their words and of their runs of three and four characters.

Words distinguish products; runs of characters also match what is misspelt, joined or inflected.
"""

from typing import NamedTuple

from scipy import sparse
from sklearn.feature_extraction.text import strip_accents_unicode

from dist_train.evaluation.baselines import Titles, term_vectors, word_vectors


class TitleVectors(NamedTuple):
    """Sparse vectors of N titles, float32 (N, V) each: unit rows, empty where there is no term."""

    words: sparse.csr_matrix
    """A word weighs by its rarity and not by how often a title repeats it."""
    characters: sparse.csr_matrix
    """Runs of three and four characters within words, blanks at their ends included."""


def title_vectors(titles: Titles) -> TitleVectors:
    """The vectors of titles (N,), "" or None where there is none.

    All titles together decide which terms are rare. Where no title has a term, V is 1.
    """
    characters = term_vectors(
        titles,
        analyzer="char_wb",
        ngram_range=(3, 4),
        min_df=2,  # a run of one title alone matches nothing, and there are millions of these
        sublinear_tf=True,
        # Accents first: bold and full-width capitals become plain ones by it.
        preprocessor=lambda title: strip_accents_unicode(title).lower(),
    )
    return TitleVectors(word_vectors(titles), characters)
