"""Features of pairs against a plain computation, and what holds of any catalogue."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from dist_train.decisions import features, quantities
from dist_train.decisions.features import FEATURES, PairFeatures
from dist_train.decisions.title_vectors import title_vectors
from dist_train.embedding.store import Rows
from dist_train.evaluation.baselines import blocks_of_cost
from dist_train.matching.vectors import ItemVectors, ModalityVectors
from shards.storage.errors import BadInput

ITEMS, ACCEPTED, NAN = 24, 0.4, math.nan
WORDS = ["kaos", "polos", "hitam", "250gr", "500gr", "botol", "2", "pcs", "ax100", "ax200w"]
Pair = tuple[int, int]
Values = dict[Pair, float]


class Catalogue:
    """Random items, some without a photo or a title or both, and candidates that leave two out."""

    def __init__(self, seed: int, image: bool = True, text: bool = True) -> None:
        self.random = random = np.random.default_rng(seed)
        has = {"image": random.random(ITEMS) < 0.8, "text": random.random(ITEMS) < 0.8}
        titles = [" ".join(random.choice(WORDS, random.integers(1, 7))) for _ in range(ITEMS)]
        texts = np.where(has["text"] if text else False, titles, "")
        hashes = [f"{n:016x}" for n in random.integers(0, 2**63, ITEMS)]
        hashes = np.where(has["image"] if image else False, hashes, "")
        price = random.choice(["5", "10", "7.5", "", "0", "-3", " 5.0 "], ITEMS)
        brand = random.choice(["Acme", "acme ", "ACME", "Foo", "", "12"], ITEMS)
        self.items = pd.DataFrame({"title": texts, "phash": hashes, "price": price, "brand": brand})
        self.modalities = {}
        for name, wanted, weight in (("image", image, 0.3), ("text", text, 0.7)):
            rows = random.normal(size=(ITEMS, 6)) + random.integers(0, 2, ITEMS)[:, None]
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            rows[5], rows[7] = rows[4], rows[4]  # equal scores
            if wanted:
                stored = np.where(has[name][:, None], rows, 0).astype(np.float32)
                other = image and text
                self.modalities[name] = ModalityVectors(
                    Rows([stored[:10], stored[10:]]), has[name], weight if other else 1.0
                )
        i, j = np.triu_indices(ITEMS - 2, 1)
        kept = random.random(len(i)) < 0.6
        self.i, self.j = i[kept].astype(np.int32), j[kept].astype(np.int32)

    def features(self, columns: Sequence[str] = ("price", "brand")) -> PairFeatures:
        titles = title_vectors(self.items.title) if "text" in self.modalities else None
        vectors = ItemVectors(self.modalities)
        return PairFeatures(self.items, vectors, titles, self.i, self.j, ACCEPTED, columns)

    def renumbered(self, number: np.ndarray) -> "Catalogue":
        """The same items, item r having become item number[r]; pairs in their order, turned."""
        other = object.__new__(Catalogue)
        old = np.argsort(number)
        other.items = self.items.iloc[old].reset_index(drop=True)
        other.modalities = {
            name: ModalityVectors(
                Rows([np.concatenate(of.rows.parts)[old]]), of.present[old], of.weight
            )
            for name, of in self.modalities.items()
        }
        other.i, other.j = (number[side].astype(np.int32) for side in (self.j, self.i))
        return other

    def plain(self) -> dict[str, Values]:
        """Every feature but the quantities, in float64 and by loops."""
        pairs = list(zip(self.i.tolist(), self.j.tolist(), strict=True))
        rows = {name: np.concatenate(of.rows.parts) for name, of in self.modalities.items()}
        rows = {name: unit.astype(float) for name, unit in rows.items()}
        out: dict[str, Values] = {"score": {}}
        for name, of in self.modalities.items():
            unit, has = rows[name], of.present
            out[f"score_{name}"] = {
                (a, b): float(unit[a] @ unit[b]) if has[a] and has[b] else NAN for a, b in pairs
            }
        for pair in pairs:
            known = {
                name: of.weight
                for name, of in self.modalities.items()
                if not math.isnan(out[f"score_{name}"][pair])
            }
            total = sum(weight * out[f"score_{name}"][pair] for name, weight in known.items())
            out["score"][pair] = total / sum(known.values()) if known else NAN
        if "text" in self.modalities:
            out |= self.plain_titles(pairs)
            words = title_vectors(self.items.title).words.toarray().astype(float)
            rows = rows | {"words": words}
        out |= plain_averaged(pairs, rows, out["score"])
        for name in ("score", "score_image", "score_text", "characters", "averaged"):
            if name in out:
                best = per_item(out[name], lambda values: max(values, default=NAN))
                sides = {p: (best[p[0]] - out[name][p], best[p[1]] - out[name][p]) for p in pairs}
                out |= min_max(f"{name}_gap", sides)
        for name in ("score", "averaged"):
            out |= plain_means(name, out[name])
        return out | self.plain_fields(pairs)

    def plain_titles(self, pairs: list[Pair]) -> dict[str, Values]:
        titles = self.items.title.tolist()
        vectors = title_vectors(titles)
        out: dict[str, Values] = {}
        for name, sparse in (("words", vectors.words), ("characters", vectors.characters)):
            rows = sparse.toarray().astype(float)
            out[name] = {
                (a, b): float(rows[a] @ rows[b]) if titles[a] and titles[b] else NAN
                for a, b in pairs
            }
        count = [len(set(title.split())) or NAN for title in titles]
        out["title_words_min"] = {(a, b): lower(count[a], count[b]) for a, b in pairs}
        out["title_words_difference"] = {(a, b): abs(count[a] - count[b]) for a, b in pairs}
        return out

    def plain_fields(self, pairs: list[Pair]) -> dict[str, Values]:
        out: dict[str, Values] = {"feature_price": {}, "feature_brand": {}}
        hashes, price, brand = (self.items[n].tolist() for n in ("phash", "price", "brand"))
        if any(hashes):
            out["photo_distance"] = {
                (a, b): (int(hashes[a], 16) ^ int(hashes[b], 16)).bit_count()
                if hashes[a] and hashes[b]
                else NAN
                for a, b in pairs
            }
        for a, b in pairs:
            x, y = (float(price[item] or NAN) for item in (a, b))
            out["feature_price"][a, b] = min(x, y) / max(x, y) if x > 0 and y > 0 else NAN
            one, other = (brand[item].strip().lower() for item in (a, b))
            out["feature_brand"][a, b] = float(one == other) if one and other else NAN
        return out


def plain_averaged(
    pairs: list[Pair], rows: dict[str, np.ndarray], score: Values
) -> dict[str, Values]:
    out: dict[str, Values] = {}
    for name, unit in rows.items():
        means = unit.copy()
        for (a, b), weight in score.items():
            if weight >= ACCEPTED:
                means[a] += weight * unit[b]
                means[b] += weight * unit[a]
        with np.errstate(invalid="ignore"):
            means /= np.linalg.norm(means, axis=1, keepdims=True)
        out[f"averaged_{name}"] = {(a, b): float(means[a] @ means[b]) for a, b in pairs}
    known = {p: [v for values in out.values() if not math.isnan(v := values[p])] for p in pairs}
    return out | {"averaged": {pair: mean_of(values) for pair, values in known.items()}}


def plain_means(name: str, values: Values) -> dict[str, Values]:
    out: dict[str, Values] = {}
    for k in (5, 20):
        mean = per_item(values, lambda known: mean_of(sorted(known)[::-1][:k]))  # noqa: B023
        out |= min_max(f"{name}_mean_{k}", {(a, b): (mean[a], mean[b]) for a, b in values})
    return out


def plain_ranks(name: str, values: Values) -> dict[str, Values]:
    ranks = {}
    for pair, value in values.items():
        higher = per_item(values, lambda known: sum(v > value for v in known))  # noqa: B023
        ranks[pair] = [NAN if math.isnan(value) else higher[item] for item in pair]
    return min_max(f"{name}_rank", ranks)


def per_item(values: Values, reduce: Callable[[list[float]], float]) -> list[float]:
    """A reduction of the known values of each item's candidates."""
    return [
        reduce([v for pair, v in values.items() if item in pair and not math.isnan(v)])
        for item in range(ITEMS)
    ]


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values) if values else NAN


def lower(a: float, b: float) -> float:
    return NAN if math.isnan(a + b) else min(a, b)


def min_max(name: str, sides: dict[Pair, Sequence[float]]) -> dict[str, Values]:
    low = {pair: lower(*values) for pair, values in sides.items()}
    high = {pair: -lower(-values[0], -values[1]) for pair, values in sides.items()}
    return {f"{name}_min": low, f"{name}_max": high}


@pytest.mark.parametrize(
    ("image", "text"), [(True, True), (True, False), (False, True)], ids=["both", "image", "text"]
)
@pytest.mark.parametrize("seed", range(3))
def test_they_are_what_loops_in_float64_compute(seed: int, image: bool, text: bool) -> None:
    catalogue = Catalogue(seed, image, text)
    computed = catalogue.features().of(slice(None))
    expected = catalogue.plain()
    pairs = list(zip(catalogue.i.tolist(), catalogue.j.tolist(), strict=True))
    # Ranks of the computed values: they decide which are equal and which differ in their last bits.
    for name in ("score", "averaged"):
        values = dict(zip(pairs, computed[name].tolist(), strict=True))
        expected |= plain_ranks(name, values)
    assert set(computed) == set(expected) | (set(quantities.FEATURES) if text else set())
    for name, values in expected.items():
        wanted = np.array([values[pair] for pair in pairs], float)
        tolerance = 2e-3 if name.startswith("averaged") else 1e-5
        np.testing.assert_allclose(computed[name], wanted, atol=tolerance, err_msg=name)
    if text:
        table = quantities.tabulate(catalogue.items.title.tolist())
        counted = quantities.features(table, catalogue.i, catalogue.j)
        pd.testing.assert_frame_equal(computed[counted.columns], counted, check_dtype=False)


def test_every_column_is_documented_float32_and_in_names() -> None:
    computed = Catalogue(0).features()
    table = computed.of(slice(None))
    assert (table.dtypes == np.float32).all()
    assert list(table) == computed.names
    carried = [name for name in table if name.startswith("feature_")]
    assert carried == ["feature_price", "feature_brand"]
    assert set(table) - set(carried) == set(FEATURES) - {"feature_COLUMN"}


def test_rows_are_cut_by_their_cost() -> None:
    cost = np.array([3, 0, 4, 9, 1, 1])
    assert list(blocks_of_cost(cost, 7)) == [(0, 3), (3, 4), (4, 6)]
    assert list(blocks_of_cost(cost[:0], 7)) == []


def test_the_bits_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(1)
    computed = catalogue.features()
    expected = computed.of(slice(None))
    for size in (1, 7, 1000):
        for name in ("PAIRS", "ROWS", "ENTRIES"):
            monkeypatch.setattr(features, name, size)
        again = catalogue.features()
        parts = [again.of(slice(n, n + size)) for n in range(0, len(again), size)]
        blocks = pd.concat(parts, ignore_index=True)
        pd.testing.assert_frame_equal(blocks, expected, check_exact=True)
    chosen = np.array([9, 3, 3, 50])
    pd.testing.assert_frame_equal(
        computed.of(chosen), expected.iloc[chosen].reset_index(drop=True), check_exact=True
    )


def test_they_are_symmetric_and_keep_their_values_when_items_are_renumbered() -> None:
    catalogue = Catalogue(2)
    expected = catalogue.features().of(slice(None))
    turned = catalogue.renumbered(np.arange(ITEMS)).features().of(slice(None))
    pd.testing.assert_frame_equal(turned, expected, check_exact=True)
    number = np.random.default_rng(0).permutation(ITEMS)
    other = catalogue.renumbered(number).features().of(slice(None))
    # Sums of float16 rows depend on their order, and with them the ranks of what is nearly equal.
    steady = [name for name in expected if not name.startswith("averaged_rank")]
    pd.testing.assert_frame_equal(other[steady], expected[steady], rtol=0, atol=2e-3)


def test_one_pair_and_none() -> None:
    catalogue = Catalogue(0)
    first, second = np.flatnonzero(catalogue.modalities["text"].present)[:2].astype(np.int32)
    catalogue.i, catalogue.j = np.array([first]), np.array([second])
    table = catalogue.features().of(slice(None))
    best = ["score_gap_min", "score_gap_max", "score_rank_min", "score_rank_max"]
    assert (table[best].to_numpy() == 0).all()
    assert table.score_mean_5_min[0] == table.score_mean_20_max[0] == table.score[0]
    catalogue.i = catalogue.j = np.empty(0, np.int32)
    none = catalogue.features()
    assert list(none.of(slice(None))) == list(table)


def test_a_photo_of_the_accepted_neighbours_stands_in_for_a_missing_one() -> None:
    """Items 0 and 1 are accepted by their titles; of these only 1 has a photo, that of item 2."""
    text = Rows([np.array([[1, 0], [1, 0], [0, 1]], np.float32)])
    image = Rows([np.array([[0, 0], [1, 0], [1, 0]], np.float32)])
    has_photo = np.array([False, True, True])
    vectors = ItemVectors(
        {
            "image": ModalityVectors(image, has_photo, 0.5),
            "text": ModalityVectors(text, np.ones(3, bool), 0.5),
        }
    )
    items = pd.DataFrame({"title": ["a", "a", "b"], "phash": ["", "f", "f"]})
    i, j = np.array([0, 0], np.int32), np.array([1, 2], np.int32)
    table = PairFeatures(items, vectors, None, i, j, 0.9).of(slice(None))
    assert table.score_image.isna().all()
    assert table.averaged_image.tolist() == [1, 1]


def test_carried_columns() -> None:
    """Bar codes that float32 cannot tell apart stay different; one odd price is only missing."""
    n = 20
    table = pd.DataFrame({"title": "", "phash": ""}, index=range(n))
    table["code"] = 8991002101234 + np.arange(n) // 2
    table["price"] = ["10.0"] * (n - 2) + ["20", "call us"]
    table["brand"] = pd.Series(["Nike", " nike"] * (n // 2 - 1) + [None, "Puma"])
    vectors = ItemVectors({"image": ModalityVectors(Rows([np.ones((n, 1))]), np.ones(n, bool), 1)})
    i = np.arange(n - 1)
    names = ["code", "price", "brand"]
    found = PairFeatures(table, vectors, None, i, i + 1, 2.0, names).of(slice(None))
    assert (found.feature_code == 1).tolist() == [a == b for a, b in pairwise(table.code)]
    np.testing.assert_array_equal(found.feature_price, [1] * (n - 3) + [0.5, NAN])
    np.testing.assert_array_equal(found.feature_brand, [1] * (n - 3) + [NAN, NAN])
    with pytest.raises(BadInput, match=r"--features colour: .* has no such column; it has title"):
        PairFeatures(table, vectors, None, i, i + 1, 2.0, ["colour"])
