"""Whole short runs with every option on: attempts that go on, early ends, the best encoder kept."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_train.encoders.encoder import load_encoder
from dist_train.training import validation
from dist_train.training.loop import train
from shards.storage.errors import Stopped
from tests.support.damage import spoil_batch
from tests.support.short_training import (
    EVERY_OPTION,
    IMAGE_OPTIONS,
    STEPS,
    assert_same_end,
    checkpoint,
    equal_tensors,
    image_config,
    remove_checkpoints_after,
    text_config,
    without_rate,
)


def begin_again(run: Path, step: int, name: str) -> Path:
    """A copy of a finished run as if killed after the checkpoint of `step`."""
    out = run.with_name(name)
    shutil.copytree(run, out)
    shutil.rmtree(out / "encoder")
    (out / "manifest.json").unlink()
    remove_checkpoints_after(out, step)
    return out


def exported(run: Path, modality: str = "image") -> dict[str, torch.Tensor]:
    return dict(load_encoder(run / "encoder", modality).state_dict())


def counts(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())["counts"]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_with_every_option_a_resumed_run_ends_bit_equal(
    shard_set, tiny_vit, tiny_bert, tmp_path, modality
):
    if modality == "image":
        config = image_config(tiny_vit, **EVERY_OPTION | IMAGE_OPTIONS)
    else:
        config = text_config(
            tiny_bert, **EVERY_OPTION | {"epochs": 0.6, "checkpoint_every": 2, "keep": 9}
        )  # fmt: skip
        config = replace(config, encoder=replace(config.encoder, pooling="cls", dropout=0.1))
    train(modality, shard_set, tmp_path / "run", config)
    again = begin_again(tmp_path / "run", 4, "again")
    train(modality, shard_set, again, config)
    assert_same_end(tmp_path / "run", again)
    assert without_rate(again) == without_rate(tmp_path / "run")
    newest = checkpoint(again, STEPS)
    weights, average = (load_file(newest / f"{n}.safetensors") for n in ("encoder", "average"))
    assert not equal_tensors(weights, average)


def test_a_step_left_out_is_left_out_of_the_count_that_a_resumed_run_goes_on_with(
    shard_set, tiny_vit, tmp_path, monkeypatch
):
    config = image_config(tiny_vit)
    spoil_batch(monkeypatch, shard_set, config, 2)
    train("image", shard_set, tmp_path / "run", config)
    assert counts(tmp_path / "run")["skipped"] == 1
    again = begin_again(tmp_path / "run", 4, "again")
    train("image", shard_set, again, config)
    assert_same_end(tmp_path / "run", again)
    rows = [row["train/skipped"] for row in without_rate(again) if "train/skipped" in row]
    assert rows == [0, 0, 1, 1, 1, 1, 1]


# The best encoder, and when it is enough


@pytest.fixture
def scored(monkeypatch):
    """Has validations give these F1 values in turn, one a step; how many there were."""

    def by(values: list[float]) -> list[float]:
        left = list(values)

        def score(self, encoder, config, runtime):
            return {"f1": left.pop(0), "threshold": 0.5, "f1_self_match": 0.1, "items": 9}

        monkeypatch.setattr(validation.ValidationItems, "score", score)
        return left

    return by


def every_step(tiny_vit, **options):
    full = {"validate_every": 0.001, "checkpoint_every": 1, "keep_best": True} | options
    return image_config(tiny_vit, **full)


def test_the_best_encoder_since_the_first_step_is_exported(
    shard_set, tiny_vit, tmp_path, scored, caplog
):
    scored([0.9, 0.3, 0.6, 0.5, 0.6, 0.4, 0.2, 0.1])
    train("image", shard_set, tmp_path / "run", every_step(tiny_vit))
    assert "val F1 0.6000 after training is below the 0.9000 before" in caplog.text
    wanted = load_file(checkpoint(tmp_path / "run", 2) / "encoder.safetensors")
    assert equal_tensors(exported(tmp_path / "run"), wanted)
    assert counts(tmp_path / "run")["exported_step"] == 2
    assert counts(tmp_path / "run")["val"]["f1"] == 0.6
    card = (tmp_path / "run/encoder/README.md").read_text()
    assert "after step 2 of 7" in card
    for row in (
        "| this encoder | 0.6000 |",
        "before training | 0.9000 |",
        "only with itself | 0.1000 |",
    ):
        assert row in card
    assert "| head.margin | 0.5 |" in card


@pytest.mark.parametrize("keep_best", [True, False])
def test_training_ends_when_it_is_no_better_for_long(
    shard_set, tiny_vit, tmp_path, scored, keep_best, caplog
):
    left = scored([0.2, 0.3, 0.6, 0.5, 0.6, 0.9, 0.9, 0.9])
    # No checkpoint but the one that an early end leaves.
    config = every_step(tiny_vit, patience=2, keep_best=keep_best, checkpoint_every=100)
    train("image", shard_set, tmp_path / "run", config)
    assert left == [0.9] * 3
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    assert "after training is below" not in caplog.text
    assert counts(tmp_path / "run")["exported_step"] == (2 if keep_best else 4)
    again = begin_again(tmp_path / "run", 4, "again")  # killed before it was exported
    scored([])
    train("image", shard_set, again, config)
    assert equal_tensors(exported(again), exported(tmp_path / "run"))
    assert counts(again)["val"]["f1"] == 0.6


# A signal while it validates


@pytest.mark.parametrize("at", [0, 4, STEPS])
def test_a_signal_in_a_validation_is_heard(shard_set, tiny_vit, tmp_path, monkeypatch, at):
    config = image_config(tiny_vit, validate_every=0.34, keep_best=True)  # steps 0, 4 and the last
    train("image", shard_set, tmp_path / "whole", config)
    unit_vectors, begun = validation.unit_vectors, []

    def interrupted(*arguments):
        begun.append(1)
        if len(begun) == {0: 1, 4: 6, STEPS: 11}[at]:  # five batches a validation
            os.kill(os.getpid(), signal.SIGTERM)
        return unit_vectors(*arguments)

    monkeypatch.setattr(validation, "unit_vectors", interrupted)
    with pytest.raises(Stopped, match=f"in the validation of step {at}$"):
        train("image", shard_set, tmp_path / "run", config)
    assert (checkpoint(tmp_path / "run", at).exists()) == (at > 0)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # as in a new process
    train("image", shard_set, tmp_path / "run", config)
    assert without_rate(tmp_path / "run") == without_rate(tmp_path / "whole")
    assert equal_tensors(exported(tmp_path / "run"), exported(tmp_path / "whole"))
