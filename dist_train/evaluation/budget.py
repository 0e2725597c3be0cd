"""How many of the best pairs a curve over thresholds has to see."""

import logging

from dist_train.evaluation.groups import group_codes

LEAST = 100.0
"""Pairs an item; of products of few items far more than are true."""
MOST = 20_000_000
"""Pairs of more than LEAST an item: they are held in memory, some 100 bytes each."""
log = logging.getLogger(__name__)


def pairs_per_item(groups) -> float:
    """Pairs an item that hold the best threshold of a matcher that is of any use.

    Twice as many as are true, so that none is missed because wrong ones stand above it: a curve
    that ends before says that large products are found less well than they are.
    groups: (N,) label groups. Raises ValueError for an item without one.
    """
    sizes = group_codes(groups)[1]
    if not len(sizes):
        return LEAST
    # Of an item's n - 1 true pairs each is shared by two, so half of them are its own.
    wanted, most = max(LEAST, float((sizes - 1).mean())), max(LEAST, MOST / len(sizes))
    if wanted > most:
        log.warning("%d items with %.0f of their product in the mean: only the best %.0f pairs an "
                    "item are scored, F1 may be higher", len(sizes), wanted, most)  # fmt: skip
    return min(wanted, most)
