"""Sets that other loaders hang on: uneven shards, fewer items than a batch, prime numbers."""

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from dist_train.config.training import TextTraining
from dist_train.training.data import training_items
from shards.catalogue.split import split_of
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from tests.support.launching import command, environment
from tests.support.logged_ranks import logged_rows, start_logged

pytestmark = pytest.mark.timeout(600)


def packed(folder: Path, items: int, shard_items: int = 5000) -> Path:
    """Titles of `items` postings of the train split, and of two for validation, as shards."""
    names = [f"product {number}" for number in range(3 * items)]
    trained = [name for name in names if split_of(name) == "train"][: max(2, items // 3)]
    groups = [trained[number % len(trained)] for number in range(items)]
    groups += [next(name for name in names if split_of(name) == "val")] * 2
    table = pd.DataFrame({
        "posting_id": [f"p{number}" for number in range(len(groups))],
        "image": "", "title": [f"{group} no {n}" for n, group in enumerate(groups)],
        "label_group": groups,
    })  # fmt: skip
    table.to_csv(folder / "catalogue.csv", index=False)
    options = PackOptions(workers=1, shard_items=shard_items)
    pack(folder / "catalogue.csv", None, folder / "shards", options)
    return folder / "shards"


def train(shards: Path, bert: Path, out: Path, **options: object) -> list[list[list]]:
    """Train on two ranks; what each took, batch by batch."""
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    log = out.with_name("log")
    process = start_logged(
        2, log, "train", "text", "--shards", shards, "--out", out, "--encoder.model", bert,
        "--encoder.max-length", 16, "--precision", "fp32", "--device", "cpu", *arguments,
    )  # fmt: skip
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    return [logged_rows(log, rank)[1:] for rank in range(2)]


def assert_equal_steps(of_ranks: list[list[list]], shards: Path, out: Path, **options) -> None:
    """Both ranks made all steps, with the items of the one plan."""
    items = training_items(ShardSet(shards), "text", TextTraining(**options), 2)
    assert json.loads((out / "manifest.json").read_text())["counts"]["steps"] == items.steps
    for rank, taken in enumerate(of_ranks):
        assert len(taken) == items.steps
        assert taken == [plan.items.tolist() for plan in items.plans(0, items.steps, rank, 2)]


def test_shards_of_1000_items_and_of_one(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The packer makes eight even shards of so few items; other tars need not be even.
    monkeypatch.setattr("shards.pack.plan.SHARDS", 1)
    shards = packed(tmp_path, 1001, 1000)
    counts = ShardSet(shards).packed.query("split == 'train'").groupby("shard").size()
    assert counts.tolist() == [1000, 1]
    out = tmp_path / "run"
    taken = train(shards, tiny_bert, out, **{"batch-size": 250, "epochs": 2, "workers": 2})
    assert_equal_steps(taken, shards, out, batch_size=250, epochs=2)


def test_one_shard_with_fewer_items_than_a_batch(tiny_bert: Path, tmp_path: Path) -> None:
    shards = packed(tmp_path, 7)
    assert ShardSet(shards).packed.query("split == 'train'").shard.nunique() == 1
    out, options = tmp_path / "run", {"batch-size": 16, "epochs": 9, "order": "window"}
    taken = train(shards, tiny_bert, out, workers=0, **options)
    assert_equal_steps(taken, shards, out, batch_size=16, epochs=9, order="window")


def test_ranks_in_another_order_stop_with_a_message(
    image_options: list[object], tmp_path: Path
) -> None:
    arguments = command(2, "train", "image", *image_options, "--out", tmp_path / "run")
    arguments[arguments.index("dist_train")] = "tests.distributed.other_seed_rank"
    done = subprocess.run(
        arguments, env=environment(), text=True, timeout=150,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode != 0
    assert (
        "rank 1 would train in another order than rank 0: seed 77 there, 0 on rank 0" in done.stdout
    )
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"
