"""What each kind of knowledge adds to the matches of finished pairs directories (not a test):

    python -m benchmarks.decisions demo/pairs runs/quality/abt_buy/pairs

A ladder from one threshold on the score to the groups, at the defaults of `match` and by its
functions: every step is fitted on the val items, the probabilities of their pairs out of fold, and
has its threshold chosen on them. Scored is what would be delivered: every match of a test posting,
of whatever split it is. All steps of the pair model decide about the same candidate pairs, so the
first of them has what the candidates add as well. The features of all pairs are held in memory.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.config.options import MatchConfig
from dist_train.decisions.candidates import Candidates, find_candidates, recall_by_source
from dist_train.decisions.features import PairFeatures
from dist_train.decisions.grouping import Links, group_rows
from dist_train.decisions.pair_model import PairModel, fit, fitting_obstacle, fold_of_products
from dist_train.decisions.probabilities import ProbablePairs
from dist_train.decisions.threshold import Given, QueryMatches, decide_threshold, queries_of
from dist_train.decisions.title_vectors import title_vectors
from dist_train.evaluation.labelled import CatalogueLabels, labelled_rows
from dist_train.evaluation.metrics import bootstrap_interval, paired_difference, scores_of_counts
from dist_train.matching.pairs import PairSet
from dist_train.matching.vectors import open_vectors

SCORES = ("score", "score_image", "score_text")
TITLES = ("words", "characters", "title_words_min", "title_words_difference")
NEIGHBOURS = ("averaged", "_gap_", "_rank_", "_mean_")
"""Parts of the names of features that come from other candidates of the two items."""


def steps_of(names: list[str]) -> dict[str, list[str]]:
    """The features of each step of the pair model, those of the steps before among them."""
    scores = [name for name in names if name in SCORES]
    titles = scores + [name for name in names if name in TITLES]
    neighbours = [name for name in names if any(part in name for part in NEIGHBOURS)]
    return {
        "pair model of the scores": scores,
        "+ titles": titles,
        "+ neighbours": titles + neighbours,
        "+ quantities, sizes, colours, model numbers, photo hash": names,
    }


@dataclass
class Ladder:
    """The steps of one pairs directory, each with the F1 (n,) of the test postings."""

    path: Path
    f1: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pair_set = PairSet(self.path)
        embedding = self.pair_set.embedding
        self.items = embedding.read_items(["title", "phash", "photo_group", "label_group", "split"])
        columns = ["label_group", "split", "photo_group"]
        postings = embedding.read_items(columns, with_rejected=True)
        self.labels = CatalogueLabels.of(postings.label_group)
        self.queries = queries_of(self.items, self.pair_set.proof["pairs"])
        self.test = labelled_rows(postings, "test")
        self.codes, self.sizes = self.labels.codes[self.test], self.labels.sizes[self.test]
        self.begun = time.process_time()

    def taken(self) -> float:
        """CPU seconds since the last call."""
        before, self.begun = self.begun, time.process_time()
        return self.begun - before

    def add(self, name: str, f1: np.ndarray) -> None:
        """Print the row of a step with what it gains over the one before."""
        seconds = self.taken()
        low, high = bootstrap_interval(f1, self.codes)
        gain = ""
        if self.f1:
            mean, *interval = paired_difference(f1, self.f1[-1], self.codes)
            gain = f"{mean:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"
        print(f"| {name} | {f1.mean():.4f} | {low:.3f} – {high:.3f} | {gain} | {seconds:.1f} |")
        self.f1.append(f1)
        self.begun = time.process_time()

    def decide(self, pairs: pd.DataFrame, score_floor: float) -> tuple[float, np.ndarray]:
        """The threshold that val items choose, and the F1 (n,) of the test postings at it.

        pairs: columns i, j and score of all pairs of val items and of test postings.
        """
        of_val = QueryMatches.of(self.queries, self.labels, pairs)
        given = Given(None, "chosen")
        decided = decide_threshold(self.queries, self.labels, of_val, score_floor, given)
        of_test = QueryMatches.of(self.test, self.labels, pairs)
        f1 = of_test.f1(decided["threshold"], self.sizes)
        return decided["threshold"], f1

    def counted(self, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        """F1 (n,) of the test postings by their right and wrong matches (n,)."""
        return scores_of_counts(right, wrong, self.sizes)[0]

    def candidates(self) -> tuple[Candidates, PairFeatures]:
        """The candidate pairs and their features, after the row of the score alone."""
        wanted = np.zeros(len(self.items), bool)
        wanted[self.queries] = wanted[self.test[self.test < len(wanted)]] = True
        pairs = self.pair_set.select(lambda i, j: wanted[i] | wanted[j])
        threshold, f1 = self.decide(pairs, self.pair_set.score_floor)
        self.add("score alone", f1)
        weights, items = self.pair_set.weights, self.items
        vectors = open_vectors(self.pair_set.embedding, list(weights), weights.get("image", 0.0))
        titles = title_vectors(items.title.fillna("").tolist())
        photo_group = items.photo_group.fillna(-1).to_numpy(np.int64)
        k = MatchConfig().candidates
        found = find_candidates(self.pair_set, vectors, titles, photo_group, k)
        self.note = f"{len(found.i)} candidate pairs in {self.taken():.1f} CPU s"
        features = PairFeatures(items, vectors, titles, found.i, found.j, threshold)
        return found, features

    def climb(self) -> None:
        """Print all rows, and what else is known of the catalogue."""
        print(f"\n{self.path}: {len(self.labels.codes)} postings, {len(self.test)} test postings")
        print(
            "\n| | F1 | 95 % interval | over the step before | CPU s |\n|---|---:|:---:|:---:|---:|"
        )
        found, features = self.candidates()
        table = features.of(slice(None))
        self.note += f", {table.shape[1]} features in {self.taken():.1f}"
        fold = np.full(len(self.items), -1, np.int8)
        fold[self.queries] = fold_of_products(self.items.label_group[self.queries].to_numpy(str))
        folds = np.stack([fold[found.i], fold[found.j]], axis=1)
        pairs, before = pd.DataFrame({"i": found.i, "j": found.j}), []
        for name, columns in steps_of(features.names).items():
            if len(columns) == len(before):
                continue  # this catalogue has no source of what the step adds
            model = self.fitted(table[columns], found, folds)
            probability, before = model.probabilities(table[columns], folds), columns
            threshold, f1 = self.decide(pairs.assign(score=probability), 0.0)
            self.add(name, f1)
        batches = ProbablePairs(found, probability, features, model).batches()
        group, cut = group_rows(batches, threshold, self.queries, self.labels, None, Links())
        self.add("groups", self.counted(*self.labels.counts_in_groups(self.test, group)))
        alone = np.zeros(len(self.test), np.int64)
        recall = recall_by_source(found, self.labels.codes[: len(self.items)])
        print(f"\nself-match {self.counted(alone, alone).mean():.4f}; {self.note}")
        print(f"largest group {np.bincount(group).max()} of cut {cut}", end=", ")
        print(f"largest product {self.labels.sizes.max()}")
        print("recall:", ", ".join(f"{name} {share:.4f}" for name, share in recall.items()))

    def fitted(self, table: pd.DataFrame, found: Candidates, folds: np.ndarray) -> PairModel:
        """The pair model of these features, fitted as `match` does; SystemExit where it can't."""
        codes = self.labels.codes
        known = (folds >= 0).any(axis=1) & (codes[found.i] >= 0) & (codes[found.j] >= 0)
        same = (codes[found.i] == codes[found.j])[known]
        sizes = np.unique(codes[self.queries], return_counts=True)[1]
        if obstacle := fitting_obstacle(int((sizes > 1).sum()), same, folds[known]):
            raise SystemExit(f"{self.path}: {obstacle}")
        counts = {"queries": len(self.queries), "products": len(sizes)}
        return fit(table[known], same, folds[known], **counts)


def main() -> None:
    """Print the ladder of each pairs directory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions")
    parser.add_argument("pairs", type=Path, nargs="+", help="folders that join has written")
    for path in parser.parse_args().pairs:
        Ladder(path).climb()


if __name__ == "__main__":
    main()
