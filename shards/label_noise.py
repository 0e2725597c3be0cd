"""What photo groups say about labels and splits: photos that stand where they should not."""

from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

COLUMNS = ("photo_group", "posting_id", "label_group")
UNLEARNED = "unlabelled"
"""The split of which nothing is learned, so that a photo shared with it gives nothing away."""
EXAMPLES = 3


def differs_within(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(N,) bool: rows of a photo group that holds two values (N,) or more; below 0 is unknown."""
    known = (groups >= 0) & (values >= 0)
    within = pd.Series(values[known]).groupby(groups[known])
    differs = np.zeros(len(groups), dtype=bool)
    differs[known] = (within.transform("min") != within.transform("max")).to_numpy()
    return differs


def told(counts: dict[str, int], where: Path) -> str:
    """The `counts` of twins for a person, with the first rows of label_noise.parquet at `where`."""
    if not counts["postings"]:
        return "no photo stands twice"
    lines = [
        f"{counts['postings']} postings share {counts['photo_groups']} photos with others, "
        f"{counts['across_splits']} of them across splits: scores leave those out"
    ]
    if counts["noise_groups"]:
        lines.append(f"{counts['noise_groups']} photos stand in several label groups, "
                     f"{counts['noise_postings']} postings: see {where}")  # fmt: skip
    for _, postings in islice(_first(where).groupby("photo_group"), EXAMPLES):
        names = [f"{p.posting_id} ({p.label_group})" for p in postings[:EXAMPLES].itertuples()]
        more = len(postings) - len(names)
        lines.append("  " + ", ".join([*names, *([f"{more} more"] if more else [])]))
    return "\n".join(lines)


def _first(noise: Path) -> pd.DataFrame:
    with pq.ParquetFile(noise) as file:
        if not file.num_row_groups:
            return pd.DataFrame(columns=COLUMNS)
        return file.read_row_group(0).to_pandas()


def codes(values: pd.Series, unknown: str = "") -> np.ndarray:
    """(N,) int64: distinct texts as 0, 1, ...; -1 for a missing or empty one and for `unknown`."""
    values = values.astype(object)
    return pd.factorize(values.mask(values.isin(["", unknown])))[0]
