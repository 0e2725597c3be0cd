"""What is read from titles: two tables with right answers, and properties of any title."""

import csv
from pathlib import Path

from dist_train.decisions.quantities import compare, parse
from dist_train.decisions.quantity_units import KINDS, Role

HERE = Path(__file__).parent


def table(name: str) -> list[tuple[str, ...]]:
    with (HERE / name).open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


PAIRS, TITLES = table("quantity_pairs.csv"), table("quantity_titles.csv")


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
        got = compare(parse(a), parse(b))
        found = {
            kind: got[kind]
            for kind in KINDS
            if got[kind] != expected.get(kind, got[kind])
            or (kind not in expected and got[kind] in ("equal", "conflict"))
        }
        if found:
            wrong.append(f"{a!r} and {b!r}: {found}, not {relations or 'nothing'}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(PAIRS)} pairs", *wrong])
