"""Ways to do one thing, timed against each other in rounds; the last line printed is JSON."""

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any


def seconds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of this process for each way in each round.

    Every round runs every way once, each time beginning with another one, so that what else the
    machine does meets all of them; the first round is not counted (caches, imports).
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            begun = time.process_time()
            ways[name]()
            if number:
                taken[name].append(time.process_time() - begun)
    return taken


def faster(taken: dict[str, list[float]], ours: str, peer: str) -> float:
    """How many times faster `ours` is than `peer`: the median of the rounds' ratios."""
    return median(b / a for a, b in zip(taken[ours], taken[peer], strict=True))


def report(benchmark: str, items: int, taken: dict[str, list[float]], rows: list[dict]) -> None:
    """Print rows {ours, peer, wanted, psnr ...} with their ratios, and all of it as JSON."""
    rate = {name: items / median(found) for name, found in taken.items()}
    for row in rows:
        row["ratio"] = faster(taken, row["ours"], row["peer"])
        row["ours_per_second"], row["peer_per_second"] = rate[row["ours"]], rate[row["peer"]]
        line = f"{row['ours']}: {row['ours_per_second']:,.0f}/s; "
        line += f"{row['peer']}: {row['peer_per_second']:,.0f}/s; x {row['ratio']:.2f}"
        if row.get("wanted"):
            line += f" (wanted x {row['wanted']})"
        if row.get("psnr"):
            line += f", {row['psnr']:.1f} dB (wanted {row['wanted_psnr']})"
        print(line)
    print(json.dumps({"benchmark": benchmark, "items": items, "rows": rows}))
