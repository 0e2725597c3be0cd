"""Groups by average linkage: the merges of one run, the groups at any cut, the best cut, links.

Two clusters are as close as the mean probability of the pairs between them, where a pair that is
no candidate counts 0. The closest two are merged, until the closest are below a cut.

A merge makes no pair of clusters closer than the merged two were: a mean of two means is at most
the greater, and a merge that size or a link forbids stays forbidden when its clusters grow. So the
means fall from merge to merge, and one run down to the lowest cut has the groups of every cut
(reducible linkage: Müllner 2011, Modern hierarchical, agglomerative clustering algorithms).
"""

from collections import defaultdict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dist_train.decisions.groups import Groups
from dist_train.evaluation.labelled import CatalogueLabels
from dist_train.evaluation.metrics import scores_of_counts
from shards.catalogue.readers import (
    KINDS,
    SEPARATORS,
    TextTable,
    json_chunks,
    kind_of,
    parquet_chunks,
)
from shards.catalogue.rows import UNREADABLE
from shards.storage.errors import BadInput

STEP = 2.0**-24
"""Probabilities and cuts are rounded to multiples of this. The float64 sums of up to 2^29 of them
are exact, so that a mean does not depend on the order of the additions."""
CUTS = tuple(count / 20 for count in range(1, 19))
"""0.05 to 0.9, of which the best is chosen."""
LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Means at which a run pauses. The components of pairs of so high a probability are small, and
what they merge is one node at the next level: this only saves time."""
NO_LINKS = np.zeros((0, 2), np.int64)
LINK_COLUMNS = ["posting_id_1", "posting_id_2"]


class Merges(NamedTuple):
    """The merges (G,) of a run by falling mean, and where means are equal by their first items."""

    first: np.ndarray
    """The first items of the two clusters, the lower one here."""
    second: np.ndarray
    mean: np.ndarray
    """Mean probability between the two; infinite where a link puts them together."""
    least: float
    """The run ended at this mean."""


def merges(
    items: int,
    i: np.ndarray,
    j: np.ndarray,
    probability: np.ndarray,
    least: float,
    most: int | None = None,
    together: np.ndarray = NO_LINKS,
    apart: np.ndarray = NO_LINKS,
) -> Merges:
    """Average linkage of `items` down to a mean of `least`, which is above 0.

    It is exact over the given pairs; where all below a probability p are left out, means are lower
    by less than p. Of equal means, the merge of lower first items is done first.
    i, j: the pairs (P,), each once, in any order; probability: (P,) in 0…1; most: a merge that
    would give a group more items is not done; together (M, 2), apart (K, 2): pairs of items that
    are in one group, whatever `most` is, and that never are. Raises BadInput if these contradict.
    """
    check_links(items, together, apart)
    least, limit = float(_rounded(least)), items if most is None else most
    # Items that were put together are one node, of which the first item is kept, and the size.
    group = _groups(items, *together.T)
    first = np.unique(group, return_index=True)[1]
    size = np.bincount(group)
    linked = np.flatnonzero(first[group] < np.arange(items))
    done = [(first[group[linked]], linked, np.full(len(linked), np.inf))]
    a, b = np.r_[i, apart[:, 0]], np.r_[j, apart[:, 1]]
    sums = np.r_[_rounded(probability), np.full(len(apart), -np.inf)]
    for level in [*(level for level in LEVELS if level > least), least]:
        a, b, sums = _contract(group, a, b, sums)
        sizes, found = size.tolist(), []
        for edges in _components(a, b, sums, size, level):
            found += _merge_component(*edges, sizes, level, limit)
        one, other, mean = np.array(found or np.zeros((0, 3))).T
        one, other = one.astype(np.int64), other.astype(np.int64)
        done.append((first[one], first[other], mean))
        group = _groups(len(size), one, other)
        first = first[np.unique(group, return_index=True)[1]]
        size = np.bincount(group, size).astype(np.int64)
    one, other, mean = map(np.concatenate, zip(*done, strict=True))
    order = np.lexsort((other, one, -mean))
    return Merges(one[order], other[order], mean[order], least)


def _rounded(value: float | np.ndarray) -> np.ndarray:
    return np.rint(np.asarray(value, np.float64) / STEP) * STEP


def _groups(items: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Group number (N,) of each item when the pairs (P,) are joined, by their first items."""
    groups = Groups(items)
    groups.join(i, j)
    return groups.numbers()


def _contract(
    group: np.ndarray, a: np.ndarray, b: np.ndarray, sums: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges (P,) between nodes as those between groups (V,) of nodes, a < b, each once."""
    one, other = group[a], group[b]
    between = one != other
    low, high = np.minimum(one, other)[between], np.maximum(one, other)[between]
    graph = coo_matrix((sums[between], (low, high)), (len(group), len(group)))
    edges = graph.tocsr().tocoo()
    return edges.row, edges.col, edges.data


def _components(
    a: np.ndarray, b: np.ndarray, sums: np.ndarray, size: np.ndarray, least: float
) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """The edges (P,) of each connected component of close nodes, whose mean is `least` or more.

    No two clusters of different components are close, as their mean is at most that of their
    closest nodes: the edges between components are left out, and of the others all are here.
    size: (V,) items of the nodes.
    """
    close = sums / (size[a] * size[b]) >= least
    links = coo_matrix((close[close], (a[close], b[close])), (len(size), len(size)))
    component = connected_components(links, directed=False)[1]
    inside = np.flatnonzero(component[a] == component[b])
    inside = inside[np.argsort(component[a[inside]], kind="stable")]
    a, b, sums = a[inside], b[inside], sums[inside]
    ends = np.flatnonzero(np.diff(component[a], prepend=-1, append=-1))
    for start, end in pairwise(ends):
        yield a[start:end].tolist(), b[start:end].tolist(), sums[start:end].tolist()


def _merge_component(
    a: list[int], b: list[int], sums: list[float], size: list[int], least: float, limit: int
) -> Iterator[tuple[int, int, float]]:
    """Merge the closest two clusters until all are farther; a cluster is named by its first node.

    Yields the two and their mean; `size`, the items of each node, is brought up to date.
    """
    near: dict[int, dict[int, float]] = defaultdict(dict)
    for one, other, total in zip(a, b, sums, strict=True):
        near[one][other] = near[other][one] = total

    def candidates(pairs: Iterator[tuple[int, int, float]]) -> Iterator[tuple[float, int, int]]:
        for one, other, total in pairs:
            mean = total / (size[one] * size[other])
            if mean >= least and size[one] + size[other] <= limit:
                yield -mean, one, other

    heap = list(candidates(zip(a, b, sums, strict=True)))
    heapify(heap)
    while heap:
        mean, one, other = heappop(heap)
        # An entry from before one of its clusters grew stays in the heap, the new one is there too.
        items = size[one] + size[other]
        is_current = near.get(one, {}).get(other, 0.0) / (size[one] * size[other]) == -mean
        if not is_current or items > limit:
            continue
        yield one, other, -mean
        size[one] = items
        row = near[one]
        del row[other]
        for third, total in near.pop(other).items():
            if third != one:
                del near[third][other]
                row[third] = near[third][one] = row.get(third, 0.0) + total
        pairs = ((min(one, third), max(one, third), total) for third, total in row.items())
        for entry in candidates(pairs):
            heappush(heap, entry)


def groups_at(merges: Merges, items: int, cut: float) -> np.ndarray:
    """Group number (N,) int64 of each item, by its first item, as a run with least=cut gives it.

    Raises ValueError for a cut below that of the run.
    """
    cut = float(_rounded(cut))
    if cut < merges.least:
        raise ValueError(f"merges end at {merges.least}, there are no groups at {cut}")
    done = merges.mean >= cut
    return _groups(items, merges.first[done], merges.second[done])


def choose_cut(merges: Merges, queries: np.ndarray, labels: CatalogueLabels) -> tuple[float, float]:
    """The cut of CUTS with the best mean F1 of some items in their groups, and that F1.

    The highest of equally good ones; none is below the end of the run. Counted as for the file
    that is delivered: of the complete group of an item, strangers of all splits included.
    queries: rows (n,) of labelled items, n > 0; labels: of all postings, the items first.
    """
    rated = []
    for cut in CUTS:
        if _rounded(cut) >= merges.least:
            group = groups_at(merges, len(labels.codes), cut)
            right, wrong = labels.counts_in_groups(queries, group)
            scores = scores_of_counts(right, wrong, labels.sizes[queries])
            rated.append((float(scores[0].mean()), cut))
    f1, cut = max(rated)
    return cut, f1


def read_links(path: Path, posting_ids: pd.Series) -> np.ndarray:
    """Pairs of rows i < j (M, 2) int64 from a CSV, TSV, Parquet or JSON Lines of posting ids.

    Its columns posting_id_1 and posting_id_2 count, others do not. posting_ids: (N,) of each row.
    Raises BadInput naming the row, counted from 1, where an id is not among these or is linked
    with itself, and for a file that cannot be read.
    """
    table = _read_ids(path)
    rows = np.stack([pd.Index(posting_ids).get_indexer(table[name]) for name in LINK_COLUMNS], 1)
    unknown, same = np.flatnonzero((rows < 0).any(1)), np.flatnonzero(rows[:, 0] == rows[:, 1])
    if len(unknown):
        name = LINK_COLUMNS[int(rows[unknown[0], 0] >= 0)]
        raise BadInput(
            f"{path}: row {unknown[0] + 1}: {name} {table[name].iloc[unknown[0]]!r} is not a "
            f"posting_id of the catalogue ({len(unknown)} such rows); correct it or drop the row"
        )
    if len(same):
        raise BadInput(
            f"{path}: row {same[0] + 1}: posting {table[LINK_COLUMNS[0]].iloc[same[0]]!r} is "
            f"linked with itself ({len(same)} such rows); correct it or drop the row"
        )
    return np.sort(rows, axis=1).astype(np.int64)


def _read_ids(path: Path) -> pd.DataFrame:
    """LINK_COLUMNS of a file as text, empty where a value is missing; BadInput if not readable."""
    kind = kind_of(path)
    if kind not in KINDS or not path.is_file():
        raise BadInput(f"{path}: no file of one of the kinds {', '.join(KINDS)}")
    try:
        if kind in SEPARATORS:
            text = TextTable.of(path, LINK_COLUMNS)
            text.check_cells()
            chunks = text.chunks()
        else:
            chunks = json_chunks(path) if kind == ".jsonl" else parquet_chunks(path)
        table = pd.concat([pd.DataFrame(), *chunks], ignore_index=True)
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: cannot be read ({reason})") from None
    if kind == ".jsonl" and table.empty:  # it has no names without a row
        return pd.DataFrame(columns=LINK_COLUMNS, dtype=str)
    if missing := [name for name in LINK_COLUMNS if name not in table]:
        raise BadInput(
            f"{path}: no column {missing[0]} (found: {', '.join(map(str, table))}); its first "
            f"line is to be {','.join(LINK_COLUMNS)}"
        )
    ids = table[LINK_COLUMNS].astype(object)
    # Whole numbers that a missing value beside them has made floats are text without ".0".
    ids = ids.map(lambda one: int(one) if isinstance(one, float) and one.is_integer() else one)
    return ids.where(ids.notna(), "").astype(str)


def check_links(
    items: int, together: np.ndarray, apart: np.ndarray, posting_ids: pd.Series | None = None
) -> None:
    """Raise BadInput naming two items that are linked as apart and, if by others, as together.

    They are named by their rows where `posting_ids` (N,) is not given.
    together: (M, 2), apart: (K, 2) rows.
    """
    group = _groups(items, *together.T)
    wrong = np.flatnonzero(group[apart[:, 0]] == group[apart[:, 1]])
    if len(wrong):
        one, other = apart[wrong[0]]
        names = f"the postings of rows {one} and {other}"
        if posting_ids is not None:
            names = f"postings {posting_ids.iloc[one]!r} and {posting_ids.iloc[other]!r}"
        raise BadInput(
            f"{names} are linked as never in one group and, directly or through others, as in one "
            f"group ({len(wrong)} such pairs); drop one of the links"
        )
