"""Short real trainings: complete and damaged checkpoints, attempts that go on bit-equal."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_train.config.training import TextEncoderOptions, TextTraining
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.encoder import load_encoder
from dist_train.monitor.metrics import read_metrics
from dist_train.training.checkpoint import Checkpoints, checkpoint_fault
from dist_train.training.data import TrainingItems
from dist_train.training.loop import train
from shards.storage.errors import BadInput, Failed, Stopped
from shards.storage.files import sha256_file
from tests.support.short_training import (
    COMMON,
    STEPS,
    assert_same_end,
    checkpoint,
    equal_tensors,
    image_config,
    new_training,
    remove_checkpoints_after,
    state_of,
    without_rate,
)


@pytest.fixture(scope="module")
def finished(shard_set, tiny_vit, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train("image", shard_set, out, image_config(tiny_vit))
    return out


@pytest.fixture
def cut_off(finished) -> Path:
    """A copy of it as if killed after the last checkpoint, beside it so that parents hold."""
    out = finished.with_name(f"cut-{time.monotonic_ns()}")
    shutil.copytree(finished, out)
    shutil.rmtree(out / "encoder")
    (out / "manifest.json").unlink()
    return out


def damage(folder: Path, how: str) -> None:
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if how == "flipped":
        data[-7] ^= 4
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[:-100])
    elif how == "a file missing":
        file.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[: len(text) // 2])


HOW = ("flipped", "cut", "a file missing", "no manifest", "manifest cut")


# What a checkpoint is


def test_a_run_leaves_its_checkpoints_and_says_what_is_in_them(finished):
    folders = sorted((finished / "checkpoints").iterdir())
    assert folders == [checkpoint(finished, step) for step in (2, 4, 6, STEPS)]
    classes = json.loads((finished / "manifest.json").read_text())["counts"]["classes"]
    for folder, step in zip(folders, (2, 4, 6, STEPS), strict=True):
        state = json.loads((folder / "state.json").read_text())
        assert (state["step"], state["order"]["position"]) == (step, 16 * step)
        manifest = json.loads((folder / "manifest.json").read_text())
        names = {"encoder.safetensors", "optimizer.safetensors", "state.json"}
        assert set(manifest["files"]) == names | {f"head-0-{classes}.safetensors"}
        for name, facts in manifest["files"].items():
            assert facts["sha256"] == sha256_file(folder / name)
            assert facts["bytes"] == (folder / name).stat().st_size


def test_training_moves_every_weight_and_both_moments(finished, tiny_vit, shard_set):
    before = new_training(shard_set, image_config(tiny_vit))
    first, last = (load_file(checkpoint(finished, s) / "encoder.safetensors") for s in (2, STEPS))
    for name, parameter in before.encoder.named_parameters():
        assert torch.equal(parameter, last[name]) != parameter.requires_grad, name
        assert torch.equal(first[name], last[name]) != parameter.requires_grad, name
    saved = load_file(checkpoint(finished, STEPS) / "optimizer.safetensors")
    trained = [n for n, p in before.encoder.named_parameters() if p.requires_grad]
    assert set(saved) == {f"{m}/{n}" for n in trained for m in ("exp_avg", "exp_avg_sq")}
    head = load_file(next(checkpoint(finished, STEPS).glob("head-*")))
    assert set(head) == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert not torch.equal(head["weight"], before.head.weight)


def test_saved_and_loaded_is_bit_equal(finished, tiny_vit, shard_set, tmp_path):
    config, runtime = image_config(tiny_vit), Runtime("cpu")
    one, other = new_training(shard_set, config), new_training(shard_set, config)
    assert Checkpoints(finished, 9, runtime).load_newest(one) == STEPS
    Checkpoints(tmp_path, 9, runtime).save(one, STEPS)
    assert Checkpoints(tmp_path, 9, runtime).load_newest(other) == STEPS
    assert equal_tensors(state_of(one), state_of(other))
    steps = {float(state["step"]) for state in other.optimizer.state.values()}
    assert steps == {float(STEPS)}
    for file in checkpoint(finished, STEPS).glob("*.safetensors"):
        assert file.read_bytes() == (checkpoint(tmp_path, STEPS) / file.name).read_bytes()


def test_no_more_checkpoints_than_keep_stay(finished, tiny_vit, shard_set, tmp_path):
    training, runtime = new_training(shard_set, image_config(tiny_vit)), Runtime("cpu")
    Checkpoints(finished, 9, runtime).load_newest(training)
    keeper = Checkpoints(tmp_path, 2, runtime)
    for step in (10, 20, 30, 100_000_00):
        keeper.save(training, step)
    manifest = checkpoint(tmp_path, step) / "manifest.json"
    written = manifest.stat().st_mtime_ns
    keeper.save(training, step)
    assert manifest.stat().st_mtime_ns == written  # it was there
    assert sorted((tmp_path / "checkpoints").iterdir()) == [
        checkpoint(tmp_path, step) for step in (30, 100_000_00)
    ]


def test_what_a_killed_save_left_is_no_checkpoint(finished, tiny_vit, shard_set, tmp_path):
    training, runtime = new_training(shard_set, image_config(tiny_vit)), Runtime("cpu")
    Checkpoints(finished, 9, runtime).load_newest(training)
    half = tmp_path / "checkpoints/.step-00000009.tmp"
    half.mkdir(parents=True)
    (half / "head-3-4.safetensors").write_bytes(b"half")
    keeper = Checkpoints(tmp_path, 2, runtime)
    assert keeper.load_newest(training) == 0
    keeper.save(training, 9)
    assert not checkpoint_fault(checkpoint(tmp_path, 9))
    assert not (checkpoint(tmp_path, 9) / "head-3-4.safetensors").exists()
    assert keeper.load_newest(training) == 9


def test_another_number_of_classes_is_refused(finished, tiny_vit, shard_set):
    training = new_training(shard_set, image_config(tiny_vit))
    training.head.classes += 1
    with pytest.raises(BadInput, match="number of classes"):
        Checkpoints(finished, 9, Runtime("cpu")).load_newest(training)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"fingerprint": "0" * 64}, "another order: fingerprint"),
        ({"seed": 9}, "another order: seed 0 there, 9 now"),
        ({"mode": {"order": "window"}}, "another order: mode"),
        ({"batch": 8}, "with another batch_size"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(
    finished, tiny_vit, shard_set, monkeypatch, other, message
):
    training = new_training(shard_set, image_config(tiny_vit))
    monkeypatch.setattr(TrainingItems, "state", replace(training.items.state, **other))
    with pytest.raises(BadInput, match=rf"step-{STEPS:08d}: .*{message}"):
        Checkpoints(finished, 9, Runtime("cpu")).load_newest(training)


# Damage


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    cut_off, tiny_vit, shard_set, caplog, how
):
    damage(checkpoint(cut_off, STEPS), how)
    training = new_training(shard_set, image_config(tiny_vit))
    with caplog.at_level(logging.WARNING, "dist_train"):
        assert Checkpoints(cut_off, 9, Runtime("cpu")).load_newest(training) == 6
    assert f"step-{STEPS:08d}" in caplog.text
    assert "going back to the one before" in caplog.text
    wanted = load_file(checkpoint(cut_off, 6) / "encoder.safetensors")
    assert equal_tensors(dict(training.encoder.state_dict()), wanted)


def test_with_all_checkpoints_damaged_it_starts_at_the_beginning(cut_off, tiny_vit, shard_set):
    for folder, how in zip(sorted((cut_off / "checkpoints").iterdir()), HOW, strict=False):
        damage(folder, how)
    training = new_training(shard_set, image_config(tiny_vit))
    before = {k: v.clone() for k, v in training.encoder.state_dict().items()}
    assert Checkpoints(cut_off, 9, Runtime("cpu")).load_newest(training) == 0
    assert equal_tensors(before, dict(training.encoder.state_dict()))
    assert not training.optimizer.state


@pytest.mark.parametrize("how", ["flipped", "no manifest"])
def test_a_damaged_checkpoint_is_written_again(cut_off, finished, tiny_vit, shard_set, how):
    damage(checkpoint(cut_off, 6), how)
    remove_checkpoints_after(cut_off, 6)
    train("image", shard_set, cut_off, image_config(tiny_vit))
    for folder in (cut_off / "checkpoints").iterdir():
        assert checkpoint_fault(folder) == ""
    assert_same_end(finished, cut_off)


# Lives that go on


@pytest.mark.parametrize("step", [2, 6, STEPS])
def test_a_resumed_run_ends_bit_equal(cut_off, finished, tiny_vit, shard_set, caplog, step):
    remove_checkpoints_after(cut_off, step)
    with caplog.at_level(logging.INFO, "dist_train"):
        train("image", shard_set, cut_off, image_config(tiny_vit))
    assert f"going on from step {step}" in caplog.text
    assert_same_end(finished, cut_off)


@pytest.mark.parametrize("step", [2, 6, STEPS])
def test_the_curves_of_a_resumed_run_do_not_fork(cut_off, finished, tiny_vit, shard_set, step):
    remove_checkpoints_after(cut_off, step)
    train("image", shard_set, cut_off, image_config(tiny_vit))
    assert without_rate(cut_off) == without_rate(finished)


@pytest.fixture(scope="module")
def stopped(shard_set, tiny_bert, tmp_path_factory) -> dict[str, Path]:
    """A text run in one attempt, and the same stopped by a signal and started again."""
    out = tmp_path_factory.mktemp("stopped")
    encoder = TextEncoderOptions(model=str(tiny_bert), max_length=24, dropout=0.1)
    full = {"epochs": 2, "checkpoint_every": 1, "keep": 2, "validate_every": 0, "lr": 1e-3}
    config = TextTraining(encoder=encoder, accumulation=2, **COMMON | full)
    train("text", shard_set, out / "whole", config)

    def stop_soon() -> None:
        begun = out / "stopped/checkpoints/step-00000002"
        while not begun.exists() and threading.main_thread().is_alive():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGUSR1)

    watcher = threading.Thread(target=stop_soon, daemon=True)
    watcher.start()
    with pytest.raises(Stopped, match=r"after step \d+, checkpoint written"):
        train("text", shard_set, out / "stopped", config)
    watcher.join()
    status = json.loads((out / "stopped/status.json").read_text())
    assert status["status"] == "preempted"
    newest = max((out / "stopped/checkpoints").glob("step-*"))
    assert checkpoint_fault(newest) == ""
    assert 2 <= int(newest.name[5:]) < 23
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # as in a new process, of which no stop was requested
    train("text", shard_set, out / "stopped", config)
    return {"whole": out / "whole", "stopped": out / "stopped"}


def test_a_run_stopped_by_a_signal_ends_bit_equal(stopped):
    for name in ("model.safetensors", "neck.safetensors"):
        whole, again = (run / "encoder" / name for run in stopped.values())
        assert whole.read_bytes() == again.read_bytes()
    assert json.loads((stopped["stopped"] / "status.json").read_text())["status"] == "done"
    assert without_rate(stopped["stopped"]) == without_rate(stopped["whole"])


def test_a_stopped_process_leaves_every_row_on_disk(shard_set, tiny_vit, tmp_path):
    run = tmp_path / "run"
    options = {
        "--shards": shard_set, "--out": run, "--encoder.model": tiny_vit, "--workers": 0,
        "--encoder.image-size": 32, "--epochs": 100, "--batch-size": 16, "--device": "cpu",
        "--precision": "fp32", "--log-every": 1, "--checkpoint-every": 5, "--validate-every": 0,
    }  # fmt: skip
    arguments = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "dist_train", "train", "image", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not checkpoint(run, 5).exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 3, output
    assert json.loads((run / "status.json").read_text())["status"] == "preempted"
    step = int(max((run / "checkpoints").glob("step-*")).name[5:])
    written = [row["step"] for row in read_metrics(run) if "train/loss" in row]
    assert written == list(range(1, step + 1))
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert "train/loss" in board.Tags()["scalars"]
    assert [event.step for event in board.Scalars("train/loss")] == written


def test_a_finished_run_is_left_as_it_is(finished, tiny_vit, shard_set):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    train("image", shard_set, finished, image_config(tiny_vit))
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_another_config_is_refused(finished, tiny_vit, shard_set):
    with pytest.raises(BadInput, match=r"lr 0\.001 there, 0\.002 requested"):
        train("image", shard_set, finished, image_config(tiny_vit, lr=2e-3))
    train("image", shard_set, finished, image_config(tiny_vit, workers=2, log_every=5, keep=1))


def test_workers_change_no_weight(finished, tiny_vit, shard_set):
    out = finished.with_name("two-workers")
    train("image", shard_set, out, image_config(tiny_vit, workers=2))
    assert_same_end(finished, out)


def test_the_exported_encoder_is_the_last_checkpoint(finished):
    saved = load_file(checkpoint(finished, STEPS) / "encoder.safetensors")
    assert equal_tensors(dict(load_encoder(finished / "encoder", "image").state_dict()), saved)


def test_an_untrained_run_exports_the_start(shard_set, tiny_vit, tmp_path):
    config = image_config(tiny_vit, epochs=0)
    train("image", shard_set, tmp_path / "run", config)
    start = new_training(shard_set, config).encoder.state_dict()
    assert equal_tensors(
        dict(load_encoder(tmp_path / "run/encoder", "image").state_dict()), dict(start)
    )  # fmt: skip
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_loss_that_is_nan_is_reported_with_its_step(shard_set, tiny_vit, tmp_path):
    config = image_config(tiny_vit, lr=1e30, warmup=0.0, validate_every=0)
    with pytest.raises(Failed, match=r"step 5: 5 steps in a row had a .* \(loss nan.*lower lr"):
        train("image", shard_set, tmp_path / "run", config)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed"
    assert "5 steps in a row" in status["reason"]


def test_no_pickle_lies_in_a_run(finished):
    known = {".json", ".jsonl", ".safetensors", ".md", ".txt"}
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert path.suffix in known or path.name.startswith("events.out.tfevents"), path
        begins = path.read_bytes()[:2]
        assert begins != b"PK", path  # the zip that torch.save writes
        assert begins[:1] != b"\x80" or path.suffix == ".safetensors", path
