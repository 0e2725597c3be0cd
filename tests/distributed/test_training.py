"""The same training on one, two and three processes, under DDP and ZeRO."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.comparing import largest_difference, losses, vectors
from tests.support.launching import CPU, run

pytestmark = pytest.mark.timeout(600)  # up to three launches in a test


@pytest.mark.parametrize(
    ("world", "launcher"),
    [
        (3, CPU),
        # Two ranks are in test_elastic.py, every ZeRO against plain PyTorch in test_strategies.py.
        pytest.param(2, CPU, marks=pytest.mark.full),
        *(
            pytest.param(2, f"deepspeed_zero{stage}.yaml", marks=pytest.mark.full)
            for stage in (1, 2, 3)
        ),
    ],
)
def test_weights_do_not_depend_on_the_processes(
    world: int, launcher: str, image_options: list[object], image_run: Path, shard_set: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    run(world, "train", "image", *image_options, "--out", out, launcher=launcher)
    assert losses(out) == pytest.approx(losses(image_run), rel=1e-5)
    assert largest_difference(out, image_run) < 1e-5
    moved = (vectors(out, shard_set) - vectors(image_run, shard_set)).abs().max().item()
    assert moved < 1e-4
    assert json.loads((out / "status.json").read_text())["status"] == "done"


def test_head_shards_cover_the_classes(
    image_options: list[object], shard_set: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(2, "train", "image", *image_options, "--out", out)
    newest = max((out / "checkpoints").iterdir())
    ranges = sorted(
        tuple(int(n) for n in path.stem.split("-")[1:]) for path in newest.glob("head-*")
    )
    classes = json.loads((shard_set / "manifest.json").read_text())["counts"]["classes"]
    assert len(ranges) == 2
    assert ranges[0][0] == 0
    assert ranges[0][1] == ranges[1][0]
    assert ranges[1][1] == classes


def test_a_batch_that_cannot_be_cut_is_refused(image_options: list[object], tmp_path: Path) -> None:
    options = [26 if option == 24 else option for option in image_options]
    with pytest.raises(AssertionError, match="batch_size 26 does not divide among 3 processes"):
        run(3, "train", "image", *options, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("launcher", "others"),
    [
        pytest.param(
            "deepspeed_zero2.yaml", [(2, "deepspeed_zero1.yaml"), (1, CPU)], marks=pytest.mark.full
        ),
        ("deepspeed_zero3.yaml", [(2, "deepspeed_zero3.yaml"), (1, CPU)]),
    ],
)
def test_a_zero_checkpoint_goes_on_under_zero_and_alone(
    launcher: str, others: list[tuple[int, str]], image_options: list[object], image_run: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Step 3 on two ranks, continued under another ZeRO or the same, and without on one."""
    first = tmp_path / "first"
    verb = ["train", "image", *image_options, "--keep", 9, "--out"]
    run(2, *verb, first, launcher=launcher)
    for world, other in others:
        out = tmp_path / other
        shutil.copytree(first, out)
        for later in (out / "checkpoints").glob("step-*"):
            if later.name != "step-00000003":
                shutil.rmtree(later)
        (out / "manifest.json").unlink()
        assert "going on from step 3" in run(world, *verb, out, launcher=other)
        assert losses(out) == pytest.approx(losses(image_run), rel=1e-5)
        assert largest_difference(out, image_run) < 1e-5
