"""What training gains on real photos and titles (full), and the recipes for CPUs in short."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import quality
from tests.support.launching import ROOT, run

RECIPES = ROOT / "launch" / "recipes"
SPLIT = (
    "test 450 items of 8 products, train 2795 items of 39 products, val 912 items of 14 products"
)
MINUTES = 15
"""That a run may take on two cores. Less than one core's time for so long is required, because
seconds on a clock say more of what else a machine does."""

needs_weights = pytest.mark.skipif(
    "DIST_TRAIN_WEIGHTS" not in os.environ, reason="DIST_TRAIN_WEIGHTS is not set"
)
needs_data = pytest.mark.skipif("DIST_TRAIN_DATA" not in os.environ, reason="no DIST_TRAIN_DATA")


@needs_weights
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recipe", ["grocery", "offers"])
def test_a_recipe_for_cpus_in_short(recipe: str, catalogue: Path, tmp_path: Path) -> None:
    """A few steps on a generated catalogue, with the recipe's own encoders.

    cpu.yaml has the demo's options (tests/unit/launch/test_recipes.py), which has its own test.
    """
    short = [f"--{modality}.{option}" for modality in ("image", "text")
             for option in ("epochs=0.3", "batch-size=16", "workers=0")]  # fmt: skip
    output = run(
        1, "run", RECIPES / f"{recipe}.yaml", "--out", tmp_path / "run", *short,
        "--catalogue", catalogue / "catalogue.csv", "--images", catalogue / "images",
        "--image.encoder.image-size", 48, "--pack.size", 64, timeout=580,
    )  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "matches" / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["rows"]}
    ours = metrics["rows"][-1]["name"]
    assert ours == {"grocery": "image", "offers": "text"}[recipe]
    for found in metrics["differences"]:
        gain = rows[found["of"]]["f1"] - rows[found["over"]]["f1"]
        assert found["f1"] == pytest.approx(gain)
        assert found["low"] <= gain <= found["high"]
        assert f"{found['of']} over {found['over']}" in output
    compared = {(found["of"], found["over"]) for found in metrics["differences"]}
    assert {(ours, "self-match"), (ours, f"untrained: {ours}")} <= compared
    with_tf_idf = {("text + TF-IDF", "word TF-IDF"), ("text + TF-IDF", "text")}
    assert with_tf_idf <= compared if "text" in ours else not with_tf_idf & compared


@pytest.mark.full
@needs_weights
@needs_data
@pytest.mark.timeout(4 * MINUTES * 60 * len(quality.SEEDS))
def test_photos_of_products_never_seen(tmp_path: Path) -> None:
    runs = quality.grocery(tmp_path)
    assert quality.split_counts(runs[0]) == SPLIT
    assert quality.mean_gain(runs) >= 0.22
    for found in runs:
        assert quality.unseen_gain(found.out)["low"] > 0
        assert found.difference("image", "untrained: image")["low"] > 0
        assert found.f1("untrained: image") > found.f1("random: image")
        assert found.cpu < MINUTES * 60


@pytest.mark.full
@needs_weights
@needs_data
@pytest.mark.timeout(3600)
def test_titles_of_products_never_seen(tmp_path: Path) -> None:
    for found in quality.offers(tmp_path):
        assert found.difference("text", "untrained: text")["low"] > 0
        assert found.difference("text + TF-IDF", "word TF-IDF")["low"] > 0
        assert found.cpu < MINUTES * 60
