"""Items whose bytes have gone bad: counted, budgeted, and no rank ever waits for another."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_train.config.training import ImageTraining
from dist_train.encoders.batches import BatchPlan, ImageInputs, load
from dist_train.monitor.metrics import read_metrics
from shards.read.shard_set import ItemReader, ShardSet
from shards.storage.errors import Corrupt
from tests.support.comparing import largest_difference, losses
from tests.support.damage import flip_photos
from tests.support.launching import command, environment, run

pytestmark = pytest.mark.timeout(600)
PIXELS = ImageInputs(32, [0.5] * 3, [0.5] * 3, augmentation=ImageTraining())


@pytest.fixture(scope="module")
def damaged(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The shard set with 5 % of its photos broken, and which."""
    shards = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(shard_set, shards)
    return shards, flip_photos(shards, ("train", "val", "test"), 20)


def with_workers(options: list[object], workers: int) -> list[object]:
    """The options with another number of loader processes."""
    at = options.index("--workers") + 1
    return [*options[:at], workers, *options[at + 1 :]]


def train_numbers(reader: ItemReader) -> np.ndarray:
    """Items of the train split that have a photo, ascending."""
    return np.flatnonzero(reader.records["class_id"] >= 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_photo_of_the_product_stands_in(damaged, workers: int) -> None:
    shards, broken = damaged
    reader = ShardSet(shards).reader()
    numbers = train_numbers(reader)
    plans = [BatchPlan(cut, cut * 7) for cut in np.array_split(numbers, 9)]
    batches = list(load(reader, PIXELS, plans, workers, stand_ins=numbers))
    assert [len(batch.items) for batch in batches] == [len(plan.items) for plan in plans]
    found = np.concatenate([batch.items for batch in batches])
    replaced = found != numbers
    assert numbers[replaced].tolist() == [n for n in broken if n in set(numbers)]
    assert not set(found) & set(broken)
    classes = reader.records["class_id"]
    siblings = [len(np.flatnonzero(classes == classes[n])) for n in numbers[replaced]]
    same = classes[found[replaced]] == classes[numbers[replaced]]
    assert same.tolist() == [number > 1 for number in siblings]
    reported = [line for batch in batches for line in batch.unreadable]
    assert len(reported) == replaced.sum()
    assert all("differ from its crc" in line for line in reported)


def test_without_stand_ins_it_is_left_out(damaged) -> None:
    shards, broken = damaged
    reader = ShardSet(shards).reader()
    plans = [BatchPlan(np.array([n]), np.zeros(1, np.int64)) for n in broken[:2]]
    plans.append(BatchPlan(np.arange(broken[0], broken[0] + 3), np.zeros(3, np.int64)))
    alone, another, mixed = load(reader, PIXELS, plans, 0)
    assert (len(alone.items), alone.inputs, len(another.unreadable)) == (0, (), 1)
    assert mixed.items.tolist() == [broken[0] + 1, broken[0] + 2]
    assert len(mixed.inputs[0]) == 2


def test_bytes_that_are_no_photo_count_as_broken(damaged, monkeypatch) -> None:
    reader = ShardSet(damaged[0]).reader()
    read = ItemReader.read

    def cut_short(self, position, photo=True):
        item = read(self, position, photo)
        return item if position else type(item)(item.posting_id, b"\xff\xd8no", "", item.class_id)

    monkeypatch.setattr(ItemReader, "read", cut_short)
    plan = BatchPlan(np.array([0]), np.zeros(1, np.int64))
    (batch,) = load(reader, PIXELS, [plan], 0)
    assert len(batch.items) == 0
    assert batch.unreadable[0].startswith("item 0: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_when_everything_is_broken_it_says_so(shard_set: Path, tmp_path: Path, workers) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shard_set, shards)
    flip_photos(shards, ("train", "val", "test", "unlabelled"), 1)
    reader = ShardSet(shards).reader()
    numbers = train_numbers(reader)
    plan = BatchPlan(numbers[:4], np.zeros(4, np.int64))
    with pytest.raises(Corrupt, match=r"^100 items in a row .*, the first: item \d+: .*crc"):
        next(load(reader, PIXELS, [plan], workers, stand_ins=numbers))


def test_training_goes_on_alike_on_one_and_two_processes(damaged, image_options, tmp_path) -> None:
    shards, _ = damaged
    options = ["--shards", shards, *image_options[2:], "--max-unreadable", 0.2]
    runs = []
    for world, workers in ((1, 0), (2, 1)):
        runs.append(tmp_path / f"run-{world}")
        verb = ["train", "image", *with_workers(options, workers), "--out", runs[-1]]
        assert "another item stands in" in run(world, *verb)
    one, two = runs
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert largest_difference(one, two) < 1e-5
    counted = [[row["train/unreadable"] for row in read_metrics(r) if "train/unreadable" in row]
               for r in runs]  # fmt: skip
    assert counted[0] == counted[1]
    assert counted[0][-1] > 0


def test_more_than_the_budget_stops_every_rank(shard_set, image_options, tmp_path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shard_set, shards)
    flip_photos(shards, ("train",), 3)
    verb = ["train", "image", "--shards", shards, *image_options[2:], "--out", tmp_path / "run",
            "--max-unreadable", 0.01]  # fmt: skip
    done = subprocess.run(command(2, *verb), env=environment(), text=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "items served were broken" in done.stdout
    assert "--max-unreadable" in done.stdout
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"


@pytest.mark.parametrize("world", [1, 2])
def test_a_broken_photo_gets_no_vector(damaged, image_run, tmp_path, world: int) -> None:
    shards, broken = damaged
    out = tmp_path / "embedding"
    run(world, "embed", "--shards", shards, "--image", image_run, "--out", out,
        "--max-unreadable", 0.2, "--workers", 0)  # fmt: skip
    items = pd.read_parquet(out / "items.parquet").sort_values("row")
    items = items[items.row >= 0].reset_index(drop=True)
    assert items.index[items.status == "unreadable"].tolist() == broken
    assert not items.has_image[broken].any()
    rows = np.concatenate([np.load(part) for part in sorted(out.glob("image-*.npy"))])
    assert np.flatnonzero(~rows.any(axis=1)).tolist() == items.index[~items.has_image].tolist()
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["unreadable"] == len(broken)


def test_embedding_over_the_budget_fails(damaged, image_run, tmp_path) -> None:
    shards, _ = damaged
    verb = ["embed", "--shards", shards, "--image", image_run, "--out", tmp_path / "embedding",
            "--workers", 0, "--max-unreadable", 0.01]  # fmt: skip
    done = subprocess.run(command(1, *verb), env=environment(), text=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "items have a broken image, the first '" in done.stdout


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("verb", ["train", "embed"])
def test_without_a_budget_the_first_damaged_item_is_refused(
    damaged, image_options, image_run, tmp_path, verb: str, world: int
) -> None:
    shards, _ = damaged
    options = {
        "train": ["image", "--shards", shards, *image_options[2:]],
        "embed": ["--shards", shards, "--image", image_run, "--workers", 1],
    }[verb]
    line = command(world, verb, *options, "--out", tmp_path / "out")
    done = subprocess.run(line, env=environment(), text=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == (2 if world == 1 else 1), done.stdout  # a launcher's own code is 1
    message = r"\d{6}\.tar: slot \d+, member jpg: bytes differ from its crc; restore the file"
    assert re.search(message, done.stdout), done.stdout
    assert "--max-unreadable 0.01" in done.stdout
    assert done.stdout.count("Traceback") == world - 1, done.stdout  # that of the launcher


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_on_one_rank_ends_all_and_is_named(image_options, tmp_path, workers: int) -> None:
    mark = tmp_path / "raised"
    options = with_workers(image_options, workers)
    line = command(2, "train", "image", *options, "--out", tmp_path / "run")
    at = line.index("dist_train")
    line[at : at + 1] = ["tests.distributed.failing_rank", str(mark)]
    done = subprocess.run(line, env=environment(), text=True, timeout=120,
                          cwd=Path(__file__).parents[2],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert time.time() - mark.stat().st_mtime < 30
    assert done.returncode != 0
    assert "dist-train [rank 1]: " in done.stdout, done.stdout
    assert "000000.tar: gone" in done.stdout
    assert "rank 1" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]
