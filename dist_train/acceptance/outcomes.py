"""Results of the checks."""

from dataclasses import dataclass
from typing import NamedTuple


class Proof(NamedTuple):
    """The largest difference from a reference, and the largest that is allowed."""

    difference: float
    allowed: float
    what: str


class Rate(NamedTuple):
    """A measured rate; `limit` in the same unit if it is known."""

    value: float
    unit: str
    limit: float | None = None


@dataclass(frozen=True)
class Result:
    """One line of the table: a check, whether it passed, its value beside its limit, seconds."""

    name: str
    passed: bool
    message: str
    value: float = float("nan")
    unit: str = ""
    limit: float | None = None
    seconds: float = 0.0
