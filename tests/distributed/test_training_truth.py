"""Trainings on one, two and three ranks against plain PyTorch and scores by their definitions.

Comparing W = 1 with W = 2 cannot see a formula that is wrong on both; these can. The ranks stay
between the tests, so a training takes less than a second.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
    TrainingOptions,
)
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import load
from dist_train.encoders.encoder import Encoder, load_encoder, new_encoder
from dist_train.evaluation.labelled import near_duplicates_across_splits
from dist_train.heads.centres import initial_centres
from dist_train.training import loop
from dist_train.training.data import training_items
from dist_train.training.loop import Stepper, compare_replicas, fix_bucket_order, train
from dist_train.training.setup import Training, set_up, start_centres
from shards.read.shard_set import ShardSet
from shards.storage.errors import Failed
from tests.support.comparing import losses, weights
from tests.support.faulty_rank import Fault
from tests.support.plain_training import Plain, class_means, plain_training
from tests.support.ranks import Ranks, as_launched
from tests.support.score_reference import cosines_of, f1_at, reference_scores

pytestmark = pytest.mark.timeout(600)
WORLDS = (1, 2, 3)
COMMON = {"batch_size": 24, "workers": 0, "device": "cpu", "precision": "fp32", "log_every": 1}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    groups_of_ranks = {
        world: Ranks(world, tmp_path_factory.mktemp("ranks"), __name__) for world in WORLDS
    }
    yield groups_of_ranks
    for ranks in groups_of_ranks.values():
        ranks.close()


def image_config(tiny_vit: Path, **options: Any) -> ImageTraining:
    """Six steps; clips and decay are strong enough to matter."""
    encoder = ImageEncoderOptions(model=str(tiny_vit), image_size=32)
    full = {"epochs": 0.75, "lr": 3e-4, "clip": 0.5, "weight_decay": 0.3, "keep_best": False}
    return ImageTraining(encoder=encoder, **COMMON | full | options)


def text_config(tiny_bert: Path, **options: Any) -> TextTraining:
    encoder = TextEncoderOptions(model=str(tiny_bert), max_length=24)
    full = {"epochs": 0.75, "lr": 3e-4, "clip": 0.5, "weight_decay": 0.3, "keep_best": False}
    return TextTraining(encoder=encoder, **COMMON | full | options)


def trained(rank: int, world: int, modality: str, shards: Path, out: Path, config: Any) -> str:
    """One rank's part of the stage; what it failed with."""
    as_launched(rank, world)
    try:
        train(modality, shards, out, config)
    except (Failed, SystemExit) as ended:
        return str(ended)
    return ""


# ── the whole training


CASES: dict[str, dict[str, Any]] = {
    "plain": {"head": HeadOptions(lr=2e-3)},
    "passes, average, rare classes": {
        "accumulation": 2, "ema": 0.6, "validate_every": 0.4,
        "head": HeadOptions(lr=2e-3, margin_of_largest=0.1, ramp=0.5),
    },
    "from class means": {"head": HeadOptions(lr=2e-3, start="means", loss="cosface", ramp=0.0)},
}  # fmt: skip


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def centres_of(run: Path, step: int) -> torch.Tensor:
    """(C, D) of a checkpoint."""
    parts = sorted(
        (run / f"checkpoints/step-{step:08d}").glob("head-*"),
        key=lambda path: int(path.stem.split("-")[1]),
    )
    return torch.cat([load_file(path)["weight"] for path in parts])


def scores_of(encoder: Encoder, shards: Path, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D) of the val items that are scored, and their label groups (N,)."""
    shard_set = ShardSet(shards)
    table = shard_set.packed
    val = (table.split == "val") & table[f"has_{modality}"]
    scored = table[val & ~near_duplicates_across_splits(table)]
    reader = shard_set.reader()
    items = [reader[int(number)] for number in scored.index]
    with torch.inference_mode():
        vectors = encoder.eval()(*encoder.inputs()(items, [0] * len(items))).numpy()
    return vectors, scored.label_group.to_numpy(str)


def assert_scores(row: dict[str, float], vectors: np.ndarray, labels: np.ndarray) -> None:
    """The scores that were logged are those of the vectors, and the threshold is a best one."""
    wanted = reference_scores(vectors, labels)
    got = {name: row[f"val/{name}"] for name in wanted}
    # A pair whose score another processor rounds to the other side of its neighbour's.
    assert got == pytest.approx(wanted, abs=2e-3)
    at = f1_at(cosines_of(vectors), labels, row["val/threshold"])
    assert at == pytest.approx(wanted["f1"], abs=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_losses_weights_and_scores_are_those_of_plain_pytorch(
    case: str, groups: dict[int, Ranks], shard_set: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    config = image_config(tiny_vit, **CASES[case])
    plain: Plain | None = None
    for world, ranks in groups.items():
        out = tmp_path / f"{world}"
        ranks.ask(trained, "image", shard_set, out, config)
        rows = rows_of(out)
        steps = [row for row in rows if "train/loss" in row]
        rates = [(row["train/lr"], row["train/lr_head"]) for row in steps]
        assert len(rates) == 6
        plain = plain or plain_training("image", ShardSet(shard_set), config, rates)
        assert losses(out) == pytest.approx(plain.losses, rel=1e-5)
        wanted = plain.average if config.ema else dict(plain.encoder.state_dict())
        for name, value in weights(out).items():
            at = [n for n in wanted if n.removeprefix("backbone.").removeprefix("neck.") == name]
            assert (value - wanted[at[0]]).abs().max() <= 1e-5, (world, name)
        assert (centres_of(out, 6) - plain.centres).abs().max() <= 1e-5, world
        scores = {row["step"]: row for row in rows if "val/f1" in row}
        assert list(scores) == ([0, 4, 6] if config.validate_every == 0.4 else [0, 6])
        start = new_encoder(config.encoder, config.seed)
        assert_scores(scores[0], *scores_of(start, shard_set, "image"))
        end = load_encoder(out / "encoder", "image")
        assert_scores(scores[6], *scores_of(end, shard_set, "image"))
        assert scores[6] != scores[0] | {"step": 6}


# ── what ranks do alike, and what they must not


def stepper_of(shards: Path, modality: str, config: TrainingOptions) -> Stepper:
    """A training before its first step, with the batches of this rank."""
    runtime = Runtime("cpu")
    items = training_items(ShardSet(shards), modality, config, runtime.world)
    training: Training = set_up(items, runtime)
    inputs = training.encoder.inputs(config)
    plans = items.plans(0, 3, runtime.rank, runtime.world)
    return Stepper(training, load(items.reader, inputs, plans, 0))


def drawn(rank: int, world: int, shards: Path, config: TextTraining, step: int) -> np.ndarray:
    """Vectors that the step `step` makes of the same titles on every rank."""
    as_launched(rank, world)
    stepper = stepper_of(shards, "text", config)
    reader, seen = ShardSet(shards).reader(["train"]), []
    inputs = stepper.training.encoder.inputs()([reader[n] for n in range(8)], [0] * 8)
    batch = replace(next(stepper.batches), inputs=inputs)
    stepper.batches = iter([batch])
    stepper.training.encoder.register_forward_hook(lambda *a: seen.append(a[2].detach().clone()))
    stepper.run_step(step)
    return seen[-1].numpy()


def test_every_rank_and_every_step_draws_dropout_of_its_own(
    groups: dict[int, Ranks], shard_set: Path, tiny_bert: Path
) -> None:
    encoder = TextEncoderOptions(model=str(tiny_bert), max_length=24, dropout=0.5, neck=False)
    config = replace(text_config(tiny_bert, batch_size=16), encoder=encoder)
    seeds = {"first": 0, "again": 0, "second": 1, "third": 2}
    seen = {n: groups[2].ask(drawn, shard_set, config, step) for n, step in seeds.items()}
    seen["seed"] = groups[2].ask(drawn, shard_set, replace(config, seed=1), 0)
    for one, other in zip(seen["first"], seen.pop("again"), strict=True):
        assert np.array_equal(one, other)
    masks = [values for of_ranks in seen.values() for values in of_ranks]
    for number, one in enumerate(masks):
        assert not any(np.array_equal(one, other) for other in masks[:number])
    still = replace(config, encoder=replace(encoder, dropout=0.0))
    one, other = groups[2].ask(drawn, shard_set, still, 0)
    assert np.array_equal(one, other)  # so it is dropout that tells them apart


def heard(rank: int, world: int, shards: Path, config: ImageTraining, one: int) -> list[bool]:
    """Whether this rank learns, as all check at the same point, of a stop requested of `one` only.

    In a step, where the ranks check without waiting for each other, and between steps.
    """
    as_launched(rank, world)
    stepper = stepper_of(shards, "image", config)
    runtime = stepper.training.runtime
    requested = runtime.stop_requested
    before = stepper.run_step(0)[1]

    def late() -> bool:
        time.sleep(0.3)  # the others have looked by then
        os.kill(os.getpid(), signal.SIGUSR1)
        return requested()

    if rank == one:
        runtime.stop_requested = late
    return [before, stepper.run_step(1)[1], runtime.any_stop_requested()]


@pytest.mark.parametrize("world", [2, 3])
def test_a_stop_requested_of_one_rank_reaches_all_in_the_same_step(
    world: int, groups: dict[int, Ranks], shard_set: Path, tiny_vit: Path
) -> None:
    config = image_config(tiny_vit)
    for one in (0, world - 1):
        answers = groups[world].ask(heard, shard_set, config, one)
        assert answers == [[False, True, True]] * world


def differing(rank: int, world: int, shards: Path, out: Path, config: ImageTraining) -> str:
    """What a training ends with whose second rank has a bit of a weight flipped before step 1."""
    kept = loop.load, Stepper.run_step
    if rank == 1:
        Fault("flip", "1").arm()
    try:
        return trained(rank, world, "image", shards, out, config)
    finally:
        loop.load, Stepper.run_step = kept


@pytest.mark.parametrize("every", [1, 3, 0])
def test_replicas_are_compared_as_often_as_configured(
    every: int, groups: dict[int, Ranks], shard_set: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    config = image_config(tiny_vit, compare_every=every, validate_every=0)
    groups[2].ask(differing, shard_set, tmp_path / "run", config)
    status = json.loads((tmp_path / "run/status.json").read_text())
    if every:
        assert f"after step {max(every, 2)} the encoder of rank 1 differs" in status["reason"]
    assert status["status"] == ("failed" if every else "done")


def begun(rank: int, world: int, shards: Path, config: ImageTraining) -> tuple[np.ndarray, bool]:
    """This rank's centres before the first step, and whether all of the encoder is in training."""
    as_launched(rank, world)
    runtime = Runtime("cpu")
    items = training_items(ShardSet(shards), "image", config, runtime.world)
    training = set_up(items, runtime)
    start_centres(training)
    modes = {module.training for module in training.encoder.modules()}
    return training.head.weight.detach().numpy(), modes == {True}


def test_centres_that_begin_as_means_point_where_the_items_do(
    groups: dict[int, Ranks], shard_set: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    config = image_config(tiny_vit, head=HeadOptions(start="means", centres=2))
    answers = groups[2].ask(begun, shard_set, config)
    assert [training for _, training in answers] == [True, True]
    found = torch.from_numpy(np.concatenate([centres for centres, _ in answers])).double()
    items = training_items(ShardSet(shard_set), "image", config, 1)
    encoder = new_encoder(config.encoder, config.seed)
    random = initial_centres(0, items.classes, encoder.width, config.seed, 2).double()
    for number, mean in enumerate(class_means(encoder, items)):
        own = slice(2 * number, 2 * number + 2)
        # As long as a random centre in the mean, with an eighth of its random one.
        wanted = mean * 0.05 * encoder.width**0.5 + random[own] / 8
        assert (found[own] - wanted).abs().max() < 1e-6


def settled(rank: int, world: int, shards: Path, config: TextTraining) -> list[bool]:
    """What settling DDP's buckets leaves as it was: the encoder, the gradients, what is drawn."""
    as_launched(rank, world)
    stepper = stepper_of(shards, "text", config)
    training = stepper.training
    before = {name: value.clone() for name, value in training.encoder.state_dict().items()}
    drawn, inputs = torch.random.get_rng_state(), next(stepper.batches).inputs
    fix_bucket_order(training.prepared, training.optimizer, inputs)
    after = training.encoder.state_dict()
    return [
        all(torch.equal(value, after[name]) for name, value in before.items()),
        all(p.grad is None or not p.grad.any() for p in training.encoder.parameters()),
        torch.equal(drawn, torch.random.get_rng_state()),
    ]


def test_an_attempt_that_goes_on_on_three_ranks_ends_bit_equal(
    groups: dict[int, Ranks], shard_set: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """With dropout, in the step after the resume too: three addends have an order."""
    encoder = TextEncoderOptions(model=str(tiny_bert), max_length=24, dropout=0.2)
    config = text_config(tiny_bert, checkpoint_every=3, keep=9, ema=0.7, validate_every=0)
    config = replace(config, encoder=encoder, epochs=0.6)
    assert groups[3].ask(settled, shard_set, config) == [[True] * 3] * 3
    whole, again = tmp_path / "whole", tmp_path / "again"
    groups[3].ask(trained, "text", shard_set, whole, config)
    shutil.copytree(whole, again)
    for later in (again / "checkpoints").glob("step-*"):
        if later.name > "step-00000003":
            shutil.rmtree(later)
    (again / "manifest.json").unlink()
    groups[3].ask(trained, "text", shard_set, again, config)
    assert losses(again) == losses(whole)
    assert len(losses(whole)) > 3
    for file in max((whole / "checkpoints").glob("step-*")).glob("*.safetensors"):
        other = again / file.relative_to(whole)
        assert other.read_bytes() == file.read_bytes(), file.name


def odd(rank: int, world: int, others: list[int]) -> str:
    """The error for ranks whose weights differ in one bit."""
    as_launched(rank, world)
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(0.5)
        if rank in others:
            layer.bias.view(torch.int32)[1] ^= 1
    try:
        compare_replicas(layer, Runtime("cpu"), 7)
    except Failed as error:
        return str(error)
    return ""


def test_those_that_differ_from_most_are_named(groups: dict[int, Ranks]) -> None:
    for world, others, named in [(3, [], ""), (3, [0], "rank 0 "), (3, [2], "rank 2 "),
                                (3, [0, 1], "rank 2 "), (2, [0], "rank 1 ")]:  # fmt: skip
        wanted = f"after step 7 the encoder of {named}differs" if named else ""
        for answer in groups[world].ask(odd, others):
            assert answer.startswith(wanted)
            assert bool(answer) == bool(named)
