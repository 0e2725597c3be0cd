"""One training on two, one and three ranks in turn, or under DDP, ZeRO-2 and DDP again.

It is stopped twice in the middle of an epoch and goes on as another number of ranks: every step is
served the postings that it would have been, and the weights agree within 1e-5. What breaks that is
measured too, by a training from end to end on one, two and three ranks.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_train.config.training import ImageTraining
from dist_train.training.data import training_items
from shards.read.shard_set import ShardSet
from tests.support.attempts import Attempt, served
from tests.support.comparing import largest_difference, losses
from tests.support.launching import CPU, run

pytestmark = pytest.mark.timeout(1200)
STEPS, BATCH, PASSES = 20, 24, 2
ZERO = "deepspeed_zero2.yaml"


@pytest.fixture(scope="module")
def tiny_cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small network with batch normalisation (D = 256), as timm saves one."""
    import timm

    folder = tmp_path_factory.mktemp("tiny-cnn")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0)
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    named = {"architecture": "test_efficientnet", "pretrained_cfg": cfg, "model_args": {}}
    (folder / "config.json").write_text(json.dumps(named))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def image_verb(shard_set: Path, tiny_cnn: Path) -> list[object]:
    """20 steps of 24 photos in two passes: several epochs, a neck over all ranks."""
    return ["train", "image", "--encoder.model", tiny_cnn, "--encoder.image-size", 32,
            *common(shard_set)]  # fmt: skip


@pytest.fixture(scope="module")
def text_verb(shard_set: Path, tiny_bert: Path) -> list[object]:
    return ["train", "text", "--encoder.model", tiny_bert, *common(shard_set)]


def common(shards: Path) -> list[object]:
    positions = training_items(
        ShardSet(shards), "image", ImageTraining(batch_size=BATCH), 1
    ).order.positions
    return [
        "--shards", shards, "--epochs", STEPS * BATCH / positions, "--batch-size", BATCH,
        "--accumulation", PASSES, "--lr", 1e-4, "--precision", "fp32", "--workers", 0,
        "--log-every", 1, "--validate-every", 0, "--checkpoint-every", 100, "--keep", 9,
    ]  # fmt: skip


def fate(rank: int, name: str, step: int) -> str:
    """One rank gets a signal in its `step`-th step, after which all save and exit."""
    return f"{rank}:{name}:{step * PASSES}"


def stop_by_signal(attempt: Attempt, verb: list[object]) -> None:
    """Run an attempt that a signal ends."""
    process = attempt.start(*verb)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == (3 if attempt.world == 1 else 0), output
    assert "stopped by a signal after step" in output


def end_with(run_folder: Path) -> dict[str, torch.Tensor]:
    """Centres of all classes and their moments, of the newest checkpoint."""
    newest = max((run_folder / "checkpoints").glob("step-*"))
    parts = sorted(newest.glob("head-*"), key=lambda path: int(path.stem.split("-")[1]))
    found = [load_file(path) for path in parts]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


@pytest.fixture(scope="module")
def alone(
    image_verb: list[object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Attempt]:
    """The training on one process from end to end."""
    folder = tmp_path_factory.mktemp("alone")
    attempt = Attempt(folder / "attempt").finish(*image_verb, "--out", folder / "run")
    return folder / "run", attempt


@pytest.mark.parametrize(
    ("ranks", "launchers"),
    [((2, 1, 3), (CPU, CPU, CPU)),
     pytest.param((2, 2, 2), (CPU, ZERO, CPU), marks=pytest.mark.full)],
    ids=["2 to 1 to 3", "DDP to ZeRO-2 to DDP"],
)  # fmt: skip
def test_it_goes_on_as_another_number_of_ranks(
    ranks: tuple[int, ...], launchers: tuple[str, ...], alone: tuple[Path, Attempt],
    image_verb: list[object], tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    verb = [*image_verb, "--out", out]
    fates = (fate(1, "SIGUSR1", 4), fate(0, "SIGTERM", 5), "none")
    attempts = [
        Attempt(tmp_path / f"attempt-{number}", *arguments)
        for number, arguments in enumerate(zip(ranks, launchers, fates, strict=True))
    ]
    for attempt in attempts[:2]:
        stop_by_signal(attempt, verb)
        assert json.loads((out / "status.json").read_text())["status"] == "preempted"
    attempts[2].finish(*verb)
    begun = [attempt.first_step for attempt in attempts]
    assert begun == [0, 4, 9]
    assert served(attempts, STEPS, PASSES) == served([alone[1]], STEPS, PASSES)
    assert losses(out) == pytest.approx(losses(alone[0]), rel=1e-5)
    heads = end_with(out), end_with(alone[0])
    moved = max((heads[0][name] - heads[1][name]).abs().max().item() for name in heads[0])
    print(f"attempts began at {begun}; encoder differs by {largest_difference(out, alone[0]):.1e}, "
          f"head and moments by {moved:.1e}")  # fmt: skip
    assert largest_difference(out, alone[0]) <= 1e-5
    assert moved <= 1e-5


# ── what breaks it, and by how much

BREAKING = {
    "nothing (image)": ("image_verb", [], False),
    "batch statistics in the backbone": ("image_verb", ["--encoder.no-pretrained"], True),
    "nothing (text)": ("text_verb", [], False),
    "dropout 0.1": ("text_verb", ["--encoder.dropout", 0.1], True),
}


@pytest.mark.full
@pytest.mark.parametrize("what", BREAKING)
def test_what_breaks_the_equality(
    what: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name, options, breaks = BREAKING[what]
    verb = request.getfixturevalue(name)
    runs = {world: tmp_path / f"{world}" for world in (1, 2, 3)}
    for world, out in runs.items():
        run(world, *verb, *options, "--out", out)
    for one, other in itertools.combinations(runs, 2):
        apart = largest_difference(runs[one], runs[other])
        loss = max(
            abs(a - b) / b for a, b in zip(losses(runs[one]), losses(runs[other]), strict=True)
        )
        print(f"{what}: {one} and {other} ranks, weights differ by {apart:.1e}, loss by {loss:.1e}")
        assert (apart > 1e-5) == breaks
        assert (loss > 1e-5) == breaks
