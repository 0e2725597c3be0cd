"""The stage match where the pair model decides: a catalogue packed, joined, matched and scored."""

import json
import os
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_train.config.options import MatchConfig
from dist_train.config.training import result_options
from dist_train.decisions import pair_model, pair_tables
from dist_train.decisions.features import FEATURES
from dist_train.decisions.probabilities import probable_pairs
from dist_train.evaluation.labelled import CatalogueLabels
from dist_train.matching.pairs import PairSet
from tests.support.launching import ROOT, command, environment
from tests.support.matching import add_photos, done, joined, postings, with_splits
from tests.support.verbs import call

FILES = ("matches.parquet", "groups.parquet", "threshold.json", "pair_model.json")
LISTS = dict[str, set[str]]
"""The postings that each posting is matched with, itself among them."""


@dataclass(frozen=True)
class Matched:
    """A match directory over a catalogue whose labels are known, "" for a posting without one."""

    folder: Path
    pairs: Path
    label: dict[str, str]

    @cached_property
    def decided(self) -> dict:
        return json.loads((self.folder / "threshold.json").read_text())

    @cached_property
    def split(self) -> dict[str, str]:
        items = pd.read_parquet(self.pairs.parent / "shards" / "items.parquet")
        return dict(zip(items.posting_id, items.split, strict=True))

    @cached_property
    def matches(self) -> LISTS:
        table = pd.read_parquet(self.folder / "matches.parquet")
        return {row.posting_id: {*row.matches} for row in table.itertuples()}

    @cached_property
    def groups(self) -> LISTS:
        table = pd.read_parquet(self.folder / "groups.parquet")
        return {
            one: {*members}
            for _, members in table.groupby("group_id").posting_id
            for one in members
        }

    def queries(self, split: str) -> list[str]:
        return [one for one, label in self.label.items() if label and self.split[one] == split]

    def means(self, lists: LISTS, split: str = "test") -> tuple[float, float, float]:
        """Mean F1, precision and recall of the labelled postings of a split, by the definition.

        Of matches with postings without a label as many count as wrong as those with labelled
        ones lead to expect.
        """
        sizes = Counter(label for label in self.label.values() if label)
        counts, found = [], []
        for one in self.queries(split):
            known = [other for other in lists[one] if self.label[other] and other != one]
            right = 1 + sum(self.label[other] == self.label[one] for other in known)
            unknown = sum(not self.label[other] for other in lists[one])
            counts.append((right, len(known) + 1 - right, unknown, sizes[self.label[one]]))
        _, wrong, unknown, _ = np.sum(counts, axis=0)
        others = len(self.label) / sum(sizes.values()) - 1
        share = min(1, wrong * others / max(unknown, 1))
        for right, wrong, unknown, size in counts:
            predicted = right + wrong + share * unknown
            found.append((2 * right / (predicted + size), right / predicted, right / size))
        f1, precision, recall = (sum(kind) / len(found) for kind in zip(*found, strict=True))
        return f1, precision, recall

    def printed(self) -> str:
        """What evaluate prints."""
        return done("evaluate", self.folder).text

    def rows(self) -> dict[str, dict]:
        """The scores of the files as delivered, of metrics.json, by name."""
        scores = json.loads((self.folder / "metrics.json").read_text())["delivered"]["rows"]
        return {row["name"]: row for row in scores}


def labels_of(table: pd.DataFrame) -> dict[str, str]:
    return dict(zip(table.posting_id, table.label_group, strict=True))


def matched(table: pd.DataFrame, pairs: Path, out: Path, *options: object) -> Matched:
    done("match", pairs, "--out", out, *options)
    return Matched(out, pairs, labels_of(table))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("by-model")


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    return add_photos(postings(folder / "generated"), folder / "images")


@pytest.fixture(scope="module")
def pairs(table: pd.DataFrame, folder: Path) -> Path:
    return joined(table, folder / "all", folder / "images")


@pytest.fixture(scope="module")
def model(table: pd.DataFrame, pairs: Path, folder: Path) -> Matched:
    """The match by default."""
    return matched(table, pairs, folder / "model")


@pytest.fixture(scope="module")
def plain(table: pd.DataFrame, pairs: Path, folder: Path) -> Matched:
    return matched(table, pairs, folder / "plain", "--plain")


@pytest.fixture(scope="module")
def partly(table: pd.DataFrame, folder: Path) -> Matched:
    """A third of the postings, whatever their split would be, have no label."""
    unlabelled = np.random.default_rng(3).random(len(table)) < 1 / 3
    known = table.assign(label_group=table.label_group.where(~unlabelled, ""))
    found = joined(with_splits(known), folder / "partly", folder / "images", labels_of(table))
    return matched(known, found, folder / "partly" / "matches")


# The printed score is that of the files


@pytest.mark.parametrize("name", ["model", "plain", "partly"])
def test_the_printed_score_is_that_of_the_files(name, request):
    made: Matched = request.getfixturevalue(name)
    text = made.printed()
    rows = made.rows()
    for kind, lists in (("matches", made.matches), ("groups", made.groups)):
        means = made.means(lists)
        assert (rows[kind]["f1"], rows[kind]["precision"], rows[kind]["recall"]) == pytest.approx(
            means, abs=1e-5
        )
        (line,) = (one for one in text.splitlines() if one[2:28].strip() == kind)
        assert f"{means[0]:.4f}" in line
    alone = made.means({one: {one} for one in made.label})
    assert rows["self-match"]["f1"] == pytest.approx(alone[0], abs=1e-9)
    assert rows["matches"]["f1"] > alone[0]


def test_without_all_labels_matches_with_strangers_count_as_wrong(partly):
    unlabelled = sum(label == "" for label in partly.label.values())
    assert f"{unlabelled} postings have no label: of matches with them" in partly.printed()
    assert partly.decided["form"] == "pair model"


def test_the_score_of_the_chosen_threshold_is_that_of_the_val_items_in_the_file(model, plain):
    for made in (model, plain):
        assert made.decided["f1"] == pytest.approx(made.means(made.matches, "val")[0], abs=1e-9)
        assert made.decided["items"] == len(made.queries("val"))


def test_the_score_alone_beside_the_model_is_that_of_a_plain_match(model, plain):
    model.printed(), plain.printed()
    for key in ("f1", "precision", "recall", "threshold"):
        assert model.rows()["score alone"][key] == plain.rows()["matches"][key]


# Which form decides


def test_the_model_decides_where_val_products_show_a_gain(model, plain):
    assert model.decided["form"] == "pair model"
    assert model.decided["no_model"] is None
    assert model.decided["gain"]["low"] > 0
    alone = model.means({one: {one} for one in model.label}, "val")[0]
    over = model.decided["over_self_match"]
    assert over["f1"] == pytest.approx(model.decided["f1"] - alone, abs=1e-9)
    assert 0 < over["low"] < over["f1"] < over["high"]
    gained = model.decided["f1"] - plain.decided["f1"]
    assert model.decided["gain"]["f1"] == pytest.approx(gained, abs=1e-9)
    assert model.means(model.matches)[0] > plain.means(plain.matches)[0]
    assert model.means(model.groups)[0] > plain.means(plain.groups)[0]


def test_pairs_with_unlabelled_postings_are_fitted_as_other_products(partly):
    """By the part of them that counts as wrong at their score; of the rest nothing is known."""
    pair_set, accepted = PairSet(partly.pairs), partly.decided["score_threshold"]
    items = pair_set.embedding.read_items(["posting_id", "label_group", "split"])
    labels = CatalogueLabels.of(items.label_group)
    queries = np.flatnonzero((items.split == "val") & (items.label_group != ""))
    found = probable_pairs(pair_set, queries, labels, accepted, MatchConfig(), None)
    assert not isinstance(found, str)
    fold = np.full(len(items), -1)
    fold[queries] = pair_model.fold_of_products(items.label_group[queries].to_numpy(str))
    pairs, rows = [*zip(*found.candidates[:2], strict=True)], []
    for row, (i, j) in enumerate(pairs):
        if max(fold[i], fold[j]) >= 0:
            one, other = items.label_group[i], items.label_group[j]
            rows.append((row, one == other, not (one and other), fold[i], fold[j]))
    row, same, unknown, *folds = (np.array(column) for column in zip(*rows, strict=True))
    assert 100 < unknown.sum() < len(row)
    weight = np.ones(len(row))
    weight[unknown] = labels.wrong_shares(found.features.score[row], ~same & ~unknown, unknown)
    assert weight.min() < 0.5
    counts = found.model.fitted_on["queries"], found.model.fitted_on["products"]
    table, ends = found.features.of(row), np.stack(folds, axis=1)
    wanted = pair_model.fit(table, same, ends, weight, queries=counts[0], products=counts[1])
    written = pair_model.load(partly.folder / "pair_model.json")
    assert wanted == found.model == written


def test_plain_is_one_threshold_on_the_score(model, plain):
    assert plain.decided["form"] == "score"
    assert plain.decided["threshold"] == model.decided["score_threshold"]
    assert not (plain.folder / "pair_model.json").exists()
    assert (model.folder / "pair_model.json").exists()
    stored = pd.concat(pd.read_parquet(path) for path in (plain.pairs / "pairs").iterdir())
    accepted = (stored.score >= np.float32(plain.decided["threshold"])).sum()
    assert sum(len(found) - 1 for found in plain.matches.values()) == 2 * accepted > 0


def test_with_few_val_products_the_score_decides_and_says_why(table, folder):
    few = table[:150]
    made = matched(few, joined(few, folder / "few", folder / "images"), folder / "few" / "matches")
    products = Counter(made.label[one] for one in made.queries("val"))
    several = sum(size > 1 for size in products.values())
    assert 1 < several < 20
    assert made.decided["form"] == "score"
    assert "20 val products" in made.decided["no_model"]
    assert f"{several}" in made.decided["no_model"]
    assert not (made.folder / "pair_model.json").exists()
    made.printed()
    assert made.rows()["matches"]["f1"] == pytest.approx(made.means(made.matches)[0], abs=1e-9)


# Threads


def test_the_number_of_threads_changes_no_byte(model, tmp_path):
    out, here = tmp_path / "m", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    env = environment() | {"OMP_NUM_THREADS": "1" if here != "1" else "2"}
    subprocess.run(command(1, "match", model.pairs, "--out", out), env=env, cwd=ROOT, check=True)
    written = json.loads((model.folder / "manifest.json").read_text())["files"]
    assert {*FILES} < written.keys()
    for name in written:
        assert (out / name).read_bytes() == (model.folder / name).read_bytes(), name


# The model of another match


@pytest.fixture(scope="module")
def other(folder: Path) -> tuple[pd.DataFrame, Path]:
    """Another catalogue, with its truth, and its pairs, which know no label."""
    table = add_photos(postings(folder / "other" / "generated", 300, 2), folder / "other/images")
    hidden = table.assign(label_group="").drop(columns=["brand", "price"])
    return table, joined(hidden, folder / "other", folder / "other/images", labels_of(table))


def truly(table: pd.DataFrame, lists: LISTS) -> float:
    """Mean F1 of all postings by the truth."""
    label, sizes = labels_of(table), Counter(table.label_group)
    right = {one: sum(label[o] == label[one] for o in found) for one, found in lists.items()}
    return float(
        np.mean([2 * right[o] / (len(lists[o]) + sizes[label[o]]) for o in table.posting_id])
    )


def test_a_catalogue_without_labels_takes_the_model_and_threshold_of_another(model, other):
    table, found = other
    taken = matched(table, found, found.parent / "taken", "--threshold-from", model.folder)
    assert taken.decided["form"] == "pair model"
    assert taken.decided["source"] == "file"
    assert taken.decided["objective"] is None
    stored = json.loads((taken.folder / "stage.json").read_text())["config"]
    given = MatchConfig(threshold_from=model.folder)
    assert result_options(given).items() <= stored.items()  # so a run goes on with it
    assert taken.decided["threshold"] == model.decided["threshold"]
    assert taken.decided["items"] == 0
    ours, theirs = ((m.folder / "pair_model.json").read_bytes() for m in (taken, model))
    assert ours == theirs
    alone = truly(table, {one: {one} for one in taken.label})
    score = str(model.decided["score_threshold"])
    plain = matched(table, found, found.parent / "plain", "--threshold", score)
    assert truly(table, taken.matches) > truly(table, plain.matches) > alone
    assert truly(table, taken.groups) > alone


def test_a_given_model_on_the_same_catalogue_gives_its_matches(model, pairs, tmp_path):
    """Nearly: of val items each pair is judged by all boosters, not by those that have not seen it.
    The pairs of test and train items among themselves are judged as before."""
    out = tmp_path / "m"
    again = Matched(out, pairs, model.label)
    done("match", pairs, "--out", out, "--threshold-from", model.folder)
    assert again.decided["threshold"] == model.decided["threshold"]
    test = model.queries("test")
    same = sum(again.matches[one] == model.matches[one] for one in test)
    assert same > 0.9 * len(test)


def test_plain_takes_no_model_of_another_match_either(model, plain, pairs, tmp_path):
    out = tmp_path / "m"
    done("match", pairs, "--out", out, "--plain", "--threshold-from", model.folder)
    decided = json.loads((out / "threshold.json").read_text())
    assert decided["form"] == "score"
    assert decided["threshold"] == plain.decided["threshold"]
    assert not (out / "pair_model.json").exists()


@pytest.fixture(scope="module")
def texts(table: pd.DataFrame, folder: Path) -> Path:
    """The pairs of a part of the catalogue by its titles alone."""
    few = with_splits(table[:400]).assign(image="")
    return joined(few, folder / "texts", modalities=["text"])


def test_the_model_of_other_modalities_is_refused(model, texts, tmp_path):
    said = call("match", texts, "--out", tmp_path / "m", "--threshold-from", model.folder)
    assert said.code == 2, said.text
    assert "image" in said.text
    assert str(model.folder) in said.text
    assert not (tmp_path / "m").exists()


# Columns of the catalogue


@pytest.fixture(scope="module")
def with_columns(table: pd.DataFrame, pairs: Path, folder: Path) -> Matched:
    return matched(table, pairs, folder / "columns", "--features", "brand,price")


def test_columns_of_the_catalogue_are_compared(model, with_columns):
    features = pair_model.load(with_columns.folder / "pair_model.json").features
    assert {"feature_brand", "feature_price"} <= set(features)
    known = pair_model.load(model.folder / "pair_model.json").features
    assert set(features) - set(known) == {"feature_brand", "feature_price"}
    described = {*FEATURES, "feature_brand", "feature_price"}
    assert set(features) <= described
    # The price tells products apart as nothing else does here.
    assert with_columns.decided["f1"] > model.decided["f1"]


@pytest.mark.parametrize("name", ["colour", "label_group", "split", "row", "title"])
def test_what_is_no_column_of_the_catalogue_to_compare_is_refused(pairs, tmp_path, name):
    """The label is the answer itself, and the split is drawn by it."""
    said = call("match", pairs, "--out", tmp_path / "m", "--features", name)
    assert said.code == 2, said.text
    assert f"--features {name}" in said.text
    assert "brand, price" in said.text
    assert not (tmp_path / "m").exists()


def test_a_column_that_is_named_twice_is_compared_once(with_columns, tmp_path):
    options = ["--features", "brand", "--features", "brand", "--features", "price"]
    out = tmp_path / "m"
    done(
        "match", with_columns.pairs, "--out", out, "--threshold-from", with_columns.folder, *options
    )
    assert json.loads((out / "threshold.json").read_text())["form"] == "pair model"


def test_the_model_of_columns_that_are_not_compared_here_is_refused(with_columns, other, tmp_path):
    given = ("--threshold-from", with_columns.folder)
    said = call("match", with_columns.pairs, "--out", tmp_path / "m", *given)
    assert said.code == 2, said.text
    assert "feature_brand" in said.text
    assert str(with_columns.folder) in said.text
    assert not (tmp_path / "m").exists()  # before the work
    said = call("match", other[1], "--out", tmp_path / "m", "--features", "brand,price", *given)
    assert said.code == 2, said.text
    assert "--features brand" in said.text
    assert not (tmp_path / "m").exists()


# A precision to be reached


def test_a_wanted_precision_is_reached_on_val(table, pairs, model, folder):
    precise = matched(table, pairs, folder / "precise", "--precision", "0.999")
    _, precision, recall = precise.means(precise.matches, "val")
    assert precision >= 0.999
    _, precision_by_f1, recall_by_f1 = model.means(model.matches, "val")
    assert precision_by_f1 < 0.999, "the best F1 is as precise: this shows nothing"
    assert recall <= recall_by_f1
    assert recall > precise.means({one: {one} for one in precise.label}, "val")[2]
    assert "precision" in precise.decided["objective"]
    assert "0.999" in precise.decided["objective"]
    assert "0.999" not in model.decided["objective"]


# Links and the size of groups


def links(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [f"{one},{other}" for one, other in pairs]
    path.write_text("\n".join(["posting_id_1,posting_id_2", *rows, ""]))
    return path


@pytest.fixture
def again(model: Matched, tmp_path: Path):
    """The same match by its model, which needs no fit, with more options."""

    def match(*options: object, out: str = "m") -> Matched:
        given = ("--threshold-from", model.folder, *options)
        done("match", model.pairs, "--out", tmp_path / out, *given)
        return Matched(tmp_path / out, model.pairs, model.label)

    return match


@pytest.fixture
def strangers(model: Matched) -> tuple[str, str, str]:
    """A posting of each of three groups, the first of them of one posting alone."""
    of_size = sorted(model.groups, key=lambda one: len(model.groups[one]))
    alone, last = of_size[0], of_size[-1]
    middle = next(one for one in of_size if len(model.groups[one]) == 2)
    return alone, middle, last


def test_links_are_kept(model, again, strangers, tmp_path):
    alone, middle, last = strangers
    one, other = sorted(model.groups[last])[:2]
    together = links(tmp_path / "must.csv", (alone, middle), (middle, one))
    apart = links(tmp_path / "cannot.csv", (one, other))
    made = again("--must-link", together, "--cannot-link", apart)
    assert {alone, middle, one} <= made.groups[alone]
    assert other not in made.groups[one]
    # A link that the user gives is a match, too, or none.
    assert middle in made.matches[alone]
    assert alone in made.matches[middle]
    assert other not in made.matches[one]
    assert one not in made.matches[other]
    made.printed()
    assert made.rows()["matches"]["f1"] == pytest.approx(made.means(made.matches)[0], abs=1e-9)
    assert made.rows()["groups"]["f1"] == pytest.approx(made.means(made.groups)[0], abs=1e-9)
    # What the user has decided is neither explained nor to be reviewed.
    linked = [{alone, middle}, {middle, one}, {one, other}]
    base = again(out="base")
    tables = ("reasons.parquet", "variants.parquet", "review.parquet")
    for folder, expected in ((made.folder, False), (base.folder, True)):
        pairs = pd.concat([pd.read_parquet(folder / table) for table in tables])
        ends = map(set, zip(pairs.posting_id_1, pairs.posting_id_2, strict=True))
        assert any(pair in linked for pair in ends) is expected
    # Most of the groups are as they would be.
    same = sum(made.groups[name] == base.groups[name] for name in base.label)
    assert same > 0.9 * len(base.label)


def test_answered_pairs_make_room_for_others_to_review(again, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_tables, "LEAST_REVIEWED", 3)
    monkeypatch.setattr(pair_tables, "REVIEWED_PER_POSTING", 0)
    columns = ["posting_id_1", "posting_id_2"]
    first = pd.read_parquet(again(out="first").folder / "review.parquet")[columns]
    answers = links(tmp_path / "cannot.csv", *first.itertuples(index=False, name=None))
    made = again("--cannot-link", answers, out="second")
    second = pd.read_parquet(made.folder / "review.parquet")[columns]
    assert len(first) == len(second) == 3
    assert not len(first.merge(second))


def test_an_unknown_posting_in_a_link_is_named_with_its_row(model, strangers, tmp_path):
    for option in ("--must-link", "--cannot-link"):
        file = links(tmp_path / "some.csv", strangers[:2], (strangers[0], "nobody"))
        said = call("match", model.pairs, "--out", tmp_path / "m", option, file)
        assert said.code == 2, said.text
        for part in (str(file), "row 2", "'nobody'"):
            assert part in said.text
        assert not (tmp_path / "m").exists()


def test_links_that_contradict_one_another_are_named(model, strangers, tmp_path):
    a, b, c = strangers
    together = links(tmp_path / "must.csv", (a, b), (b, c))
    apart = links(tmp_path / "cannot.csv", (c, a))
    said = call("match", model.pairs, "--out", tmp_path / "m", "--must-link", together,
                "--cannot-link", apart)  # fmt: skip
    assert said.code == 2, said.text
    assert a in said.text
    assert c in said.text
    assert not (tmp_path / "m").exists()


def test_a_changed_file_of_links_is_another_set_of_options(again, model, strangers, tmp_path):
    a, b, c = strangers
    file = links(tmp_path / "must.csv", (a, b))
    made = again("--must-link", file)
    before = (made.folder / "groups.parquet").read_bytes()
    again("--must-link", file)  # done already
    links(file, (a, c))
    said = call("match", model.pairs, "--out", made.folder, "--threshold-from", model.folder,
                "--must-link", file)  # fmt: skip
    assert said.code == 2, said.text
    assert "links" in said.text
    assert (made.folder / "groups.parquet").read_bytes() == before


def test_links_hold_where_the_score_alone_decides_too(plain, strangers, tmp_path):
    several = max(plain.groups, key=lambda one: len(plain.groups[one]))
    one, other = sorted(plain.groups[several])[:2]
    made = Matched(tmp_path / "m", plain.pairs, plain.label)
    done("match", plain.pairs, "--out", made.folder, "--plain", "--must-link",
         links(tmp_path / "must.csv", strangers[:2]), "--cannot-link",
         links(tmp_path / "cannot.csv", (one, other)))  # fmt: skip
    assert strangers[1] in made.groups[strangers[0]]
    assert other not in made.groups[one]


def test_no_group_is_larger_than_the_cap(again, model):
    largest = max(map(len, model.groups.values()))
    assert largest > 3
    made = again("--max-group", 3)
    assert max(map(len, made.groups.values())) == 3
    assert max(map(len, again("--max-group", 1, out="one").groups.values())) == 1


def test_the_cap_is_twice_the_largest_labelled_product(model, table, folder):
    """Forty postings without a label that are alike in all ways would be one group."""
    product = labels_of(table)
    alike = table.iloc[[0] * 40].assign(
        posting_id=[f"copy{number}" for number in range(40)], label_group=""
    )
    more = pd.concat([table[:200], alike], ignore_index=True)
    product |= dict.fromkeys(alike.posting_id, table.label_group[0])
    known = {one: product[one] if one in set(table.posting_id) else "" for one in more.posting_id}
    found = joined(more, folder / "alike", folder / "images", product)
    most = 2 * max(Counter(label for label in known.values() if label).values())
    assert most < 40
    sizes = []
    for name, options in (("capped", []), ("free", ["--max-group", 100])):
        made = Matched(folder / "alike" / name, found, known)
        done("match", found, "--out", made.folder, "--threshold-from", model.folder, *options)
        sizes.append(max(map(len, made.groups.values())))
    assert sizes[0] <= most < sizes[1]


# Nothing of a label reaches its own score


def test_from_labels_by_chance_nothing_is_gained(table, folder):
    """A model that had seen the pairs that it is rated on would seem to gain."""
    split = with_splits(table)[:500]
    is_val = split.split == "val"
    drawn = split.label_group[is_val].sample(frac=1, random_state=0).to_numpy()
    shuffled = split.label_group.copy()
    shuffled[is_val] = drawn
    by_chance = split.assign(label_group=shuffled)
    found = joined(by_chance, folder / "chance", folder / "images", labels_of(split))
    said = done("match", found, "--out", folder / "chance" / "matches").text
    made = Matched(folder / "chance" / "matches", found, labels_of(by_chance))
    assert made.decided["form"] == "score"
    assert "no better" in made.decided["no_model"]
    alone = made.means({one: {one} for one in made.label}, "val")[0]
    assert made.decided["f1"] == pytest.approx(alone, abs=0.02)
    # Nor is any threshold better than no match at all.
    assert made.decided["over_self_match"]["low"] <= 0
    assert "the matches may be no better than no match at all" in said


def test_the_booster_of_a_fold_has_seen_no_label_of_its_products(table, folder):
    """Half of a val product gets another name that falls into the same fold."""
    split = with_splits(table)[:500].reset_index(drop=True)
    sizes = split.label_group[split.split == "val"].value_counts()
    label = str(sizes.index[0])
    fold = int(pair_model.fold_of_products(np.array([label]))[0])
    names = np.array([f"{label} again {number}" for number in range(100)])
    other = str(names[pair_model.fold_of_products(names) == fold][0])
    rows = np.flatnonzero(split.label_group == label)
    halved = split.copy()
    halved.loc[rows[::2], "label_group"] = other
    made = []
    for name, one in (("as-it-is", split), ("halved", halved)):
        found = joined(one, folder / name, folder / "images", labels_of(split))
        made.append(matched(one, found, folder / name / "matches"))
    rows_of = [pd.read_parquet(m.pairs.parent / "embedding/items.parquet").row for m in made]
    assert rows_of[0].tolist() == rows_of[1].tolist()
    # It decides which neighbours are averaged, so the features are the same only if it is.
    assert made[0].decided["score_threshold"] == made[1].decided["score_threshold"]
    before, after = (pair_model.load(m.folder / "pair_model.json").boosters for m in made)
    assert before[fold] == after[fold]
    assert all(before[one] != after[one] for one in range(pair_model.FOLDS) if one != fold)


# Hostile catalogues

HOSTILE = ("x" * 2000, "9", "🙂" * 40, "  ", "1234567890123", "\\xf0\\x9f", "'; DROP", "ﷺ" * 30)


def _titles_missing(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(title="")


def _photos_missing(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(image="")


def _some_missing(table: pd.DataFrame) -> pd.DataFrame:
    number = np.arange(len(table))
    title, image = table.title.where(number % 3 > 0, ""), table.image.where(number % 4 > 0, "")
    return table.assign(title=title, image=image)


def _titles_equal(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(title="promo murah 250 gr")


def _titles_hostile(table: pd.DataFrame) -> pd.DataFrame:
    number = np.arange(len(table))
    hostile = [HOSTILE[n % len(HOSTILE)] for n in number]
    return table.assign(title=np.where(number % 2 > 0, hostile, table.title))


@pytest.mark.parametrize(
    ("change", "modalities"),
    [
        (_titles_missing, ["image"]),
        (_photos_missing, ["text"]),
        (_some_missing, ["image", "text"]),
        (_titles_equal, ["image", "text"]),
        (_titles_hostile, ["text"]),
    ],
)
def test_a_catalogue_with_little_to_compare_is_matched_as_well_as_it_goes(
    table, folder, change, modalities
):
    changed = change(with_splits(table)[:400])
    at = folder / change.__name__
    found = joined(changed, at, folder / "images", labels_of(table), modalities)
    made = matched(changed, found, at / "matches")
    made.printed()
    rows = made.rows()
    assert rows["matches"]["f1"] == pytest.approx(made.means(made.matches)[0], abs=1e-9)
    assert rows["groups"]["f1"] == pytest.approx(made.means(made.groups)[0], abs=1e-9)
    for row in ("matches", "groups"):
        assert rows[row]["f1"] > rows["self-match"]["f1"]
    if made.decided["form"] == "pair model":
        assert rows["matches"]["f1"] > rows["score alone"]["f1"] - 0.02
