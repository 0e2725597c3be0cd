"""Which items are scored, and what is known of the catalogue that they are matched with.

Scored are labelled items of one split without a near-duplicate in another split.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from shards.pack.items import UNLEARNED


def near_duplicates_across_splits(items: pd.DataFrame) -> pd.Series:
    """Which items (N,) have a near-duplicate photo in another split; bool, indexed as `items`.

    items: columns photo_group (below 0: no photo) and split. The photos of one photo group are
    near-duplicates, as pack found them. A missing split differs from none, nor does the
    unlabelled split: no encoder is trained on it, so a photo shared with it leaks nothing.
    """
    groups = items.photo_group.fillna(-1)
    known = items.split.where((groups >= 0) & ~items.split.isin(["", UNLEARNED]))
    return known.notna() & (known.groupby(groups).transform("nunique") > 1)


def labelled_rows(items: pd.DataFrame, split: str) -> np.ndarray:
    """Rows (n,) of `split` that have a label and no near-duplicate in another split, ascending.

    items: columns split, label_group and photo_group.
    """
    labelled = (items.split == split) & (items.label_group != "")
    return np.flatnonzero(labelled & ~near_duplicates_across_splits(items))


def scoring_obstacle(groups: np.ndarray) -> str:
    """Why no F1 of items of the label groups (n,) separates good matches from bad; "" if one does.

    Where every item is alone, matching nothing is perfect, and where all are one product, matching
    everything is.
    """
    products, sizes = np.unique(groups, return_counts=True)
    if not len(products):
        return "no item has a label_group"
    if sizes.max() < 2:
        return f"none of the {len(products)} products has two items, so no match can be right"
    return "all items are of one product, so no match can be wrong" if len(products) < 2 else ""


@dataclass(frozen=True)
class CatalogueLabels:
    """The labels of all M postings of a catalogue, against which delivered matches are counted.

    A match with a posting of another label is wrong, in whatever split that is. Of matches with
    postings without a label only their number is known: as many of them count as wrong as the
    wrong matches with labelled postings lead to expect, and no other counts at all.
    """

    codes: np.ndarray
    """(M,) int64 number of the label of each posting, -1 where it has none."""

    @classmethod
    def of(cls, label_group: pd.Series) -> "CatalogueLabels":
        """From the label of every posting, "" for none."""
        labels = label_group.astype(object)
        return cls(pd.factorize(labels.where(labels != ""))[0])

    @cached_property
    def sizes(self) -> np.ndarray:
        """(M,) int64 postings that have the label of each posting, 0 where it has none."""
        known = self.codes >= 0
        counts = np.bincount(self.codes[known], minlength=1)
        return np.where(known, counts[self.codes], 0)

    @cached_property
    def unlabelled_to_labelled(self) -> float:
        """Postings without a label to one with a label."""
        labelled = int((self.codes >= 0).sum())
        return (len(self.codes) - labelled) / max(labelled, 1)

    def wrong_shares(self, score: np.ndarray, wrong: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        """The part (U,) of each match with a posting without a label that counts as wrong, 0 to 1.

        For each wrong match with a labelled posting as many with others are expected to be wrong as
        there are such postings to a labelled one. The part that is wrong never rises with the
        score: isotonic regression of what is seen from the highest score down.
        score, wrong, unknown: (P,) of matches of the same items; wrong, unknown: bool, with a
        posting of another label, and with one of the U without. Multiples of 2^-20, so that sums
        are exact.
        """
        if not unknown.any():
            return np.zeros(0)
        seen = wrong | unknown
        level = np.unique(-score[seen], return_inverse=True)[1]  # 0 is the highest score
        seen_here = np.bincount(level)
        wrong_here = np.bincount(level, wrong[seen])
        known = isotonic_regression(wrong_here / seen_here, weights=seen_here).x
        # Where all that is seen is known to be wrong, there is no other match.
        expected = known * self.unlabelled_to_labelled / np.maximum(1 - known, 1e-9)
        return np.round(np.minimum(expected, 1)[level][unknown[seen]] * 2**20) / 2**20

    def counts_in_groups(
        self, queries: np.ndarray, group: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Right and wrong matches (n,) of labelled postings when equal groups are matches.

        queries: (n,) postings; group: (M,) int64 of every posting, below 0 for a posting alone.
        """
        table = pd.DataFrame({"group": group, "code": self.codes})[group >= 0]
        alike = table.groupby(["group", "code"]).code.transform("size")
        together = table.groupby("group").code.transform("size")
        labelled = (table.code >= 0).groupby(table.group).transform("sum")
        right, known, every = (
            column.reindex(queries, fill_value=1).to_numpy() - 1
            for column in (alike, labelled, together)
        )
        return right, self.with_unknown(known - right, every - known)

    def with_unknown(self, wrong: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        """Wrong matches (n,) of items, those with postings without a label among them.

        wrong: (n,) those with labelled postings; unknown: (n,) all with others, of which the same
        part counts as wrong whatever their scores.
        """
        expected = wrong.sum() * self.unlabelled_to_labelled / max(unknown.sum(), 1)
        return wrong + round(min(expected, 1) * 2**20) / 2**20 * unknown
