"""Real ranks over gloo, killed at random moments and started again as another number of them.

What the finished steps of all attempts took, put together, is the order of one undisturbed attempt.
"""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from dist_train.config.training import ImageTraining
from dist_train.training.data import TrainingItems, training_items
from shards.read.shard_set import ShardSet
from tests.support.logged_ranks import logged_rows, start_logged
from tests.support.processes import kill, wait_for

pytestmark = pytest.mark.timeout(1800)
BATCH, STEPS_A_KILL = 24, 14


def taken_by(attempts: list[tuple[Path, int]], steps: int) -> list[int]:
    """Items of the steps that count: those of an attempt before the next attempt's first step."""
    begun = [
        (log, world) for log, world in attempts if all(logged_rows(log, r) for r in range(world))
    ]
    firsts = [logged_rows(log, 0)[0] for log, _ in begun]
    taken: list[int] = []
    for (log, world), first, end in zip(begun, firsts, [*firsts[1:], steps], strict=True):
        of_ranks = [logged_rows(log, rank) for rank in range(world)]
        assert {of_rank[0] for of_rank in of_ranks} == {first}
        for step in range(end - first):
            taken += [item for of_rank in of_ranks for item in of_rank[1 + step]]
    return taken


def undisturbed(shards: Path, **options) -> TrainingItems:
    """The training in this process, for its plan."""
    config = ImageTraining(batch_size=BATCH, **options)
    return training_items(ShardSet(shards), "image", config, 1)


@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (3, {"order": "window"}),
        pytest.param(20, {"order": "global"}, marks=pytest.mark.full),
        pytest.param(8, {"photos_per_product": 4}, marks=pytest.mark.full),
    ],
)
def test_killed_ranks_take_every_item_in_the_one_order(
    kills: int, options: dict, shard_set: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    length = undisturbed(shard_set, **options).order.positions
    options["epochs"] = kills * STEPS_A_KILL * BATCH / length
    items, draw = undisturbed(shard_set, **options), random.Random(kills)
    verb = [
        "train", "image", "--shards", shard_set, "--out", tmp_path / "run", "--device", "cpu",
        "--encoder.model", tiny_vit, "--encoder.image-size", 32, "--batch-size", BATCH,
        "--precision", "fp32", "--workers", 1, "--checkpoint-every", 1, "--validate-every", 0,
    ]  # fmt: skip
    for name, value in options.items():
        verb += [f"--{name.replace('_', '-')}", value]
    attempts = [(tmp_path / f"attempt-{number}", 2 - number % 2) for number in range(kills + 1)]
    for log, world in attempts[:-1]:
        process = start_logged(world, log, *verb)
        seen = draw.randint(1, STEPS_A_KILL)
        wait_for(lambda log=log, seen=seen: len(logged_rows(log, 0)) >= seen, process, 150)
        time.sleep(draw.random() * 0.1)
        kill(process)
    process = start_logged(attempts[-1][1], attempts[-1][0], *verb)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    done = json.loads((tmp_path / "run/manifest.json").read_text())
    assert done["counts"]["steps"] == items.steps
    whole = np.concatenate([plan.items for plan in items.plans(0, items.steps, 0, 1)])
    assert taken_by(attempts, items.steps) == whole.tolist()
    assert len(whole) >= kills * STEPS_A_KILL * BATCH
