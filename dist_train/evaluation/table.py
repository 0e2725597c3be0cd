"""The table of scores as text."""

from typing import Any


def score_table(metrics: dict[str, Any]) -> str:
    """metrics.json as lines: each matcher with its scores and threshold, then their differences."""
    head = f"{'':28}{'F1':>8}  {'95 % interval':^15}{'precision':>10}{'recall':>8}{'threshold':>11}"
    lines = [_title(metrics), "", head]
    for row in metrics["rows"]:
        threshold = "" if row["threshold"] is None else f"{row['threshold']:.3f}"
        interval = f"{row['low']:.4f}–{row['high']:.4f}"
        mark = "*" if row["kind"] == "ours" else " "
        lines.append(
            f"{mark} {row['name']:26}{row['f1']:8.4f}  {interval:^15}{row['precision']:10.4f}"
            f"{row['recall']:8.4f}{threshold:>11}"
        )
    return "\n".join([*lines, *_weights(metrics), *_differences(metrics)])


def _weights(metrics: dict[str, Any]) -> list[str]:
    return [
        f"  {row['name']}: {row['weight']:.2f} of the first score, {1 - row['weight']:.2f} of the "
        "second, chosen on val products"
        for row in metrics["rows"] if "weight" in row
    ]  # fmt: skip


def _differences(metrics: dict[str, Any]) -> list[str]:
    if not metrics["differences"]:
        return []
    width = max(len(f"{row['of']} over {row['over']}") for row in metrics["differences"])
    lines = ["", "Differences in F1 on the same items, 95 % intervals paired by product"]
    for row in metrics["differences"]:
        name = f"{row['of']} over {row['over']}"
        interval = f"{row['low']:+.4f} – {row['high']:+.4f}"
        lines.append(f"  {name:{width}}{row['f1']:+10.4f}  {interval}")
    return lines


def _title(metrics: dict[str, Any]) -> str:
    left_out = metrics["left_out"]
    twins = f", {left_out} with a photo of another split left out" if left_out else ""
    return (
        f"Mean per-item F1 on {metrics['items']} test items of {metrics['products']} products "
        f"never trained on{twins}; thresholds chosen on val products"
    )
