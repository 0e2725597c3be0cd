"""Comparing runs of different numbers of processes."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dist_train.encoders.encoder import load_encoder
from shards.read.shard_set import ShardSet


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Backbone and neck of a finished run."""
    folder = run / "encoder"
    return load_file(folder / "model.safetensors") | load_file(folder / "neck.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    """Over all weights and neck statistics."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def vectors(run: Path, shards: Path) -> torch.Tensor:
    """Unit vectors of the val items that have a photo."""
    encoder = load_encoder(run / "encoder", "image")
    reader = ShardSet(shards).reader(["val"])
    items = [reader[k] for k in range(len(reader)) if reader[k].photo]
    with torch.inference_mode():
        return F.normalize(encoder(*encoder.inputs()(items, [0] * len(items))), dim=1)


def losses(run: Path) -> list[float]:
    """The training loss of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def metrics_written(run_folder: Path) -> int:
    """Rows of metrics.jsonl so far."""
    path = run_folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def write_times(run: Path) -> dict[str, int]:
    """When each file of a run was last written, without TensorBoard's: each attempt has its own."""
    files = [path for path in run.rglob("*") if "tensorboard" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in sorted(files)}
