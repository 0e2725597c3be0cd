"""The same five steps under DDP and every ZeRO, against plain PyTorch in one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_train.config.training import HeadOptions, ImageEncoderOptions, ImageTraining
from shards.read.shard_set import ShardSet
from tests.support.launching import LAUNCHERS, run
from tests.support.plain_training import plain_training

pytestmark = pytest.mark.timeout(600)
STEPS = 5


def config(tiny_vit: Path, accumulation: int) -> ImageTraining:
    """A model without dropout and batch statistics; the clips are low enough to be at work."""
    encoder = ImageEncoderOptions(model=str(tiny_vit), image_size=32, neck=False)
    return ImageTraining(
        encoder=encoder, batch_size=24, accumulation=accumulation, epochs=0.6, lr=1e-4, clip=0.5,
        precision="fp32", head=HeadOptions(lr=1e-3), workers=0,
    )  # fmt: skip


def options_of(config: ImageTraining) -> list[object]:
    return [
        "--encoder.model", config.encoder.model, "--encoder.image-size", 32, "--encoder.no-neck",
        "--batch-size", 24, "--accumulation", config.accumulation, "--epochs", config.epochs,
        "--lr", config.lr, "--clip", config.clip, "--precision", "fp32", "--head.lr",
        config.head.lr, "--workers", 0, "--log-every", 1, "--validate-every", 0,
    ]  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_weights_equal_plain_pytorch(
    launcher: str, accumulation: int, tiny_vit: Path, shard_set: Path, tmp_path: Path
) -> None:
    wanted = config(tiny_vit, accumulation)
    out = tmp_path / "run"
    verb = ["train", "image", "--shards", shard_set, "--out", out, *options_of(wanted)]
    run(2, *verb, launcher=launcher)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == STEPS
    for part in ("grad_norm", "grad_norm_head"):
        assert max(row[f"train/{part}"] for row in steps) > wanted.clip  # clipping was at work
    rates = [(row["train/lr"], row["train/lr_head"]) for row in steps]
    plain = plain_training("image", ShardSet(shard_set), wanted, rates)
    assert [row["train/loss"] for row in steps] == pytest.approx(plain.losses, rel=1e-5)
    newest = out / "checkpoints" / f"step-{STEPS:08d}"
    trained = load_file(newest / "encoder.safetensors")
    for name, value in plain.encoder.state_dict().items():
        assert (trained[name] - value).abs().max() <= 1e-6, name
    parts = sorted(newest.glob("head-*"), key=lambda path: int(path.stem.split("-")[1]))
    assert len(parts) == 2
    head = torch.cat([load_file(path)["weight"] for path in parts])
    assert (head - plain.centres).abs().max() <= 1e-6
