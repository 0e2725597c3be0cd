"""What is read from titles: two tables with right answers, and what holds of any title."""

import csv
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.decisions.quantities import (
    FEATURES,
    GROUPS,
    NAMES,
    compare,
    features,
    parse,
    tabulate,
)
from dist_train.decisions.quantity_units import KINDS, UNITS, Role


def table(name: str) -> list[list[str]]:
    with (Path(__file__).parent / name).open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


PAIRS, TITLES = table("quantity_pairs.csv"), table("quantity_titles.csv")
ALL = sorted({title for a, b, _ in PAIRS for title in (a, b)} | {title for title, _ in TITLES})
WORDS = sorted({word for title in ALL for word in title.split()})
ANY_TITLE = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(max_size=40)


def test_titles_are_read_as_the_table_says():
    wrong = []
    for title, expected in TITLES:
        read = sorted(str(q) for q in parse(title) if q.role != Role.WEAK)
        if read != sorted(expected.split(", ") if expected else []):
            wrong.append(f"{title!r}: {', '.join(read) or 'nothing'}, not {expected or 'nothing'}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(TITLES)} titles", *wrong])


def test_pairs_compare_as_the_table_says():
    """Kinds that a row does not name neither agree nor conflict."""
    wrong = []
    for a, b, relations in PAIRS:
        expected = dict(relation.split() for relation in relations.split(", ") if relation)
        got = {
            kind: relation
            for kind, relation in compare(parse(a), parse(b)).items()
            if kind in expected or relation in ("equal", "conflict")
        }
        if got != expected:
            wrong.append(f"{a!r} and {b!r}: {got}, not {relations or 'nothing'}")
    assert len(PAIRS) >= 200
    assert not wrong, "\n".join([f"{len(wrong)} of {len(PAIRS)} pairs", *wrong])


def test_features_of_pairs_are_what_compare_says():
    """All pairs of the table, and each title beside some others."""
    of = {title: row for row, title in enumerate(ALL)}
    rows = [(of[a], of[b]) for a, b, _ in PAIRS]
    rows += [(row, (row * step + 7) % len(ALL)) for row in range(len(ALL)) for step in (1, 3, 8)]
    i, j = np.array(rows).T
    got = features(tabulate(ALL), i, j)
    assert list(got.columns) == list(FEATURES)
    assert set(got.dtypes) == {np.dtype(np.int8)}
    parsed = [parse(title) for title in ALL]
    for row, (a, b) in enumerate(rows):
        relations = compare(parsed[a], parsed[b])
        expected = dict.fromkeys(FEATURES, 0)
        for group, kind in ((name, kind) for name, kinds in GROUPS.items() for kind in kinds):
            for name, relation in product((group, "quantities"), ("equal", "conflict")):
                word = {"equal": "shared", "conflict": "conflicting"}[relation]
                expected[f"{name}_{word}"] += relations[kind] == relation
            expected["quantities_one_sided"] += relations[kind] == "one-sided"
        for name, kind in NAMES.items():
            stated, guessed = [], []
            for quantities in (parsed[a], parsed[b]):
                of_kind = [q for q in quantities if q.kind == ("model" if kind == "stem" else kind)]
                stated.append({(q.name, q.low) for q in of_kind if q.role != Role.WEAK})
                guessed.append({(q.name, q.low) for q in of_kind if q.role == Role.WEAK})
            if kind == "stem":
                stems = [{re.sub("[a-z]*$", "", name) for name, _ in names} for names in stated]
                stated, guessed = [{s for s in of if len(s) > 3} for of in stems], [set(), set()]
            shared = len(stated[0] & (stated[1] | guessed[1])) + len(guessed[0] & stated[1])
            expected[f"{name}_shared"] = shared
            expected[f"{name}_conflicting"] = max(0, min(map(len, stated)) - shared)
        assert got.iloc[row].to_dict() == expected, (ALL[a], ALL[b])


def test_features_do_not_depend_on_blocks_or_order(monkeypatch):
    read = tabulate(ALL)
    rows = np.arange(len(ALL))
    i, j = np.repeat(rows, 5), np.tile(rows, 5)
    whole = features(read, i, j)
    assert features(read, j, i).equals(whole)
    monkeypatch.setattr("dist_train.decisions.quantities._BLOCK", 100)
    monkeypatch.setattr("dist_train.decisions.quantities._MOST_VALUES", 10)
    assert features(read, i, j).equals(whole)
    assert len(features(tabulate([]), i[:0], j[:0])) == 0


def test_units_are_read_with_and_without_a_space_in_either_case():
    """But for the few spellings whose meaning hangs on their surroundings."""
    for unit in set(UNITS) - {"s", "in", "'", "a"}:
        written = [f"barang 250{gap}{name}" for gap in ("", " ") for name in (unit, unit.upper())]
        read = [parse(title) for title in written]
        assert read == read[:1] * 4, unit
        assert not read[0] or read[0][0].kind not in ("model", "number"), unit


def test_case_and_spacing_do_not_matter():
    for title in ALL:
        spaced = "\t " + title.upper().replace(" ", " \u00a0 ") + " "
        assert parse(spaced) == parse(title) == parse(title.lower()), title


@given(ANY_TITLE, ANY_TITLE)
@settings(max_examples=300, deadline=None)
def test_compare_is_symmetric_and_no_title_conflicts_with_itself(a, b):
    of_a, of_b = parse(a), parse(b)
    assert compare(of_a, of_b) == compare(of_b, of_a)
    assert set(compare(of_a, of_a)) == set(KINDS)
    assert set(compare(of_a, of_a).values()) <= {"equal", "absent"}


ABSURD = ["9" * 5000, "1-" + "9" * 900 + " cm", "1.000" * 150, "1 x " * 250, "x" * 10**6, "|'@"]


@pytest.mark.parametrize("title", ABSURD)
def test_absurd_titles_are_read(title):
    assert set(compare(parse(title), parse(title)).values()) <= {"equal", "absent"}
