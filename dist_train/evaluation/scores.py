"""What metrics.json holds, and the same as a table of text.

Scores are of the files as they are delivered, where test postings are matched with the whole
catalogue, and then of matchers among the test items alone, as a competition prints them.
"""

from typing import Literal, NotRequired, TypedDict

import numpy as np

from dist_train.evaluation.metrics import GroupSizeScore, paired_difference

Kind = Literal["baseline", "modality", "compare", "groups", "ours"]
"""A trivial matcher, one modality of ours, an encoder to compare with, or what was decided."""


class MatcherScore(TypedDict):
    """Mean scores of one matcher over the same test items, with a 95 % interval of F1."""

    name: str
    kind: Kind
    f1: float
    low: float
    high: float
    precision: float
    recall: float
    threshold: float | None
    """None for a matcher without one."""
    items: int
    weight: NotRequired[float]
    """Weight of the first where two scores are fused."""


class Difference(TypedDict):
    """Mean F1 of the matcher `of` minus that of the matcher `over`, with its 95 % interval."""

    f1: float
    low: float
    high: float
    of: str
    over: str


def difference(
    ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, of: str, over: str
) -> Difference:
    """The gain of the matcher `of` over the matcher `over` on the same items.

    ours, theirs: (n,) F1 of each; groups: (n,) products of the items, which the interval draws.
    """
    f1, low, high = paired_difference(ours, theirs, groups)
    return {"f1": f1, "low": low, "high": high, "of": of, "over": over}


class Delivered(TypedDict):
    """Scores of matches.parquet and groups.parquet: test postings against the whole catalogue."""

    postings: int
    labelled: int
    """Postings with a label. Of matches with others as many count as wrong as the wrong matches
    with labelled ones lead to expect."""
    items: int
    """Labelled test postings, of so many products."""
    products: int
    largest_group: int
    """Postings of the largest group of groups.parquet, and of the product with most postings."""
    largest_product: int
    rows: list[MatcherScore]
    """The matches first, then the groups and the baselines."""
    differences: list[Difference]


class Scores(TypedDict):
    """metrics.json: the files as delivered; every matcher among the test items, ours last."""

    format: int
    delivered: Delivered
    split: str
    items: int
    products: int
    threshold: float
    left_out: int
    """Labelled items of the split with a near-duplicate in another split."""
    rows: list[MatcherScore]
    differences: list[Difference]
    by_group_size: list[GroupSizeScore]
    matches: NotRequired[str]
    """Fingerprint of the matches that are scored; added when it is written, as is `sha256`."""
    sha256: NotRequired[str]
    """That of all other keys: the manifest of the matches is older than the scores."""


def score_table(scores: Scores) -> str:
    """The files as delivered, then each matcher among the test items, as lines of text."""
    found, left_out = scores["delivered"], scores["left_out"]
    without = f", {left_out} with a photo of another split left out" if left_out else ""
    unknown = found["postings"] - found["labelled"]
    lines = [
        f"As delivered: mean F1 of {found['items']} test postings of {found['products']} products "
        f"never trained on, each matched with all {found['postings']} postings{without}",
        *_rows(found["rows"]),
        f"  the largest group has {found['largest_group']} postings, the largest product "
        f"{found['largest_product']}",
    ]
    if unknown:
        lines.append(
            f"  {unknown} postings have no label: of matches with them as many count as wrong as "
            "the wrong ones with labelled postings lead to expect"
        )
    lines += [
        "",
        f"Among the {scores['items']} test items alone, without the rest of the catalogue; "
        "thresholds of the others chosen among val items",
        *_rows(scores["rows"]),
    ]
    for row in scores["rows"]:
        if "weight" in row:
            lines.append(
                f"  {row['name']}: {row['weight']:.2f} of the first score, "
                f"{1 - row['weight']:.2f} of the second, chosen on val products"
            )
    lines += ["", "Differences in F1 on the same items, 95 % intervals paired by product"]
    differences = [
        (f"{row['of']} over {row['over']}, delivered", row) for row in found["differences"]
    ]
    differences += [(f"{row['of']} over {row['over']}", row) for row in scores["differences"]]
    widest = max((len(name) for name, _ in differences), default=0)
    for name, row in differences:
        interval = f"{row['low']:+.4f} – {row['high']:+.4f}"
        lines.append(f"  {name:{widest}}{row['f1']:+10.4f}  {interval}")
    return "\n".join(lines)


def _rows(rows: list[MatcherScore]) -> list[str]:
    """A heading and a line for each matcher."""
    lines = [
        f"{'':28}{'F1':>8}  {'95 % interval':^15}{'precision':>10}{'recall':>8}{'threshold':>11}"
    ]
    for row in rows:
        threshold = "" if row["threshold"] is None else f"{row['threshold']:.3f}"
        interval = f"{row['low']:.4f}–{row['high']:.4f}"
        mark = "*" if row["kind"] == "ours" else " "
        lines.append(
            f"{mark} {row['name']:26}{row['f1']:8.4f}  {interval:^15}{row['precision']:10.4f}"
            f"{row['recall']:8.4f}{threshold:>11}"
        )
    return lines
