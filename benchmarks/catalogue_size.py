"""Does a threshold chosen with few labels fit a larger catalogue? (not a test):

    python -m benchmarks.catalogue_size runs/large/pairs

Of a catalogue of N postings an eighth, n, keeps its labels, by products. Beside them stand 0, n,
3 n and 7 n further postings, whose labels are not shown. Scored are all test postings as delivered
in the catalogue of that size, by all labels. Three thresholds of the score alone: chosen among the
val items of the n alone, chosen by matching these with the catalogue as `match` does, and the best
one of the test postings themselves, which nobody could know. Then, for all N postings, the second
and the third of the pair model, fitted on the labels of the n.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.decisions.probabilities import probable_pairs
from dist_train.decisions.threshold import Given, QueryMatches, decide_threshold
from dist_train.evaluation.f1_curve import f1_curve, f1_curve_of_queries
from dist_train.evaluation.labelled import CatalogueLabels, labelled_rows
from dist_train.matching.pairs import PairSet

TIMES = (1, 2, 4, 8)
COLUMNS = ["label_group", "split", "photo_group"]


class Catalogue:
    """The items of a pairs directory whose products come first by a hash, about `share` of all."""

    def __init__(self, items: pd.DataFrame, pairs: pd.DataFrame, shown: float, share: float):
        hashes = pd.util.hash_array(items.label_group.to_numpy(object), hash_key="catalogue size  ")
        place = hashes / 2.0**64
        self.rows = np.flatnonzero(place < share)
        self.items = items.iloc[self.rows].reset_index(drop=True)
        new = np.full(len(items), -1)
        new[self.rows] = np.arange(len(self.rows))
        inside = pairs[(new[pairs.i] >= 0) & (new[pairs.j] >= 0)]
        self.pairs = inside.assign(i=new[inside.i], j=new[inside.j])
        self.is_shown = place[self.rows] < shown
        self.labels = CatalogueLabels.of(self.items.label_group)
        self.shown_labels = CatalogueLabels(np.where(self.is_shown, self.labels.codes, -1))
        self.val, self.test = (labelled_rows(self.items, split) for split in ("val", "test"))
        self.val = self.val[self.is_shown[self.val]]

    def chosen_alone(self) -> float:
        """The best threshold of the val items among themselves."""
        new = np.full(len(self.items), -1)
        new[self.val] = np.arange(len(self.val))
        i, j = new[self.pairs.i], new[self.pairs.j]
        both = (i >= 0) & (j >= 0)
        groups = self.items.label_group.to_numpy(object)[self.val]
        return f1_curve(groups, i[both], j[both], self.pairs.score.to_numpy()[both]).best()[0]

    def chosen(self, pairs: pd.DataFrame) -> float:
        """The threshold that `match` chooses, of the scores of these pairs."""
        matches = QueryMatches.of(self.val, self.shown_labels, pairs)
        given = Given(None, "chosen")
        return decide_threshold(self.val, self.shown_labels, matches, 0.0, given)["threshold"]

    def test_matches(self, pairs: pd.DataFrame) -> QueryMatches:
        return QueryMatches.of(self.test, self.labels, pairs)

    def best(self, pairs: pd.DataFrame) -> float:
        """The best threshold of the test items, of the scores of these pairs."""
        found, sizes = self.test_matches(pairs), self.labels.sizes[self.test]
        return f1_curve_of_queries(sizes, *found).best()[0]

    def f1(self, pairs: pd.DataFrame, threshold: float) -> str:
        sizes = self.labels.sizes[self.test]
        f1 = self.test_matches(pairs).f1(threshold, sizes)
        return f"{f1.mean():.4f} at {threshold:.4f}"


def measure(path: Path) -> None:
    """Print the table of a pairs directory."""
    pair_set = PairSet(path)
    items, pairs = pair_set.embedding.read_items(COLUMNS), pair_set.select()
    print(f"\n{path}: {len(items)} items, score floor {pair_set.score_floor:.3f}\n")
    print("| | postings | test items | among val items alone | with the catalogue | best |")
    print("|---|---:|---:|---:|---:|---:|")
    for times in TIMES:
        cut = Catalogue(items, pairs, 1 / TIMES[-1], times / TIMES[-1])
        thresholds = (cut.chosen_alone(), cut.chosen(cut.pairs), cut.best(cut.pairs))
        cells = [cut.f1(cut.pairs, threshold) for threshold in thresholds]
        sizes = f"{len(cut.items)} | {len(cut.test)}"
        print(f"| score alone, {times} n | {sizes} | {' | '.join(cells)} |", flush=True)
    accepted, config = thresholds[1], MatchConfig()
    model = probable_pairs(pair_set, cut.val, cut.shown_labels, accepted, config, None)
    if isinstance(model, str):
        print(model)
        return
    probable = model.of_items(np.ones(len(items), bool))
    cells = [
        cut.f1(probable, threshold) for threshold in (cut.chosen(probable), cut.best(probable))
    ]
    print(f"| pair model, {times} n | {sizes} | | {' | '.join(cells)} |")


def main() -> None:
    """Measure each pairs directory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.catalogue_size")
    parser.add_argument("pairs", type=Path, nargs="+", help="folders that join has written")
    for path in parser.parse_args().pairs:
        measure(path)


if __name__ == "__main__":
    main()
