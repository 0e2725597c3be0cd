"""What photo groups say about labels and splits: photos that stand where they should not."""

from typing import Any

import numpy as np
import pandas as pd

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


def label_noise(items: pd.DataFrame) -> pd.DataFrame:
    """The postings of photo groups that stand in several label groups, group by group.

    items: columns posting_id, label_group, photo_group; the rows with a twin are enough. One
    photo cannot show two products, so either a label is wrong or a seller took another's photo.
    """
    noisy = differs_within(items.photo_group.to_numpy(), codes(items.label_group))
    return items.loc[noisy, list(COLUMNS)].sort_values("photo_group", kind="stable")


def twin_counts(items: pd.DataFrame) -> dict[str, Any]:
    """Photo groups of two postings and more, those of noisy labels, postings across splits.

    items: columns posting_id, label_group, split, photo_group; the rows with a twin are enough.
    """
    groups = items.photo_group.to_numpy()
    noise = label_noise(items)
    size = pd.Series(groups[groups >= 0]).value_counts()
    return {
        "photo_groups": int((size > 1).sum()),
        "postings": int(size[size > 1].sum()),
        "largest": int(size.max()) if len(size) else 0,
        "noise_groups": int(noise.photo_group.nunique()),
        "noise_postings": len(noise),
        "across_splits": int(differs_within(groups, codes(items.split, UNLEARNED)).sum()),
    }


def told(counts: dict[str, Any], noise: pd.DataFrame, where: Any) -> str:
    """`twin_counts` for a person, with the first rows of `label_noise`, which lies in `where`."""
    if not counts["postings"]:
        return "no photo stands twice"
    lines = [
        f"{counts['postings']} postings share {counts['photo_groups']} photos with others, "
        f"{counts['across_splits']} of them across splits: scores leave those out"
    ]
    if counts["noise_groups"]:
        lines.append(f"{counts['noise_groups']} photos stand in several label groups, "
                     f"{counts['noise_postings']} postings: see {where}")  # fmt: skip
    for _, postings in list(noise.groupby("photo_group"))[:EXAMPLES]:
        names = [f"{p.posting_id} ({p.label_group})" for p in postings[:EXAMPLES].itertuples()]
        more = len(postings) - len(names)
        lines.append("  " + ", ".join([*names, *([f"{more} more"] if more else [])]))
    return "\n".join(lines)


def codes(values: pd.Series, unknown: str = "") -> np.ndarray:
    """(N,) int64: distinct texts as 0, 1, ...; -1 for a missing or empty one and for `unknown`."""
    values = values.astype(object)
    return pd.factorize(values.mask(values.isin(["", unknown])))[0]
