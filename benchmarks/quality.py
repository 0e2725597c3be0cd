"""How much training gains on real data, measured by the verbs a user types (not a test):

    python -m benchmarks.quality grocery --out runs/quality
    python -m benchmarks.quality offers --out runs/quality

`grocery`: photos alone, launch/recipes/grocery.yaml from three seeds. `offers`: titles alone,
launch/recipes/offers.yaml on Abt-Buy and on Amazon-Google. The data is the folder that
DIST_TRAIN_DATA names; the same command goes on where it was stopped. Further options go to
`dist-train run`, to try another setting: --seeds 0 --image.head.margin 0.5.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.decisions.score import Comparison
from dist_train.embedding.store import EmbeddingSet
from dist_train.evaluation.f1_curve import f1_curve
from dist_train.evaluation.metrics import paired_difference, per_item_scores
from dist_train.matching.vectors import open_vectors, subset
from shards.storage.files import read_json, write_json

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
OFFERS = ("abt_buy", "amazon_google")


@dataclass(frozen=True)
class Run:
    """A finished run of a recipe, and what it took."""

    out: Path
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all its processes."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Its metrics.json."""
        return read_json(self.out / "matches" / "metrics.json")

    def difference(self, ours: str, theirs: str) -> dict[str, float]:
        """What one row of its table gains over another: f1, low, high."""
        found = self.metrics["differences"]
        return next(row for row in found if (row["of"], row["over"]) == (ours, theirs))

    def f1(self, name: str) -> float:
        """F1 of a row of its table."""
        return next(row["f1"] for row in self.metrics["rows"] if row["name"] == name)


def run_recipe(recipe: str, out: Path, *arguments: object) -> Run:
    """`dist-train run` of a recipe into `out`; SystemExit when it fails."""
    options = [ROOT / "launch" / "recipes" / recipe, "--out", out, *arguments]
    taken = out / "taken.json"
    if not taken.exists():
        begun, before = time.monotonic(), _children()
        command = [sys.executable, "-m", "dist_train", "run", *map(str, options)]
        subprocess.run(command, cwd=ROOT, check=True)
        took = {"wall": time.monotonic() - begun, "cpu": _children() - before}
        write_json(taken, took)
    return Run(out, **json.loads(taken.read_text()))


def grocery(out: Path, seeds: Sequence[int] = SEEDS, arguments: Sequence[str] = ()) -> list[Run]:
    """The photos, from each seed; prints what each gained."""
    data = Path(os.environ["DIST_TRAIN_DATA"]) / "grocery"
    where = ("--catalogue", data / "catalogue.csv", "--images", data / "images")
    runs = [
        run_recipe(
            "grocery.yaml", out / f"grocery-{seed}", *where, "--image.seed", seed, *arguments
        )
        for seed in seeds
    ]
    print(split_counts(runs[0]))
    for seed, run in zip(seeds, runs, strict=True):
        gain, both = run.difference("image", "untrained: image"), unseen_gain(run.out)
        gain |= {"ours": run.f1("image"), "theirs": run.f1("untrained: image")}
        print(f"seed {seed}: {run.wall:.0f} s, {run.cpu:.0f} CPU s")
        for products, found in (("test", gain), ("val and test", both)):
            print(
                f"  {products} products: F1 {found['ours']:.4f}, untrained {found['theirs']:.4f}, "
                f"gain {_gain(found)}"
            )
    print(f"mean gain on products never seen: {mean_gain(runs):+.4f}")
    return runs


def offers(out: Path, arguments: Sequence[str] = ()) -> list[Run]:
    """The titles of both data sets; prints what was gained."""
    data = Path(os.environ["DIST_TRAIN_DATA"]) / "offers"
    runs = []
    for name in OFFERS:
        run = run_recipe("offers.yaml", out / name, "--catalogue", data / f"{name}.csv", *arguments)
        print(f"{name}: {split_counts(run)}; {run.wall:.0f} s, {run.cpu:.0f} CPU s")
        for ours, theirs in (("text", "untrained: text"), ("text + TF-IDF", "word TF-IDF")):
            print(f"  {ours} over {theirs}: {_gain(run.difference(ours, theirs))}")
        runs.append(run)
    return runs


def mean_gain(runs: list[Run]) -> float:
    """F1 on the val and test products above the untrained encoder, mean of the runs."""
    return float(np.mean([unseen_gain(run.out)["f1"] for run in runs]))


def split_counts(run: Run) -> str:
    """Items and products of each split, as the hash of the label makes them."""
    items = EmbeddingSet(run.out / "embedding").items
    counts = items.groupby("split").label_group.agg(["size", "nunique"])
    sizes = [f"{split} {n} items of {p} products" for split, n, p in counts.itertuples()]
    return ", ".join(sizes)


def unseen_gain(out: Path) -> dict[str, float]:
    """As `difference`, over val and test products together: no weight was fitted to either.

    Each half is scored at the threshold that is best on the other, for both encoders alike.
    """
    ours, groups = _cross_fitted(out / "embedding")
    theirs, _ = _cross_fitted(out / "untrained-embedding")
    mean, low, high = paired_difference(ours, theirs, groups)
    return {"f1": mean, "low": low, "high": high, "ours": ours.mean(), "theirs": theirs.mean()}


def _cross_fitted(embedding: Path) -> tuple[np.ndarray, np.ndarray]:
    """F1 of the val and then the test items (n,), and their label groups."""
    embeddings = EmbeddingSet(embedding)
    comparison, views = Comparison(embeddings.items), open_vectors(embeddings, ["image"], 0.5)
    pairs = {
        split: comparison.pairs(subset(views, rows)) for split, rows in comparison.rows.items()
    }
    f1 = []
    for split, other in (("val", "test"), ("test", "val")):
        threshold, _ = f1_curve(comparison.groups[other], *pairs[other]).best()
        i, j, score = pairs[split]
        kept = score >= np.float32(threshold)
        f1.append(per_item_scores(comparison.groups[split], i[kept], j[kept])[0])
    return np.concatenate(f1), np.concatenate([comparison.groups["val"], comparison.groups["test"]])


def _gain(gain: dict[str, float]) -> str:
    return f"{gain['f1']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run the requested comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("what", choices=("grocery", "offers"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of grocery")
    options, arguments = parser.parse_known_args()
    if options.what == "grocery":
        grocery(options.out.resolve(), options.seeds, arguments)
    else:
        offers(options.out.resolve(), arguments)


if __name__ == "__main__":
    main()
