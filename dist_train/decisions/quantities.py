"""What titles say in numbers: quantities in base units, sizes, model numbers and colours.

`parse` reads one title, Indonesian or English (its words and units are in quantity_units.py);
`compare` says of two titles, kind by kind, whether they agree; `tabulate` reads many and
`features` compares millions of pairs of them by arrays.

A point or comma before exactly three digits separates thousands for small units ("1.000 ml" is a
litre, "2.500gr" 2.5 kg) and is decimal for large ones, which are seldom sold by the thousand
("1.000 kg" is 1 kg, "1.500 l" 1.5 l), and after a zero ("0.250 g"). Every other point or comma is
decimal. Prices, dates, discounts, gifts and warranties state nothing. docs/design/quantities.md has
the rules and what is not read.
"""

from array import array
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from dist_train.decisions.quantity_reader import Reader
from dist_train.decisions.quantity_units import KINDS, Quantity, Role

Quantities = tuple[Quantity, ...]
Relation = Literal["equal", "conflict", "one-sided", "absent"]

LONGEST = 1000
"""Characters of a title that are read."""
SAME_RANGE = 0.7
_BLOCK = 1 << 16
_MOST_VALUES = 1 << 22
"""Pairs of titles, and of values, that are compared at once."""
_ROLES_AGREE = np.ones((len(Role), len(Role)), bool)
_ROLES_AGREE[Role.SINGLE, Role.TOTAL] = _ROLES_AGREE[Role.TOTAL, Role.SINGLE] = False
_ROLES_AGREE[Role.WEAK, Role.WEAK] = False

GROUPS = {
    "amounts": ("mass", "volume"),
    "lengths": ("length", "dimensions", "screen"),
    "memory": ("storage", "ram"),
    "ratings": (
        *("power", "voltage", "current", "charge", "frequency", "horsepower", "megapixel"),
        *("percent", "spf", "age", "layers", "grammage"),
    ),
    "counts": ("count",),
    "sizes": ("clothing_size", "number_size"),
}
"""Kinds whose relations are counted together."""
NAMES = {
    "colours": "colour",
    "model_numbers": "model",
    "model_stems": "stem",
    "numbers": "number",
}
"""Kinds of which a title may well state several, so that their values are counted. A stem is a
model number without the letters at its end, often a colour or a market: "lrbp1031" of
lrbp1031wh and lrbp1031w."""

FEATURES = {
    **{f"{group}_shared": f"Kinds that agree, of {', '.join(of)}." for group, of in GROUPS.items()},
    **{
        f"{group}_conflicting": f"Kinds that conflict, of {', '.join(of)}."
        for group, of in GROUPS.items()
    },
    **{
        f"{name}_shared": f"Values of {kind} that both titles state."
        for name, kind in NAMES.items()
    },
    **{
        f"{name}_conflicting": f"Values of {kind} that the title with fewer of them has alone."
        for name, kind in NAMES.items()
    },
    "quantities_shared": "Kinds of all groups that agree.",
    "quantities_conflicting": "Kinds of all groups that conflict.",
    "quantities_one_sided": "Kinds of all groups that one title alone states.",
}
"""The columns of `features` and what each counts, all int8."""


def parse(title: str) -> Quantities:
    """All that a title states, sorted, each once; its escapes and entities are decoded before."""
    return tuple(sorted(set(Reader(title[:LONGEST]).read())))


def compare(a: Quantities, b: Quantities) -> dict[str, Relation]:
    """How two titles stand to each other, for each of KINDS.

    equal: they share a value. conflict: both state the kind and share none. A multipack agrees by
    its total or by its single piece, never one's total with the other's piece; one piece alone
    beside a multipack of it is a conflict of count. A range agrees with a value inside it, and
    with a range that shares SAME_RANGE of what the two cover.
    """
    relations: dict[str, Relation] = {}
    lone_piece = False
    for kind in KINDS:
        of_a, of_b = [q for q in a if q.kind == kind], [q for q in b if q.kind == kind]
        agreed = [{x.role, y.role} for x in of_a for y in of_b if _agree(x, y)]
        stated = sum(any(q.role != Role.WEAK for q in side) for side in (of_a, of_b))
        relations[kind] = "equal" if agreed else ("absent", "one-sided", "conflict")[stated]
        lone_piece |= kind in GROUPS["amounts"] and {Role.SINGLE, Role.PLAIN} in agreed
    if lone_piece and relations["count"] == "one-sided":
        relations["count"] = "conflict"
    return relations


def _agree(x: Quantity, y: Quantity) -> bool:
    if x.name != y.name or not _ROLES_AGREE[x.role, y.role]:
        return False
    if x.role == y.role == Role.RANGE:
        common = min(x.high[0], y.high[0]) - max(x.low[0], y.low[0])
        return common >= SAME_RANGE * (max(x.high[0], y.high[0]) - min(x.low[0], y.low[0]))
    sides = zip(x.low, x.high, y.low, y.high, strict=True)
    return all(a <= d and c <= b for a, b, c, d in sides)


class Column(NamedTuple):
    """The V values of one kind in N titles."""

    start: np.ndarray
    """(N + 1,) the values of title t are start[t] to start[t + 1]."""
    low: np.ndarray
    """(V, sides); the code of a name, low and high alike."""
    high: np.ndarray
    role: np.ndarray
    stated: np.ndarray
    """(N,) how many values of a title are no guess."""


QuantityTable = dict[str, Column]


def tabulate(titles: Sequence[str]) -> QuantityTable:
    """The quantities of N titles by kind; 75 to 85 s on one core, 200 MB for a million."""
    codes: dict[str, int] = {}
    found = {kind: (array("i"), array("b"), array("d"), array("d")) for kind in (*KINDS, "stem")}
    for t, title in enumerate(titles):
        quantities = parse(title)
        for quantity in [*quantities, *_stems(quantities)]:
            of, role, low, high = found[quantity.kind]
            of.append(t)
            role.append(quantity.role)
            if quantity.name:
                code = codes.setdefault(quantity.name, len(codes))
                low.append(code)
                high.append(code)
            else:
                low.extend(quantity.low)
                high.extend(quantity.high)
    return {kind: _column(len(titles), *map(np.array, arrays)) for kind, arrays in found.items()}


def _stems(quantities: Quantities) -> set[Quantity]:
    models = [q for q in quantities if q.kind == "model" and q.role != Role.WEAK]
    names = (q.name.rstrip(ascii_lowercase) for q in models)
    return {Quantity("stem", (), (), name) for name in names if len(name) >= 4}


def _column(
    N: int, title: np.ndarray, role: np.ndarray, low: np.ndarray, high: np.ndarray
) -> Column:
    start = np.searchsorted(title, np.arange(N + 1)).astype(np.int32)
    stated = np.bincount(title[role != Role.WEAK], minlength=N).astype(np.int16)
    shape = (len(title), -1 if len(title) else 1)
    return Column(start, low.reshape(shape), high.reshape(shape), role, stated)


def features(table: QuantityTable, i: np.ndarray, j: np.ndarray) -> pd.DataFrame:
    """The columns FEATURES of P pairs of titles, given by row; symmetric in i and j.

    A million pairs take some 0.5 s on one core; work is bounded, so memory does not grow with P.
    """
    blocks = [_features(table, i[:0], j[:0])]
    for at in range(0, len(i), _BLOCK):
        blocks.append(_features(table, i[at : at + _BLOCK], j[at : at + _BLOCK]))
    return pd.DataFrame({name: np.concatenate([b[name] for b in blocks]) for name in FEATURES})


def _features(table: QuantityTable, i: np.ndarray, j: np.ndarray) -> dict[str, np.ndarray]:
    columns = {name: np.zeros(len(i), np.int8) for name in FEATURES}
    lone_piece = np.zeros(len(i), bool)
    for group, kind in ((group, kind) for group, kinds in GROUPS.items() for kind in kinds):
        shared, lone = _shared(table[kind], i, j)
        stated = (table[kind].stated[i] > 0) + (table[kind].stated[j] > 0).astype(np.int8)
        lone_piece |= lone if group == "amounts" else False
        equal, conflicting = shared > 0, stated == 2
        if kind == "count":
            conflicting |= lone_piece & (stated == 1)
        conflicting &= ~equal
        for name in (group, "quantities"):
            columns[f"{name}_shared"] += equal
            columns[f"{name}_conflicting"] += conflicting
        columns["quantities_one_sided"] += (stated == 1) & ~equal & ~conflicting
    for name, kind in NAMES.items():
        shared, _ = _shared(table[kind], i, j)
        fewer = np.minimum(table[kind].stated[i], table[kind].stated[j])
        columns[f"{name}_shared"] += np.minimum(shared, 127).astype(np.int8)
        columns[f"{name}_conflicting"] += np.clip(fewer - shared, 0, 127).astype(np.int8)
    return columns


def _shared(column: Column, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many values of a kind agree in each pair; whether one piece meets a multipack of it."""
    counts_i, counts_j = (column.start[t + 1] - column.start[t] for t in (i, j))
    both = np.flatnonzero((counts_i > 0) & (counts_j > 0))
    counts_i, counts_j = counts_i[both], counts_j[both]
    combined = counts_i * counts_j
    if combined.sum() > _MOST_VALUES and len(i) > 1:
        half = len(i) // 2
        halves = (_shared(column, i[:half], j[:half]), _shared(column, i[half:], j[half:]))
        return np.concatenate([h[0] for h in halves]), np.concatenate([h[1] for h in halves])
    pair, width = np.repeat(both, combined), np.repeat(counts_j, combined)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(combined) - combined, combined)
    x, y = column.start[i[pair]] + within // width, column.start[j[pair]] + within % width
    role_x, role_y = column.role[x], column.role[y]
    low = np.maximum(column.low[x], column.low[y])
    high = np.minimum(column.high[x], column.high[y])
    agree = _ROLES_AGREE[role_x, role_y] & (low <= high).all(axis=1)
    ranges = np.flatnonzero((role_x == Role.RANGE) & (role_y == Role.RANGE))
    covered = np.maximum(column.high[x[ranges]], column.high[y[ranges]])
    covered -= np.minimum(column.low[x[ranges]], column.low[y[ranges]])
    agree[ranges] = (high[ranges] - low[ranges] >= SAME_RANGE * covered).all(axis=1)
    roles = np.sort([role_x, role_y], axis=0)
    lone = np.zeros(len(i), bool)
    lone[pair[agree & (roles[0] == Role.PLAIN) & (roles[1] == Role.SINGLE)]] = True
    return np.bincount(pair[agree], minlength=len(i)), lone
