"""The complete pipeline, as a user starts it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.launching import ROOT, environment

pytestmark = pytest.mark.timeout(600)
STAGES = ("shards", "image", "text", "embedding", "index", "pairs", "matches")


def dist_train(*arguments: object, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    """A verb on one process."""
    command = [sys.executable, "-m", "dist_train", *map(str, arguments)]
    return subprocess.run(command, env=environment(), text=True, capture_output=True,
                          timeout=timeout)  # fmt: skip


@pytest.fixture(scope="module")
def shopee(
    catalogue: Path, tiny_vit: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The shipped Shopee recipe on a folder of Kaggle's shape, with tiny models."""
    folder = tmp_path_factory.mktemp("shopee")
    table = pd.read_csv(catalogue / "catalogue.csv", dtype=str)
    images = folder / "train_images"
    images.mkdir()
    for row in table.itertuples():
        shutil.copy(catalogue / "images" / row.image, images / f"{row.posting_id}.jpg")
    table["image"] = table.posting_id + ".jpg"
    table["image_phash"] = "0" * 16
    kaggle = ["posting_id", "image", "image_phash", "title", "label_group"]
    table[kaggle].to_csv(folder / "train.csv", index=False)
    done = dist_train(
        "run", ROOT / "launch" / "recipes" / "shopee.yaml", "--out", folder / "run",
        "--catalogue", folder / "train.csv", "--images", images, "--pack.workers", 1,
        "--image.encoder.model", tiny_vit, "--image.encoder.image-size", 32,
        "--text.encoder.model", tiny_bert, "--text.encoder.max-length", 128,
        "--image.epochs", 1, "--text.epochs", 1,
        "--image.batch-size", 16, "--text.batch-size", 16, "--image.workers", 0,
        "--text.workers", 0, "--embed.workers", 0, "--compare", "random",
    )  # fmt: skip
    return folder / "run", done


def test_every_stage_is_done(shopee: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = shopee
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in STAGES:
        assert json.loads((out / stage / "status.json").read_text())["status"] == "done"
        assert {p.name for p in (out / stage).iterdir()} >= {"stage.json", "manifest.json"}


def test_the_table_of_scores(shopee: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = shopee
    metrics = json.loads((out / "matches" / "metrics.json").read_text())
    names = [row["name"] for row in metrics["rows"]]
    assert names[:3] == ["self-match", "same photo", "word TF-IDF"]
    assert names[-1] == "image + text"
    assert {"image", "text", "random: image", "random: text"} <= set(names)
    assert all(row["low"] <= row["f1"] <= row["high"] for row in metrics["rows"])
    assert f"Among the {metrics['items']} test items alone" in done.stdout
    assert [row["name"] for row in metrics["delivered"]["rows"]] == [
        *("matches", "groups", "same photo", "self-match")
    ]
    for name in names:
        assert name in done.stdout


def test_scores_follow_from_the_matches(
    shopee: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = shopee
    metrics = json.loads((out / "matches" / "metrics.json").read_text())
    items = pd.read_parquet(out / "embedding" / "items.parquet").set_index("posting_id")
    matches = pd.read_parquet(out / "matches" / "matches.parquet").set_index("posting_id")
    test = items[items.split == "test"]
    told = metrics["delivered"]
    assert (told["postings"], told["labelled"]) == (len(items), (items.label_group != "").sum())
    assert told["items"] == len(test) - metrics["left_out"]
    if not metrics["left_out"] and told["labelled"] == told["postings"]:
        # As delivered: every match of the file, whatever the split of the posting that it names.
        label, f1 = items.label_group, []
        for posting in test.index:
            predicted, product = set(matches.matches[posting]), label.index[label == label[posting]]
            right = predicted.intersection(product)
            f1.append(2 * len(right) / (len(predicted) + len(product)))
        assert told["rows"][0]["f1"] == pytest.approx(sum(f1) / len(f1), abs=1e-9)
    assert metrics["items"] == len(test) - metrics["left_out"]
    if not metrics["left_out"]:
        groups = test.label_group.to_dict()
        f1 = []
        for posting in test.index:
            predicted = {m for m in matches.matches[posting] if m in groups}
            truth = {other for other, group in groups.items() if group == groups[posting]}
            f1.append(2 * len(predicted & truth) / (len(predicted) + len(truth)))
        assert metrics["rows"][-1]["f1"] == pytest.approx(sum(f1) / len(f1), abs=1e-9)


def test_what_lies_on_disk(shopee: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = shopee
    pairs = pd.concat([pd.read_parquet(p) for p in (out / "pairs" / "pairs").iterdir()])
    assert list(pairs.columns) == ["i", "j", "score", "score_image", "score_text"]
    assert (pairs.i < pairs.j).all()
    threshold = json.loads((out / "matches" / "threshold.json").read_text())
    assert threshold["score_floor"] <= threshold["threshold"]
    assert pairs.score.min() >= threshold["score_floor"] - 1e-6
    assert threshold["source"] == "chosen"
    assert len(threshold["curve"]["threshold"]) > 10
    nearest = pd.read_parquet(out / "pairs" / "nearest.parquet")
    assert (nearest.groupby("i").size() <= 5).all()
    report = (out / "matches" / "report.html").read_text()
    assert "data:image/jpeg" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_tensorboard_has_the_curves(
    shopee: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = shopee
    events = EventAccumulator(str(out / "image" / "tensorboard"))
    events.Reload()
    wanted = {"train/loss", "train/lr", "train/lr_head", "train/margin",
              "train/samples_per_second", "val/f1"}  # fmt: skip
    assert wanted <= set(events.Tags()["scalars"])


def test_a_second_run_finds_all_done(
    shopee: tuple[Path, subprocess.CompletedProcess[str]], catalogue: Path
) -> None:
    out, done = shopee
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/manifest.json")}
    arguments = done.args[3:]
    again = dist_train(*arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/manifest.json")} == before


def test_without_labels_near_certain_pairs_match_or_a_threshold_is_given(
    shopee: tuple[Path, subprocess.CompletedProcess[str]], catalogue: Path, tmp_path: Path
) -> None:
    out, _ = shopee
    table = pd.read_csv(catalogue / "catalogue.csv", dtype=str)[["posting_id", "image", "title"]]
    table.to_csv(tmp_path / "new.csv", index=False)
    shards, emb, index, pairs = (tmp_path / name for name in ("shards", "emb", "index", "pairs"))
    steps = [
        ("pack", tmp_path / "new.csv", "--images", catalogue / "images", "--out", shards,
         "--size", 48),
        ("embed", "--shards", shards, "--image", out / "image", "--text", out / "text",
         "--out", emb, "--workers", 0),
        ("index", emb, "--out", index),
        ("join", emb, "--index", index, "--out", pairs),
    ]  # fmt: skip
    for arguments in steps:
        done = dist_train(*arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    done = dist_train("match", pairs, "--out", tmp_path / "m1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "only pairs that score 0.95 or more are matches" in done.stderr
    chosen = json.loads((tmp_path / "m1" / "threshold.json").read_text())
    assert (chosen["source"], chosen["threshold"]) == ("near-certain", np.float32(0.95))
    known = out / "matches" / "threshold.json"
    done = dist_train("match", pairs, "--out", tmp_path / "m2", "--threshold-from", known)
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = json.loads((tmp_path / "m2" / "threshold.json").read_text())
    assert chosen["threshold"] == json.loads(known.read_text())["threshold"]
    assert dist_train("report", tmp_path / "m2").returncode == 0
    assert dist_train("evaluate", tmp_path / "m2").returncode == 2


needs_weights = pytest.mark.skipif(
    "DIST_TRAIN_WEIGHTS" not in os.environ, reason="DIST_TRAIN_WEIGHTS is not set"
)
needs_data = pytest.mark.skipif("DIST_TRAIN_DATA" not in os.environ, reason="no DIST_TRAIN_DATA")
DATA = Path(os.environ.get("DIST_TRAIN_DATA", "."))
GROCERY = [
    "run", ROOT / "launch" / "recipes" / "grocery.yaml",
    "--catalogue", DATA / "grocery" / "catalogue.csv", "--images", DATA / "grocery" / "images",
]  # fmt: skip


@needs_weights
def test_the_demo_in_small(tmp_path: Path) -> None:
    done = dist_train("demo", "--items", 200, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "As delivered: mean F1 of" in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'matches' / 'report.html'}"
    assert (tmp_path / "matches" / "report.html").stat().st_size > 50_000


@needs_weights
@needs_data
@pytest.mark.timeout(600)
def test_real_photos_in_short(tmp_path: Path) -> None:
    """One epoch at 96 pixels on real photos already beats the untrained encoder."""
    done = dist_train(
        *GROCERY, "--out", tmp_path / "run", "--encoders", "image", "--image.epochs", 1,
        "--image.encoder.image-size", 96, "--pack.size", 120, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    f1 = _f1(tmp_path / "run")
    assert f1["image"] > f1["untrained: image"] + 0.03
    assert f1["untrained: image"] > f1["random: image"]
    assert f1["random: image"] >= f1["self-match"]


def _f1(out: Path) -> dict[str, float]:
    metrics = json.loads((out / "matches" / "metrics.json").read_text())
    return {row["name"]: row["f1"] for row in metrics["rows"]}
