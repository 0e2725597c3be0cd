"""What a cell holds: the missing values of other programs are empty, and the label 17.0 is 17."""

import re

MISSING = frozenset(
    ("null", "(null)", "[null]", "<null>", "none", "nan", "nat", "<na>", "n/a", "#n/a", "\\n")
)
"""What programs write for a missing value, in small letters: nobody's photo, title or label."""
NO_LABEL = MISSING | {"na", "n.a.", "n/d", "nil", "-1", "-", "--", "?", "#value!", "#ref!"}
NO_LABEL |= {"undefined", "unknown", "missing", "unlabelled", "unlabeled", "no label", "no_label"}
INTEGER = re.compile(r"([+-]?[0-9]+)\.0+")
CUT_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?[eE]\+?[0-9]+")
"""8.99123E+12, as spreadsheets show 8991234567890: numbers of other last digits look the same."""


def value_of(text: str) -> str:
    """The text of a cell; empty where it is a placeholder of MISSING."""
    return "" if text.strip().lower() in MISSING else text


def label_of(text: str) -> str:
    """The label group that a cell names; empty where it is blank or a placeholder of NO_LABEL.

    pandas writes the whole numbers of a column as 17.0 as soon as one is missing.
    """
    name = text.strip()
    if integer := INTEGER.fullmatch(name):
        text = name = integer[1]
    return "" if not name or name.lower() in NO_LABEL else text
