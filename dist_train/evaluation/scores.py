"""What metrics.json holds, and the same as a table of text."""

from typing import Literal, NotRequired, TypedDict

from dist_train.evaluation.metrics import GroupSizeScore

Kind = Literal["baseline", "modality", "compare", "ours"]
"""A trivial matcher, one modality of ours, an encoder to compare with, or the decided matches."""


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


class Scores(TypedDict):
    """metrics.json: every matcher on the same items, the decided matches last."""

    format: int
    split: str
    items: int
    products: int
    threshold: float
    left_out: int
    """Labelled items of the split with a near-duplicate in another split."""
    rows: list[MatcherScore]
    differences: list[Difference]
    by_group_size: list[GroupSizeScore]


def score_table(scores: Scores) -> str:
    """Each matcher with its scores and threshold, then the differences, as lines of text."""
    left_out = scores["left_out"]
    without = f", {left_out} with a photo of another split left out" if left_out else ""
    lines = [
        f"Mean per-item F1 on {scores['items']} test items of {scores['products']} products never "
        f"trained on{without}; thresholds chosen on val products",
        "",
        f"{'':28}{'F1':>8}  {'95 % interval':^15}{'precision':>10}{'recall':>8}{'threshold':>11}",
    ]
    for row in scores["rows"]:
        threshold = "" if row["threshold"] is None else f"{row['threshold']:.3f}"
        interval = f"{row['low']:.4f}–{row['high']:.4f}"
        mark = "*" if row["kind"] == "ours" else " "
        lines.append(
            f"{mark} {row['name']:26}{row['f1']:8.4f}  {interval:^15}{row['precision']:10.4f}"
            f"{row['recall']:8.4f}{threshold:>11}"
        )
    for row in scores["rows"]:
        if "weight" in row:
            lines.append(
                f"  {row['name']}: {row['weight']:.2f} of the first score, "
                f"{1 - row['weight']:.2f} of the second, chosen on val products"
            )
    lines += ["", "Differences in F1 on the same items, 95 % intervals paired by product"]
    names = [f"{row['of']} over {row['over']}" for row in scores["differences"]]
    for name, row in zip(names, scores["differences"], strict=True):
        interval = f"{row['low']:+.4f} – {row['high']:+.4f}"
        lines.append(f"  {name:{max(map(len, names))}}{row['f1']:+10.4f}  {interval}")
    return "\n".join(lines)
