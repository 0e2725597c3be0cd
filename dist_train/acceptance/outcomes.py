"""How a check of the acceptance came out."""

from typing import NamedTuple


class Proof(NamedTuple):
    """The largest difference found, and the largest that is allowed."""

    difference: float
    allowed: float
    of: str


class Rate(NamedTuple):
    """A measured rate; `limit` in the same unit where it is known."""

    value: float
    unit: str
    limit: float | None = None
