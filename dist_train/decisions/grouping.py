"""The groups of a match: postings that its pairs and the links of the user put together."""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.decisions.groups import Groups
from dist_train.decisions.linkage import (
    CUTS,
    NO_LINKS,
    check_links,
    choose_cut,
    groups_at,
    merges,
    read_links,
)
from dist_train.evaluation.labelled import CatalogueLabels
from dist_train.matching.pairs import no_pairs

LEAST = 0.01
"""Pairs that are less probable count as 0: means fall by less than this."""
MOST_PAIRS = 8_000_000
"""Pairs that are linked by their means: where all are in one component, memory holds some 500 bytes
of each."""
HALF = 0.5
"""The cut where no labelled item shows a better one."""
log = logging.getLogger(__name__)


class Links(NamedTuple):
    """Rows of postings, the items by vector row first, that the user linked."""

    together: np.ndarray = NO_LINKS
    """(M, 2) always in one group."""
    apart: np.ndarray = NO_LINKS
    """(K, 2) never in one group."""


def links_of(posting_ids: pd.Series, config: MatchConfig) -> Links:
    """Read the files of links between postings (N,).

    Raises BadInput for unknown postings and for contradictions.
    """
    files = (config.must_link, config.cannot_link)
    links = Links(*(NO_LINKS if file is None else read_links(file, posting_ids) for file in files))
    check_links(len(posting_ids), *links, posting_ids)
    return links


def linked_matches(batches: Iterable[pd.DataFrame], links: Links) -> Iterator[pd.DataFrame]:
    """The matches, without the pairs that are never in one group and with those that always are.

    batches: columns i, j (i < j) and score; that of a pair that a link makes a match is 1.
    """
    together = pd.MultiIndex.from_arrays(links.together.T).unique()
    apart = pd.MultiIndex.from_arrays(links.apart.T)
    linked = together.append(apart)
    for batch in batches:
        pairs = pd.MultiIndex.from_frame(batch[["i", "j"]]) if len(linked) else None
        yield batch if pairs is None else batch[~pairs.isin(linked)]
    i, j = (together.get_level_values(level).to_numpy(np.int64) for level in (0, 1))
    yield pd.DataFrame({"i": i, "j": j, "score": np.ones(len(i), np.float32)})


def group_rows(
    batches: Iterable[pd.DataFrame],
    accepted: float,
    queries: np.ndarray,
    labels: CatalogueLabels,
    most: int | None,
    links: Links,
) -> tuple[np.ndarray, float | None]:
    """Group number (M,) of each posting, the items by vector row first, and the chosen cut.

    Average linkage, cut where val queries have the best mean F1 in their groups. Of more than
    MOST_PAIRS pairs only the matches count; where these are more too, the groups are their
    connected components, without a cut.
    batches: columns i, j and score, the probability of each pair; accepted: that of a match;
    queries: (n,) rows of val items; labels: of all postings; most: postings of a group, twice those
    of the largest product if None.
    """
    names, rows, least = ("i", "j", "score"), len(labels.codes), LEAST
    found, left = [no_pairs(names)], iter(batches)
    for batch in left:
        found.append(batch.loc[batch.score >= np.float32(least), list(names)])
        if sum(map(len, found)) > MOST_PAIRS and least < accepted:
            least = accepted
            found = [kept[kept.score >= np.float32(least)] for kept in found]
        if sum(map(len, found)) > MOST_PAIRS:
            return _components(chain(found, left), accepted, rows, links), None
    i, j, score = (np.concatenate([batch[name].to_numpy() for batch in found]) for name in names)
    if most is None and labels.sizes.any():
        most = 2 * int(labels.sizes.max())
    done = merges(rows, i, j, score, CUTS[0], most, *links)
    cut = choose_cut(done, queries, labels)[0] if len(queries) else HALF
    return groups_at(done, rows, cut), cut


def _components(
    batches: Iterable[pd.DataFrame], accepted: float, rows: int, links: Links
) -> np.ndarray:
    """Group number (M,) of each posting: connected components of the matches and of `together`."""
    groups, apart = Groups(rows), links.apart @ [rows, 1]
    groups.join(*links.together.T)
    for batch in batches:
        matches = batch[batch.score >= np.float32(accepted)]
        matches = matches[~np.isin(matches.i * rows + matches.j, apart)]
        groups.join(matches.i.to_numpy(), matches.j.to_numpy())
    numbers = groups.numbers()
    broken = int((numbers[links.apart[:, 0]] == numbers[links.apart[:, 1]]).sum())
    log.warning(
        "groups are connected components of the matches, of any size: more than "
        f"{MOST_PAIRS} pairs are too many for average linkage; give a higher threshold for smaller "
        "groups"
        + (f"; {broken} pairs that must not be in one group are, through others" * (broken > 0))
    )
    return numbers
