"""Candidates against every pair compared one by one, over the pairs of a real join."""

from pathlib import Path

import numpy as np
import pytest

from dist_train.config.options import IndexConfig, JoinConfig
from dist_train.decisions import candidates
from dist_train.decisions.candidates import SOURCES, Candidates, find_candidates, recall_by_source
from dist_train.decisions.title_vectors import title_vectors
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching import pairs as pairs_module
from dist_train.matching.build_pairs import build_pairs
from dist_train.matching.faiss_library import faiss
from dist_train.matching.index import build_index
from dist_train.matching.pairs import PairSet
from dist_train.matching.vectors import ItemVectors, open_vectors
from tests.support.planted import planted, write_set

N, D, K = 300, 16, 4
COPIES = np.arange(0, N, 50)
"""Rows with the same vectors: fewer than K + SPARE, so that ties go to the lower row."""
Joined = tuple[PairSet, ItemVectors]
WORDS = ["red", "blue", "shoe", "bag", "XL", "5", "250gr", "500gr", "kopi", "susu", "teh", "🌸"]


def joined(folder: Path, vectors: dict[str, np.ndarray]) -> Joined:
    """A set on disk, its join with the best fifth of all pairs, and the vectors of that join."""
    write_set(folder / "embeddings", vectors)
    build_index(folder / "embeddings", folder / "index", IndexConfig(recall_rows=0))
    config = JoinConfig(pairs_per_item=N / 10, audit_rows=0, neighbours=0, device="cpu")
    build_pairs(folder / "embeddings", folder / "index", folder / "pairs", config)
    pairs = PairSet(folder / "pairs")
    names = [name for name in ("image", "text") if name in pairs.weights]
    return pairs, open_vectors(pairs.embedding, names, 0.5)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return joined(tmp_path_factory.mktemp("both"), planted(N, D))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return joined(tmp_path_factory.mktemp("image"), {"image": planted(N, D, seed=1)["image"]})


@pytest.fixture(scope="module")
def titles():
    """Some without a word, some equal."""
    rng = np.random.default_rng(0)
    return title_vectors([" ".join(rng.choice(WORDS, rng.integers(0, 6))) for _ in range(N)])


@pytest.fixture(scope="module")
def photo_group():
    """Photos of one item, of several and of more than K + 1; a third has none."""
    rng = np.random.default_rng(1)
    return np.where(rng.random(N) < 0.3, -1, rng.integers(0, 20, N) ** 2)


def pairs_of(found: Candidates, source: str) -> set[tuple[int, int]]:
    """The pairs that have the bit of a source."""
    has = found.sources >> SOURCES.index(source) & 1 == 1
    return set(zip(found.i[has].tolist(), found.j[has].tolist(), strict=True))


def best_pairs(scores: np.ndarray, k: int = K) -> set[tuple[int, int]]:
    """The best k of every row of scores (N, N), NaN for no pair; of equal ones the lower row."""
    found = set()
    for i, row in enumerate(scores):
        order = [j for j in np.lexsort((np.arange(N), -row)) if j != i and not np.isnan(row[j])]
        found |= {(min(i, int(j)), max(i, int(j))) for j in order[:k]}
    return found


def all_scores(vectors: ItemVectors, name: str) -> np.ndarray:
    """(N, N), NaN where an item lacks what is compared."""
    i, j = np.divmod(np.arange(N * N), N)
    return vectors.scores(i, j)[name].reshape(N, N)


def joined_scores(pairs: PairSet) -> np.ndarray:
    """(N, N), NaN below the score floor."""
    table, scores = pairs.select(), np.full((N, N), np.nan, np.float32)
    scores[table.i, table.j] = scores[table.j, table.i] = table.score
    return scores


def test_the_join_holds_more_and_fewer_than_k_pairs_of_an_item(both: Joined):
    degree = (~np.isnan(joined_scores(both[0]))).sum(axis=1)
    assert degree.min() < K < degree.max()


@pytest.mark.parametrize("k", [1, K, N])
def test_every_source_finds_the_best_k_of_every_item(both: Joined, titles, photo_group, k):
    pairs, vectors = both
    found = find_candidates(pairs, vectors, titles, photo_group, k)
    assert pairs_of(found, "score") == best_pairs(joined_scores(pairs), k)
    for name in ("image", "text"):
        assert pairs_of(found, name) == best_pairs(all_scores(vectors, f"score_{name}"), k)
    assert pairs_of(found, "photo") == same_photo(photo_group, k)
    for name, terms in titles._asdict().items():
        check_titles(pairs_of(found, name), (terms @ terms.T).toarray(), k)


def same_photo(photo_group: np.ndarray, k: int) -> set[tuple[int, int]]:
    found = set()
    for group in set(photo_group[photo_group >= 0].tolist()):
        rows = np.flatnonzero(photo_group == group).tolist()
        found |= {(i, j) for n, i in enumerate(rows) for j in rows[n + 1 : n + 1 + k]}
    return found


def check_titles(found: set[tuple[int, int]], cosine: np.ndarray, k: int) -> None:
    """All that are clearly among the best k of an item, and none that clearly are not."""
    np.fill_diagonal(cosine, 0)
    kth_best = np.sort(cosine, axis=1)[:, -min(k, N)][:, None]
    lowest = candidates.LOWEST_COSINE
    clear = (cosine > kth_best + 1e-6) & (cosine > lowest + 1e-6)
    possible = (cosine > kth_best - 1e-6) & (cosine > lowest - 1e-6)
    i, j = np.nonzero(clear | clear.T)
    assert found >= {(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True) if a < b}
    i, j = np.nonzero(possible | possible.T)
    assert found <= set(zip(i.tolist(), j.tolist(), strict=True))
    degree = np.bincount(np.array([*found]).ravel(), minlength=N)
    assert (degree >= np.minimum((cosine > lowest + 1e-6).sum(axis=1), k)).all()


def test_candidates_are_sorted_and_each_once(both: Joined, titles, photo_group):
    found = find_candidates(*both, titles, photo_group, K)
    keys = found.i.astype(np.int64) * N + found.j
    assert (np.diff(keys) > 0).all()
    assert (found.i < found.j).all()
    assert (found.sources > 0).all()
    assert [column.dtype for column in found] == [np.int32, np.int32, np.uint8]
    assert len(found.i) == len(set().union(*(pairs_of(found, name) for name in SOURCES)))


def test_sizes_of_blocks_and_threads_change_nothing(both: Joined, titles, photo_group, monkeypatch):
    expected = find_candidates(*both, titles, photo_group, K)
    monkeypatch.setattr(pairs_module, "BATCH", 77)
    for name, size in {"ADDED": 64, "QUERIES": 7, "TITLES": 11}.items():
        monkeypatch.setattr(candidates, name, size)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads = faiss.omp_get_max_threads()
    found = find_candidates(*both, titles, photo_group, K)
    faiss.omp_set_num_threads(threads)
    for column, other in zip(found, expected, strict=True):
        assert np.array_equal(column, other)


def test_items_without_a_modality_are_found_by_the_others_alone(both: Joined, titles, photo_group):
    pairs, vectors = both
    found = find_candidates(pairs, vectors, titles, photo_group, K)
    for name, modality in vectors.modalities.items():
        rows = np.array([*pairs_of(found, name)]).ravel()
        assert set(rows.tolist()) == set(np.flatnonzero(modality.present).tolist())


def test_with_one_modality_its_nearest_are_those_of_the_score(image: Joined):
    found = find_candidates(*image, None, np.full(N, -1), K)
    assert pairs_of(found, "score") == best_pairs(joined_scores(image[0]))
    assert (found.sources == 1).all()


def test_titles_without_a_word_find_nothing(image: Joined):
    found = find_candidates(*image, title_vectors([""] * N), np.full(N, -1), K)
    assert (found.sources == 1).all()


def test_one_photo_of_all_items_gives_each_its_next_k(image: Joined):
    found = find_candidates(*image, None, np.zeros(N, int), K)
    expected = {(i, j) for i in range(N) for j in range(i + 1, min(i + 1 + K, N))}
    assert pairs_of(found, "photo") == expected


def test_terms_of_very_many_titles_find_no_neighbours(image: Joined, monkeypatch):
    vectors = title_vectors([f"sale {n // 2}" for n in range(N)])
    monkeypatch.setattr(candidates, "COMMON", 2)
    found = find_candidates(*image, vectors, np.full(N, -1), K)
    assert pairs_of(found, "words") == {(i, i + 1) for i in range(0, N, 2)}
    # The vectors themselves, from which features are computed, keep the term.
    assert (vectors.words.getnnz(axis=0) > 2).any()
    assert (vectors.words.getnnz(axis=1) == 2).all()


def test_more_items_are_searched_by_lists(tmp_path, monkeypatch):
    vectors = planted(2000, D)["image"]
    vectors[::50] = 0  # so many copies as there are planted would be chosen from by chance
    write_set(tmp_path, {"image": vectors})
    modality = open_vectors(EmbeddingSet(tmp_path), ["image"], 1.0).modalities["image"]
    exact = candidates._nearest_vectors(modality, K)
    monkeypatch.setattr(candidates, "EXACT_ITEMS", 1000)
    by_lists = candidates._nearest_vectors(modality, K)
    assert 0.9 < np.isin(exact, by_lists).mean() < 1
    assert np.array_equal(by_lists, candidates._nearest_vectors(modality, K))
    i, j = np.divmod(by_lists, len(vectors))
    assert (modality.present[i] & modality.present[j] & (i < j)).all()


def test_recall_is_the_share_of_all_labelled_pairs(both: Joined, titles, photo_group):
    rng = np.random.default_rng(2)
    codes = rng.integers(-1, 60, N)
    found = find_candidates(*both, titles, photo_group, K)
    same = (codes[:, None] == codes) & (codes >= 0)
    true = {(i, j) for i, j in np.argwhere(same).tolist() if i < j}
    recall = recall_by_source(found, codes)
    for name in SOURCES:
        assert recall[name] == len(pairs_of(found, name) & true) / len(true)
    every = set().union(*(pairs_of(found, name) for name in SOURCES))
    assert recall["all"] == len(every & true) / len(true)
    assert recall.keys() == {*SOURCES, "all"}


def test_recall_counts_in_blocks_and_names_only_sources_that_found_a_pair(
    image: Joined, monkeypatch
):
    found, codes = find_candidates(*image, None, np.full(N, -1), K), np.arange(N) // 4
    recall = recall_by_source(found, codes)
    assert recall.keys() == {"score", "all"}
    monkeypatch.setattr(candidates, "SCORED_AT_ONCE", 13)
    assert recall_by_source(found, codes) == recall
    assert recall_by_source(found, np.arange(N)) == {}
    assert recall_by_source(found, np.full(N, -1)) == {}
