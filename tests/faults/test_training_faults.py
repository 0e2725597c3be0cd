"""What happens to one rank of a training, and what the run makes of it."""

import json
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dist_train.config.training import HeadOptions, ImageEncoderOptions, ImageTraining
from dist_train.training.checkpoint import checkpoint_fault
from dist_train.training.loop import train
from tests.support.comparing import largest_difference
from tests.support.damage import spoil_batch
from tests.support.launching import CPU, command, environment
from tests.support.processes import kill

pytestmark = pytest.mark.timeout(900)


def config(tiny_vit: Path, accumulation: int = 1) -> ImageTraining:
    return ImageTraining(
        encoder=ImageEncoderOptions(model=str(tiny_vit), image_size=32), head=HeadOptions(lr=1e-3),
        batch_size=24, accumulation=accumulation, epochs=0.7, lr=1e-4, precision="fp32", workers=0,
        log_every=1, checkpoint_every=2, validate_every=0, ema=0.8, device="cpu",
    )  # fmt: skip


def start(
    what: str, shards: Path, tiny_vit: Path, out: Path, launcher: str = CPU, limit: int = 0,
    accumulation: int = 1, every: int = 2,
) -> subprocess.Popen:  # fmt: skip
    """The training on two ranks, of which the second meets WHAT (see faulty_rank)."""
    verb = [
        "train", "image", "--shards", shards, "--out", out, "--encoder.model", tiny_vit,
        "--encoder.image-size", 32, "--head.lr", 1e-3, "--batch-size", 24, "--accumulation",
        accumulation, "--epochs", 0.7, "--lr", 1e-4, "--precision", "fp32", "--workers", 0,
        "--log-every", 1, "--checkpoint-every", every, "--validate-every", 0, "--ema", 0.8,
        "--compare-every", 1, "--keep", 9,
    ]  # fmt: skip
    arguments = command(2, *verb, launcher=launcher)
    at = arguments.index("dist_train")
    arguments[at : at + 1] = ["tests.support.faulty_rank", *what.split()]
    env = environment() | {"FAULT_AT": str(out.with_name("fault"))}
    if launcher != CPU:
        env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        arguments, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=limited,
    )  # fmt: skip


def wait(process: subprocess.Popen) -> str:
    """Its output; one that does not end is killed."""
    try:
        return process.communicate(timeout=500)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        raise


def finish(process: subprocess.Popen) -> str:
    """Its output, when it ends well."""
    output = wait(process)
    assert process.returncode == 0, output
    return output


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def ours(output: str) -> list[str]:
    """What our ranks print at the end, without the launcher's report."""
    return [line for line in output.splitlines() if line.startswith("dist-train")]


@pytest.fixture(scope="module")
def left_out(shard_set, tiny_vit, tmp_path_factory) -> dict[int, Path]:
    """By accumulation: the training on one process that leaves step 3 out."""
    runs = {}
    for accumulation in (1, 2):
        runs[accumulation] = tmp_path_factory.mktemp("left-out") / "run"
        with pytest.MonkeyPatch.context() as patch:
            spoil_batch(patch, shard_set, config(tiny_vit, accumulation), 3)
            train("image", shard_set, runs[accumulation], config(tiny_vit, accumulation))
    return runs


# ── the step is left out


@pytest.mark.parametrize(
    ("launcher", "accumulation"),
    [
        (CPU, 1), ("deepspeed_zero2.yaml", 2),
        *(pytest.param(one, 2, marks=pytest.mark.full)
          for one in (CPU, "deepspeed_zero1.yaml", "deepspeed_zero3.yaml")),
    ],
)  # fmt: skip
def test_a_batch_that_is_no_number_is_left_out_by_all(
    launcher: str, accumulation: int, shard_set: Path, tiny_vit: Path, left_out, tmp_path: Path
) -> None:
    out, number = tmp_path / "run", 3 * accumulation
    what = f"nan 1 {number}"
    output = finish(start(what, shard_set, tiny_vit, out, launcher, accumulation=accumulation))
    assert output.count("left out on all ranks") == 1
    assert "step 3: left out on all ranks (loss nan" in output
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["skipped"] == 1
    assert largest_difference(out, left_out[accumulation]) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("launcher", [CPU, *(f"deepspeed_zero{stage}.yaml" for stage in (1, 2, 3))])
def test_centres_that_go_wrong_on_one_rank_are_left_out_by_all(
    launcher: str, shard_set: Path, tiny_vit: Path, left_out, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    output = finish(start("head 1 3", shard_set, tiny_vit, out, launcher))
    assert output.count("step 3: left out on all ranks (loss ") == 1
    assert "loss nan" not in output
    assert largest_difference(out, left_out[1]) < 1e-5


@pytest.mark.parametrize(
    "launcher",
    ["deepspeed_zero2.yaml",
     *(pytest.param(f"deepspeed_zero{stage}.yaml", marks=pytest.mark.full) for stage in (1, 3))],
)  # fmt: skip
def test_a_checkpoint_before_the_first_update_is_whole(
    launcher: str, shard_set: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    """The first step is left out: there are no moments yet."""
    out = tmp_path / "run"
    finish(start("nan 1 0", shard_set, tiny_vit, out, launcher, every=1))
    first = out / "checkpoints/step-00000001"
    assert checkpoint_fault(first) == ""
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    for later in (out / "checkpoints").iterdir():
        if later != first:
            shutil.rmtree(later)
    shutil.rmtree(out / "encoder")
    (out / "manifest.json").unlink()
    output = finish(start("none 1 0", shard_set, tiny_vit, out, launcher, every=1))
    assert "going on from step 1" in output
    assert largest_difference(out, whole) == 0


# ── the run ends, on all ranks, soon, for one reason


def end_soon(process: subprocess.Popen, out: Path) -> tuple[str, float]:
    """Its output, and how many seconds after the fault it ended."""
    output, ended = wait(process), time.time()
    assert out.with_name("fault").exists(), output
    took = ended - out.with_name("fault").stat().st_mtime
    assert process.returncode != 0, output
    assert status(out)["status"] == "failed"
    print(output, f"ended {took:.1f} s after the fault")
    return output, took


def test_a_rank_that_raises_ends_all(shard_set: Path, tiny_vit: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    output, took = end_soon(start("raise 1 3", shard_set, tiny_vit, out), out)
    assert took < 30
    assert output.count("ValueError: the moon is in the way") == 1
    assert status(out)["reason"] == "rank 1: ValueError: the moon is in the way"
    assert "by peer" not in output


def test_a_rank_that_is_killed_ends_all(shard_set: Path, tiny_vit: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    output, took = end_soon(start("kill 1 3", shard_set, tiny_vit, out), out)
    assert took < 30
    assert len(ours(output)) == 1
    assert "rank 0 lost its connection to another rank, which was killed" in ours(output)[0]
    assert "SIGKILL" in output  # the launcher's report
    assert checkpoint_fault(out / "checkpoints/step-00000002") == ""


def test_a_weight_that_differs_ends_all(shard_set: Path, tiny_vit: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    output, took = end_soon(start("flip 1 3", shard_set, tiny_vit, out), out)
    assert took < 30
    assert len(ours(output)) == 1
    assert "after step 4 the encoder of rank 1 differs from that of the others" in ours(output)[0]
    assert not (out / "checkpoints/step-00000004").exists()


def test_a_disk_that_is_full_while_saving(
    shard_set: Path, tiny_vit: Path, left_out, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finish(start("none 1 0", shard_set, tiny_vit, out))
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    for later in (out / "checkpoints").iterdir():
        if later.name > "step-00000002":
            shutil.rmtree(later)
    shutil.rmtree(out / "encoder")
    (out / "manifest.json").unlink()
    kept = out / "checkpoints/step-00000002"
    limit = (kept / "optimizer.safetensors").stat().st_size - 1
    process = start("none 1 0", shard_set, tiny_vit, out, limit=limit)
    output = wait(process)
    assert process.returncode != 0, output
    assert len(ours(output)) == 1
    assert "step-00000004" in ours(output)[0]
    assert "File too large" in ours(output)[0]
    assert "newest complete checkpoint is step-00000002; make room" in ours(output)[0]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint_fault(kept) == ""
    assert "going on from step 2" in finish(start("none 1 0", shard_set, tiny_vit, out))
    assert largest_difference(out, whole) == 0
