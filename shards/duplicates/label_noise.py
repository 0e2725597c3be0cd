"""Evidence of wrong labels and leaks in photo groups: one photo in several products or splits."""

from itertools import islice
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

COLUMNS = ("photo_group", "posting_id", "label_group")
UNLEARNED = "unlabelled"
"""The split that nothing is learned from, so that a photo shared with it leaks nothing."""
EXAMPLES = 3


class NearDuplicates(TypedDict):
    """Counts of the photo groups of two postings or more.

    `largest` are the postings of the largest group. The noise_ counts are of groups with several
    labels and of their labelled postings; `across_splits` counts postings of groups in several
    splits, without those of the unlabelled split.
    """

    photo_groups: int
    postings: int
    largest: int
    noise_groups: int
    noise_postings: int
    across_splits: int


def differs_within(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) bool: rows of a photo group that holds several values (N,); below 0 is unknown."""
    known = (groups >= 0) & (values >= 0)
    within = pd.Series(values[known]).groupby(groups[known])
    differs = np.zeros(len(groups), dtype=bool)
    differs[known] = (within.transform("min") != within.transform("max")).to_numpy()
    return differs


def codes(values: pd.Series, unknown: str = "") -> np.ndarray:
    """(N,) int64: distinct texts as 0, 1, ...; -1 for a missing or empty one and for `unknown`."""
    values = values.astype(object)
    return pd.factorize(values.mask(values.isin(["", unknown])))[0]


def describe_near_duplicates(counts: NearDuplicates, noise: Path) -> str:
    """The counts in a few lines, with the first groups of label_noise.parquet at `noise`."""
    if not counts["postings"]:
        return "no photo stands twice"
    lines = [
        f"{counts['postings']} postings share {counts['photo_groups']} photos with others, "
        f"{counts['across_splits']} of them across splits: scores leave those out"
    ]
    if counts["noise_groups"]:
        lines.append(
            f"{counts['noise_groups']} photos stand in several label groups, "
            f"{counts['noise_postings']} postings: see {noise}"
        )
    with pq.ParquetFile(noise) as file:
        groups = file.num_row_groups
        first = file.read_row_group(0).to_pandas() if groups else pd.DataFrame(columns=COLUMNS)
    for _, postings in islice(first.groupby("photo_group"), EXAMPLES):
        names = [f"{p.posting_id} ({p.label_group})" for p in postings[:EXAMPLES].itertuples()]
        more = len(postings) - len(names)
        lines.append("  " + ", ".join([*names, *([f"{more} more"] if more else [])]))
    return "\n".join(lines)
