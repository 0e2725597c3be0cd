"""Scores on the test products, each by another way: sets, float64, thresholds tried one by one.

Val and test are made so unlike each other that whatever is chosen on the wrong one shows: in val
the photos say more than the titles' vectors, and these more than the words; in test it is the
other way round, and the scores that part right from wrong lie elsewhere.
"""

import json
import math
import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from dist_train.decisions.score import evaluate
from dist_train.distributed.stage import EMBEDDING, MATCHES, PAIRS, parents_for
from dist_train.embedding.store import part_path
from dist_train.evaluation.scores import score_table
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import write_json, write_parquet

D, WEIGHT, THRESHOLD, BY_SCORE = 16, 0.3, 0.6, 0.45
SIZES = {
    "val": (1, 2, 3, 5, 1, 2, 4, 3, 6), "test": (2, 3, 1, 4, 6, 2, 3, 2, 1, 5), "train": (3, 3)
}  # fmt: skip
"""Items of each product."""
NOISE = {"val": (0.3, 0.7), "test": (0.9, 1.1), "train": (0.5, 0.5)}
"""Of photos and of titles, against the product's own direction."""
WEIGHTS = {"image": WEIGHT, "text": 1 - WEIGHT}
Pair = tuple[int, int]
"""Two postings, by their place among those of a split that may speak."""


def catalogue() -> pd.DataFrame:
    """Labelled products of three splits in mixed order, near-duplicates, two without a label."""
    rng = np.random.default_rng(0)
    rows, product = [], 0
    for split, sizes in SIZES.items():
        for size in sizes:
            rows += [(split, product)] * size
            product += 1
    table = pd.DataFrame(rows, columns=["split", "product"])
    table = table.sample(frac=1, random_state=3).reset_index(drop=True)
    table["label_group"] = [f"g{product}" for product in table["product"]]
    table["title"] = [title(row, rng) for row in table.itertuples()]
    table["sha256"], table["photo_group"] = "ab", -1
    table["phash"] = [f"h{rng.integers(40)}" for _ in table.index]
    table.loc[table.index[table.split == "test"][0], "label_group"] = ""
    table.loc[table.index[table.split == "val"][0], "label_group"] = ""
    for split in ("test", "val"):  # a photo that was trained on
        here = table.index[table.split == split][3]
        table.loc[[here, table.index[table.split == "train"][1]], "photo_group"] = 7
    return table


def title(row, rng) -> str:
    """Words of the product in test, words of any in val; every seventh says nothing."""
    if rng.random() < 1 / 7:
        return ""
    own = f"brand{row.product} model{row.product}" if row.split == "test" else ""
    return f"{own} word{rng.integers(4)} size{rng.integers(3)}".strip()


def vectors(table: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Unit float16 rows (N, D); of some items a modality is missing."""
    rng, found = np.random.default_rng(seed), {}
    for part, name in enumerate(("image", "text")):
        noise = np.array([NOISE[split][part] for split in table.split])[:, None]
        rows = rng.standard_normal((99, D))[table["product"]]
        rows = rows + noise * rng.standard_normal((len(table), D))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        found[name] = rows.astype(np.float16)
    found["image"][5::9] = 0
    found["text"][(table.title == "").to_numpy()] = 0
    return found


def write_embedding(out, table: pd.DataFrame, found: dict[str, np.ndarray]) -> None:
    stage_files.begin(out, EMBEDDING, {"by": "hand", "name": out.name}, {})
    files = [out / "items.parquet"]
    for name, rows in found.items():
        files.append(part_path(out, name, 0))
        np.save(files[-1], rows)
    N = len(table)
    has = {f"has_{n}": found[n].any(1) if n in found else np.zeros(N, bool)
           for n in ("image", "text")}  # fmt: skip
    items = table.drop(columns="product").assign(
        row=np.arange(N), posting_id=[f"p{n}" for n in range(N)], status="embedded", **has
    )
    lost = items.iloc[:1].assign(row=-1, posting_id="lost", status="rejected")
    write_parquet(files[0], pd.concat([lost, items.sample(frac=1, random_state=1)]))
    stage_files.finish(out, {"items": N}, files)


def write_decided(
    out,
    embedding,
    accepted: list[Pair],
    weights: dict[str, float],
    joined: pd.DataFrame | None = None,
) -> None:
    """A match directory with these pairs of rows accepted, and nothing that is not read here.

    joined: the pairs of the join, i, j and score, where a pair model made the matches.
    """
    pairs = out.with_name(f"{out.name}-pairs")
    stage_files.begin(pairs, PAIRS, {}, parents_for(pairs, embedding=embedding))
    write_json(pairs / "proof.json", {"score_floor": 0.0, "weights": weights})
    files, decided = [pairs / "proof.json"], {"form": "score", "score_threshold": THRESHOLD}
    if joined is not None:
        decided = {"form": "pair model", "score_threshold": BY_SCORE}
        for number, some in enumerate(np.array_split(np.arange(len(joined)), 3)):
            files.append(pairs / f"pairs/{number:05d}.parquet")
            write_parquet(files[-1], joined.iloc[some])
    stage_files.finish(pairs, {}, files)
    stage_files.begin(out, MATCHES, {}, parents_for(out, pairs=pairs))
    names = pd.read_parquet(embedding / "items.parquet").posting_id.tolist()
    lists = {name: [name] for name in names}
    for i, j in accepted:
        lists[f"p{i}"].append(f"p{j}")
        lists[f"p{j}"].append(f"p{i}")
    table = pd.DataFrame({"posting_id": names, "matches": list(lists.values())})
    table["scores"] = [np.ones(len(found), np.float32) for found in lists.values()]
    write_parquet(out / "matches.parquet", table)
    # Groups that are not the components of the matches, so that each is seen to be scored itself.
    group = [abs(hash_of(name)) % 11 for name in names]
    write_parquet(out / "groups.parquet", pd.DataFrame({"posting_id": names, "group_id": group}))
    write_json(out / "threshold.json", decided | {"threshold": THRESHOLD, "weights": weights})
    files = [out / "matches.parquet", out / "groups.parquet", out / "threshold.json"]
    stage_files.finish(out, {"postings": len(names)}, files)


def hash_of(name: str) -> int:
    return sum(map(ord, name)) * 7919


# What should be said, by other ways


def speakers(table: pd.DataFrame, split: str) -> np.ndarray:
    """Rows of a split with a label whose photo stands in no other split."""
    of_photo = table[table.photo_group >= 0].groupby("photo_group").split.agg(set)
    crossing = {group for group, splits in of_photo.items() if len(splits) > 1}
    return np.array([
        row for row, item in enumerate(table.itertuples())
        if item.split == split and item.label_group and item.photo_group not in crossing
    ])  # fmt: skip


def counted(labels: list[str], accepted: list[Pair]) -> tuple[list[float], float, float]:
    """F1 of every item, mean precision and mean recall; everyone matches itself."""
    said = [{n} for n in range(len(labels))]
    for i, j in accepted:
        said[i].add(j)
        said[j].add(i)
    true = [{m for m, other in enumerate(labels) if other == own} for own in labels]
    both = [(len(s & t), len(s), len(t)) for s, t in zip(said, true, strict=True)]
    f1 = [2 * right / (asked + wanted) for right, asked, wanted in both]
    return (f1, float(np.mean([r / a for r, a, _ in both])),
            float(np.mean([r / w for r, _, w in both])))  # fmt: skip


def best_cut(labels: list[str], scores: dict[Pair, np.float32]) -> tuple[float, list[Pair]]:
    """The best mean F1 over all thresholds, and the fewest pairs that reach it."""
    said, right = [1] * len(labels), [1] * len(labels)
    size = [labels.count(own) for own in labels]
    ranked = sorted(scores, key=lambda pair: -scores[pair])
    mean = [math.fsum(2 / (1 + n) for n in size) / len(labels)]
    for place, pair in enumerate(ranked):
        for item in pair:
            said[item] += 1
            right[item] += labels[pair[0]] == labels[pair[1]]
        ends = place + 1 == len(ranked) or scores[ranked[place + 1]] < scores[pair]
        f1 = math.fsum(2 * r / (s + n) for r, s, n in zip(right, said, size, strict=True))
        mean.append(f1 / len(labels) if ends else -1.0)
    cut = next(n for n, value in enumerate(mean) if value > max(mean) - 1e-12)
    return mean[cut], ranked[:cut]


def cosines(rows: np.ndarray, named: np.ndarray, here: np.ndarray) -> dict[Pair, float]:
    """Of every two of the `named` rows that are there, in float64."""
    wide = rows.astype(np.float64)
    return {
        (a, b): sum(x * y for x, y in zip(wide[named[a]], wide[named[b]], strict=True))
        for a, b in combinations(range(len(named)), 2) if here[named[a]] and here[named[b]]
    }  # fmt: skip


def of_words(titles: list[str]) -> dict[Pair, float]:
    """Cosines of the words' weights ln((1 + n) / (1 + df)) + 1, as scikit-learn's guide says."""
    words = [set(re.findall(r"\w+", title.lower())) for title in titles]
    df = {word: sum(word in other for other in words) for own in words for word in own}
    weight = {word: math.log((1 + len(titles)) / (1 + n)) + 1 for word, n in df.items()}
    length = [math.sqrt(sum(weight[word] ** 2 for word in own)) for own in words]
    return {
        (a, b): sum(weight[w] ** 2 for w in words[a] & words[b]) / (length[a] * length[b])
        for a, b in combinations(range(len(titles)), 2) if words[a] & words[b]
    }  # fmt: skip


def float32(scores: dict[Pair, float], least: float) -> dict[Pair, np.float32]:
    return {pair: np.float32(s) for pair, s in scores.items() if np.float32(s) >= least}


def mixed(first: dict[Pair, float], second: dict[Pair, float], weight: float) -> dict[Pair, float]:
    """Weighted mean of two scores; of a pair with one of them, that one."""
    return {
        pair: weight * first[pair] + (1 - weight) * second[pair]
        if pair in first and pair in second
        else first.get(pair, second.get(pair, 0.0))
        for pair in {*first, *second}
    }


def drawn_interval(values, labels: list[str], rounds: int = 4000) -> tuple[float, float, float]:
    """95 % of the means of products drawn one by one, and the spread of these means."""
    rng, names = np.random.default_rng(5), sorted(set(labels))
    of = [np.array([v for v, own in zip(values, labels, strict=True) if own == n]) for n in names]
    means = [
        np.concatenate([of[n] for n in rng.integers(0, len(names), len(names))]).mean()
        for _ in range(rounds)
    ]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)), float(np.std(means))


class Expected:
    """The splits' postings that may speak, and every matcher's scores of their pairs."""

    def __init__(self, table: pd.DataFrame, found, other) -> None:
        self.rows = {split: speakers(table, split) for split in ("val", "test")}
        self.labels = {s: table.label_group[rows].tolist() for s, rows in self.rows.items()}
        self.scores: dict[str, dict[str, dict[Pair, np.float32]]] = {}
        self.titles = {s: table.title[rows].tolist() for s, rows in self.rows.items()}
        for split, rows in self.rows.items():
            words = of_words(self.titles[split])
            self.add("word TF-IDF", split, float32(words, 0.2))
            for prefix, vectors_ in (("", found), ("other: ", other)):
                cosine = {n: cosines(v, rows, v.any(1)) for n, v in vectors_.items()}
                for name, scores in cosine.items():
                    self.add(f"{prefix}{name}", split, float32(scores, 0.05))
                both = mixed(cosine["image"], cosine["text"], WEIGHT)
                self.add(f"{prefix}image + text", split, float32(both, 0.05))
                if not prefix:
                    self.text_and_words(split, cosine["text"], words)

    def add(self, name: str, split: str, scores: dict[Pair, np.float32]) -> None:
        self.scores.setdefault(name, {})[split] = scores

    def text_and_words(self, split: str, text: dict[Pair, float], words: dict[Pair, float]) -> None:
        """Pairs that either finds, with both scores, in 21 mixtures."""
        either = {*float32(text, 0.05), *float32(words, 0.2)} & text.keys()
        for step in range(21):
            w = step / 20
            scores = {p: np.float32(w * text[p] + (1 - w) * words.get(p, 0.0)) for p in either}
            self.add(f"text x {w}", split, scores)

    def reached(self, name: str, threshold: float) -> tuple[list[float], float, float]:
        """On the test postings."""
        scores = self.scores[name]["test"]
        accepted = [pair for pair, score in scores.items() if score >= np.float32(threshold)]
        return counted(self.labels["test"], accepted)

    def mixtures(self, split: str) -> dict[float, float]:
        """Best mean F1 of a split by the share of the text's score."""
        return {
            step / 20: best_cut(self.labels[split], self.scores[f"text x {step / 20}"][split])[0]
            for step in range(21)
        }


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The folder, what `evaluate` says, and what it should."""
    folder = tmp_path_factory.mktemp("scored")
    table = catalogue()
    found, other = vectors(table, 1), vectors(table, 2)
    write_embedding(folder / "emb", table, found)
    write_embedding(folder / "other", table, other)
    rng = np.random.default_rng(4)
    same = table["product"].to_numpy()
    accepted = [
        (i, j) for i, j in combinations(range(len(table)), 2)
        if rng.random() < (0.6 if same[i] == same[j] else 0.03)
    ]  # fmt: skip
    write_decided(folder / "matches", folder / "emb", accepted, WEIGHTS)
    metrics = evaluate(folder / "matches", {"other": folder / "other"})
    return folder, metrics, Expected(table, found, other), table, accepted


def by_name(metrics) -> dict[str, dict]:
    return {row["name"]: row for row in metrics["rows"]}


MATCHERS = ("word TF-IDF", "image", "text", "other: image", "other: text", "other: image + text")


def test_every_matcher_stands_in_the_table(scored):
    folder, metrics, _, _, _ = scored
    kinds = [(row["name"], row["kind"]) for row in metrics["rows"]]
    assert kinds == [
        ("self-match", "baseline"), ("same photo", "baseline"), ("word TF-IDF", "baseline"),
        ("image", "modality"), ("text", "modality"), ("text + TF-IDF", "modality"),
        ("other: image", "compare"), ("other: text", "compare"),
        ("other: image + text", "compare"), ("image + text", "ours"),
    ]  # fmt: skip
    assert json.loads((folder / "matches/metrics.json").read_text()) == metrics


@pytest.mark.parametrize("name", MATCHERS)
def test_thresholds_are_chosen_on_val_and_scored_on_test(scored, name):
    _, metrics, expected, _, _ = scored
    row = by_name(metrics)[name]
    val = expected.scores[name]["val"]
    chosen = {pair for pair, score in val.items() if score >= np.float32(row["threshold"])}
    f1, fewest = best_cut(expected.labels["val"], val)
    assert chosen == set(fewest)
    assert np.mean(counted(expected.labels["val"], fewest)[0]) == pytest.approx(f1)
    per_item, precision, recall = expected.reached(name, row["threshold"])
    said = (row["f1"], row["precision"], row["recall"])
    assert said == pytest.approx((np.mean(per_item), precision, recall), abs=1e-9)
    # On the test postings another threshold would be the best: chosen there it would show.
    assert best_cut(expected.labels["test"], expected.scores[name]["test"])[0] > row["f1"] + 1e-3


def test_the_weight_of_the_fusion_is_chosen_on_val(scored):
    _, metrics, expected, _, _ = scored
    row = by_name(metrics)["text + TF-IDF"]
    val, test = expected.mixtures("val"), expected.mixtures("test")
    best = [w for w, f1 in val.items() if f1 > max(val.values()) - 1e-12]
    assert row["weight"] == min(best, key=lambda w: abs(w - 0.5))
    assert test[row["weight"]] < max(test.values()) - 1e-3
    name, threshold = f"text x {row['weight']}", np.float32(row["threshold"])
    chosen = [pair for pair, score in expected.scores[name]["val"].items() if score >= threshold]
    assert np.mean(counted(expected.labels["val"], chosen)[0]) == pytest.approx(max(val.values()))
    per_item, precision, recall = expected.reached(name, row["threshold"])
    said = (row["f1"], row["precision"], row["recall"])
    assert said == pytest.approx((np.mean(per_item), precision, recall), abs=1e-9)


def fixed_matchers(expected: Expected, table: pd.DataFrame, accepted) -> dict[str, list[float]]:
    """F1 of every test item of the matchers without a threshold of their own, and of ours."""
    rows, labels = expected.rows["test"], expected.labels["test"]
    phash = table.phash[rows].tolist()
    alike = [(a, b) for a, b in combinations(range(len(rows)), 2) if phash[a] == phash[b]]
    place = {row: n for n, row in enumerate(rows.tolist())}
    ours = [(place[i], place[j]) for i, j in accepted if i in place and j in place]
    return {
        name: counted(labels, pairs)
        for name, pairs in (("self-match", []), ("same photo", alike), ("image + text", ours))
    }


@pytest.mark.parametrize("name", ["self-match", "same photo", "image + text"])
def test_matchers_without_a_choice(scored, name):
    _, metrics, expected, table, accepted = scored
    row = by_name(metrics)[name]
    f1, precision, recall = fixed_matchers(expected, table, accepted)[name]
    said = (row["f1"], row["precision"], row["recall"])
    assert said == pytest.approx((np.mean(f1), precision, recall), abs=1e-12)
    assert row["threshold"] == (THRESHOLD if name == "image + text" else None)
    assert row["items"] == len(f1)


@pytest.mark.parametrize("name", ["self-match", "same photo", "image + text", "image"])
def test_intervals_hold_19_of_20_means_of_products_drawn_one_by_one(scored, name):
    _, metrics, expected, table, accepted = scored
    row, fixed = by_name(metrics)[name], fixed_matchers(expected, table, accepted)
    f1 = fixed[name][0] if name in fixed else expected.reached(name, row["threshold"])[0]
    low, high, spread = drawn_interval(f1, expected.labels["test"])
    # An interval of 90 % would be narrower by 0.3 of the spread at each end.
    assert row["low"] == pytest.approx(low, abs=0.22 * spread)
    assert row["high"] == pytest.approx(high, abs=0.22 * spread)


def test_differences_are_paired_on_the_same_items(scored):
    _, metrics, expected, table, accepted = scored
    rows = by_name(metrics)
    told = [(row["of"], row["over"]) for row in metrics["differences"]]
    assert told == [
        *(("image + text", baseline) for baseline in ("self-match", "same photo", "word TF-IDF")),
        *((name, f"other: {name}") for name in ("image", "text", "image + text")),
        ("text + TF-IDF", "word TF-IDF"), ("text + TF-IDF", "text"),
    ]  # fmt: skip
    for row in metrics["differences"]:
        gained = rows[row["of"]]["f1"] - rows[row["over"]]["f1"]
        assert row["f1"] == pytest.approx(gained, abs=1e-12)
        assert row["low"] < row["f1"] < row["high"]
    ours = fixed_matchers(expected, table, accepted)["image + text"][0]
    words = expected.reached("word TF-IDF", rows["word TF-IDF"]["threshold"])[0]
    low, high, spread = drawn_interval(np.subtract(ours, words), expected.labels["test"])
    assert metrics["differences"][2]["low"] == pytest.approx(low, abs=0.15 * spread)
    assert metrics["differences"][2]["high"] == pytest.approx(high, abs=0.15 * spread)


def delivered(folder, said: dict[str, set[str]]) -> list[tuple[float, float, float]]:
    """F1, precision and recall of the test postings that may speak, from the files alone."""
    items = pd.read_parquet(folder / "emb" / "items.parquet").set_index("posting_id")
    label = items.label_group.to_dict()
    labelled = [name for name in label if label[name]]
    crossing = items[items.photo_group >= 0].groupby("photo_group").split.nunique() > 1
    counts, found = [], []
    for name in labelled:
        item = items.loc[name]
        if item.split != "test" or crossing.get(item.photo_group, False):
            continue
        product = {other for other in labelled if label[other] == label[name]}
        right = len((said[name] & product) | {name})
        wrong = sum(1 for other in said[name] - product if label[other])
        counts.append((right, wrong, sum(not label[other] for other in said[name]), len(product)))
    _, all_wrong, unknown, _ = np.sum(counts, axis=0)
    share = min(1, all_wrong * (len(label) / len(labelled) - 1) / max(unknown, 1))
    for right, wrong, strangers, size in counts:
        predicted = right + wrong + share * strangers
        found.append((2 * right / (predicted + size), right / predicted, right / size))
    return found


def test_delivered_scores_follow_from_the_files_and_the_labels_alone(scored):
    folder, metrics, _, _, _ = scored
    matches = pd.read_parquet(folder / "matches/matches.parquet")
    groups = pd.read_parquet(folder / "matches/groups.parquet").set_index("posting_id").group_id
    items = pd.read_parquet(folder / "emb/items.parquet").set_index("posting_id")
    alike = items.phash.where(items.phash != "")
    said = {
        "matches": {row.posting_id: set(row.matches) for row in matches.itertuples()},
        "groups": {name: set(groups.index[groups == groups[name]]) for name in groups.index},
        "same photo": {name: set(alike.index[alike == alike[name]]) for name in alike.index},
        "self-match": {name: {name} for name in groups.index},
    }
    told = metrics["delivered"]
    assert [(row["name"], row["kind"]) for row in told["rows"]] == [
        ("matches", "ours"), ("groups", "groups"), ("same photo", "baseline"),
        ("self-match", "baseline"),
    ]  # fmt: skip
    for row in told["rows"]:
        expected = delivered(folder, said[row["name"]])
        means = np.mean(expected, axis=0)
        figures = (row["f1"], row["precision"], row["recall"])
        assert figures == pytest.approx(tuple(means), abs=1e-5)
        assert row["items"] == told["items"] == len(expected)
        assert row["low"] < row["f1"] < row["high"]
    unlabelled = (items.label_group == "").sum()
    assert unlabelled > 0
    assert told["postings"] - told["labelled"] == unlabelled
    assert told["largest_group"] == groups.value_counts().max()
    assert (
        told["largest_product"] == items.label_group[items.label_group != ""].value_counts().max()
    )
    ours = {row["name"]: row["f1"] for row in told["rows"]}
    assert [(row["of"], row["over"]) for row in told["differences"]] == [
        ("matches", "self-match"), ("matches", "same photo"), ("matches", "groups")
    ]  # fmt: skip
    for row in told["differences"]:
        assert row["f1"] == pytest.approx(ours[row["of"]] - ours[row["over"]])
    # Strangers of the whole catalogue count: among test items alone the score is another.
    assert ours["matches"] < by_name(metrics)["image + text"]["f1"] - 0.01


@pytest.fixture(scope="module")
def by_model(scored):
    """The same matches as those of a pair model, over pairs of a join, and what is said of them."""
    folder, _, _, table, accepted = scored
    rng, same = np.random.default_rng(6), table["product"].to_numpy()
    i, j = np.triu_indices(len(table), 1)
    score = (rng.random(len(i)) * 0.6 + 0.3 * (same[i] == same[j])).astype(np.float32)
    score[::50] = BY_SCORE
    joined = pd.DataFrame({"i": i, "j": j, "score": score})
    write_decided(folder / "modelled", folder / "emb", accepted, WEIGHTS, joined)
    return evaluate(folder / "modelled"), joined


def test_the_score_alone_is_delivered_beside_a_pair_model(scored, by_model):
    folder, plain = scored[:2]
    metrics, joined = by_model
    told = metrics["delivered"]
    assert [(row["name"], row["kind"]) for row in told["rows"]] == [
        ("matches", "ours"), ("groups", "groups"), ("score alone", "baseline"),
        ("same photo", "baseline"), ("self-match", "baseline"),
    ]  # fmt: skip
    said = {name: {name} for name in pd.read_parquet(folder / "emb/items.parquet").posting_id}
    for pair in joined[joined.score >= np.float32(BY_SCORE)].itertuples():
        said[f"p{pair.i}"].add(f"p{pair.j}")
        said[f"p{pair.j}"].add(f"p{pair.i}")
    means = np.mean(delivered(folder, said), axis=0)
    row = told["rows"][2]
    assert (row["f1"], row["precision"], row["recall"]) == pytest.approx(tuple(means))
    assert row["low"] < row["f1"] < row["high"]
    assert [row["threshold"] for row in told["rows"]] == [THRESHOLD, None, BY_SCORE, None, None]
    first = told["differences"][0]
    assert (first["of"], first["over"]) == ("matches", "score alone")
    assert first["f1"] == pytest.approx(told["rows"][0]["f1"] - row["f1"])
    others = [row for row in told["rows"] if row["name"] != "score alone"]
    assert others == plain["delivered"]["rows"]
    assert told["differences"][1:] == plain["delivered"]["differences"]


def test_a_pair_model_stands_beside_the_score_with_its_threshold_of_val(scored, by_model):
    _, _, expected, table, accepted = scored
    rows = by_name(by_model[0])
    assert list(rows) == [
        "self-match", "same photo", "word TF-IDF", "image", "text", "image + text",
        "text + TF-IDF", "pair model",
    ]  # fmt: skip
    score, ours = rows["image + text"], rows["pair model"]
    assert (score["kind"], ours["kind"]) == ("modality", "ours")
    val = expected.scores["image + text"]["val"]
    chosen = {pair for pair, value in val.items() if value >= np.float32(score["threshold"])}
    assert chosen == set(best_cut(expected.labels["val"], val)[1])
    per_item, precision, recall = expected.reached("image + text", score["threshold"])
    said = (score["f1"], score["precision"], score["recall"])
    assert said == pytest.approx((np.mean(per_item), precision, recall), abs=1e-9)
    f1, precision, recall = fixed_matchers(expected, table, accepted)["image + text"]
    said = (ours["f1"], ours["precision"], ours["recall"])
    assert said == pytest.approx((np.mean(f1), precision, recall), abs=1e-12)
    assert ours["threshold"] == THRESHOLD
    assert {row["of"] for row in by_model[0]["differences"][:3]} == {"pair model"}


def test_whom_the_scores_speak_of(scored):
    _, metrics, expected, table, accepted = scored
    labels = expected.labels["test"]
    assert (metrics["split"], metrics["threshold"]) == ("test", THRESHOLD)
    assert (metrics["items"], metrics["products"]) == (len(labels), len(set(labels)))
    assert metrics["left_out"] == 1
    f1 = fixed_matchers(expected, table, accepted)["image + text"][0]
    bands: dict[tuple[int, int], list[float]] = {}
    for own, value in zip(labels, f1, strict=True):
        size = labels.count(own)
        ends = {1: (1, 1), 2: (2, 2), 3: (3, 4), 4: (3, 4)}.get(size, (5, 9))
        bands.setdefault(ends, []).append(value)
    said = {(r["size_from"], r["size_to"]): (r["items"], r["f1"]) for r in metrics["by_group_size"]}
    assert said == {
        ends: (len(values), pytest.approx(np.mean(values))) for ends, values in bands.items()
    }


def test_the_table_says_what_the_file_says(scored):
    metrics = scored[1]
    text = score_table(metrics)
    lines = text.splitlines()
    told = metrics["delivered"]
    assert lines[0] == (
        f"As delivered: mean F1 of {told['items']} test postings of {told['products']} products "
        f"never trained on, each matched with all {told['postings']} postings, 1 with a photo of "
        "another split left out"
    )
    assert f"largest group has {told['largest_group']} postings, the largest product 6" in lines[6]
    assert lines[7].split()[:5] == ["3", "postings", "have", "no", "label:"]
    assert lines[9].startswith(f"Among the {metrics['items']} test items alone, without the rest")
    assert lines[1] == lines[10]
    assert lines[1].split() == ["F1", "95", "%", "interval", "precision", "recall", "threshold"]
    rows = [*told["rows"], *metrics["rows"]]
    for row, line in zip(rows, [*lines[2:6], *lines[11:]], strict=False):
        threshold = [] if row["threshold"] is None else [f"{row['threshold']:.3f}"]
        assert line.startswith("* " if row["kind"] == "ours" else "  ")
        assert line[2:28].strip() == row["name"]
        assert line[28:].split() == [
            f"{row['f1']:.4f}", f"{row['low']:.4f}–{row['high']:.4f}", f"{row['precision']:.4f}",
            f"{row['recall']:.4f}", *threshold,
        ]  # fmt: skip
    weight = by_name(metrics)["text + TF-IDF"]["weight"]
    assert f"{weight:.2f} of the first score, {1 - weight:.2f} of the second" in text
    for row in metrics["differences"]:
        line = next(n for n in lines if n.startswith(f"  {row['of']} over {row['over']} "))
        numbers = [f"{row['f1']:+.4f}", f"{row['low']:+.4f}", "–", f"{row['high']:+.4f}"]
        assert line.split()[-4:] == numbers


@pytest.mark.parametrize("labels", ["none", "one", "all others"])
def test_without_val_products_to_tell_apart_only_what_needs_no_threshold_is_scored(
    tmp_path, labels
):
    table = catalogue()
    val = table.split == "val"
    others = [f"alone {number}" for number in range(val.sum())]
    table.loc[val, "label_group"] = {"none": "", "one": "one", "all others": others}[labels]
    write_embedding(tmp_path / "emb", table, vectors(table, 1))
    write_decided(tmp_path / "m", tmp_path / "emb", [], {"image": 0.5, "text": 0.5})
    metrics = evaluate(tmp_path / "m", {"itself": tmp_path / "emb"})
    assert list(by_name(metrics)) == ["self-match", "same photo", "image + text"]
    assert [row["over"] for row in metrics["differences"]] == ["self-match", "same photo"]


def test_one_modality_without_photos_has_no_scores_by_modality(tmp_path):
    table = catalogue().assign(sha256="", phash="")
    write_embedding(tmp_path / "emb", table, {"text": vectors(table, 1)["text"]})
    write_decided(tmp_path / "m", tmp_path / "emb", [], {"text": 1.0})
    metrics = evaluate(tmp_path / "m")
    assert list(by_name(metrics)) == ["self-match", "word TF-IDF", "text + TF-IDF", "text"]


def test_what_cannot_be_scored_is_refused(tmp_path, scored):
    folder = scored[0]
    table = catalogue()
    write_embedding(tmp_path / "less", table.iloc[:-1], vectors(table.iloc[:-1], 1))
    with pytest.raises(BadInput, match="less: is over another shard set than"):
        evaluate(folder / "matches", {"less": tmp_path / "less"})
    table.loc[table.split == "test", "label_group"] = ""
    write_embedding(tmp_path / "emb", table, vectors(table, 1))
    write_decided(tmp_path / "m", tmp_path / "emb", [], {"image": 0.5, "text": 0.5})
    with pytest.raises(BadInput, match="no test posting has a label_group"):
        evaluate(tmp_path / "m")


@pytest.mark.parametrize(
    ("label", "obstacle"),
    [("alone {}", "products has two items, so no match can be right"), ("one", "of one product")],
)
def test_test_products_that_no_score_tells_apart_are_warned_of(tmp_path, caplog, label, obstacle):
    table = catalogue()
    test = table.split == "test"
    table.loc[test, "label_group"] = [label.format(number) for number in range(test.sum())]
    write_embedding(tmp_path / "emb", table, vectors(table, 1))
    write_decided(tmp_path / "m", tmp_path / "emb", [], {"image": 0.5, "text": 0.5})
    evaluate(tmp_path / "m")
    assert "the scores on the test split say nothing" in caplog.text
    assert obstacle in caplog.text
