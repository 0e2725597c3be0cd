"""Short real trainings in the process of the test, and what of them is compared."""

import shutil
from pathlib import Path

import torch

from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.batches import load
from dist_train.monitor.metrics import read_metrics
from dist_train.training.checkpoint import moments
from dist_train.training.data import training_items
from dist_train.training.loop import Stepper
from dist_train.training.setup import set_up
from shards.read.shard_set import ShardSet

STEPS = 7
"""That the training of `image_config` takes."""
COMMON = {"batch_size": 16, "workers": 0, "device": "cpu", "precision": "fp32", "log_every": 1}
EVERY_OPTION = {
    "ema": 0.7, "layer_decay": 0.7, "freeze": 0.2, "schedule": "one-cycle", "keep_best": True,
    "warmup": 0.3, "head": HeadOptions(warmup=0.1, lr=1e-2), "gradient_checkpointing": True,
}  # fmt: skip
IMAGE_OPTIONS = {
    "erase": 0.5, "rand_augment": "rand-m7-mstd0.5-inc1", "jitter": 0.4, "mixup": 0.4,
    "cutmix": 1.0,
}  # fmt: skip


def image_config(tiny_vit: Path, **options) -> ImageTraining:
    """Seven steps, a checkpoint after every second and the last."""
    encoder = ImageEncoderOptions(model=str(tiny_vit), image_size=32)
    full = {"epochs": 0.6, "checkpoint_every": 2, "keep": 9, "lr": 1e-3, "validate_every": 0.25}
    full |= {"keep_best": False}
    return ImageTraining(encoder=encoder, **COMMON | full | options)


def text_config(tiny_bert: Path, **options) -> TextTraining:
    """One epoch of the titles."""
    encoder = TextEncoderOptions(model=str(tiny_bert), max_length=24)
    return TextTraining(encoder=encoder, **COMMON | {"epochs": 1, "lr": 1e-3} | options)


def new_training(shard_set: Path, config):
    """A training before its first step."""
    runtime = Runtime("cpu")
    return set_up(training_items(ShardSet(shard_set), "image", config, 1), runtime)


def stepper_of(shard_set, config, steps: int = 4, spoilt: tuple[int, ...] = ()) -> Stepper:
    """A training before its first step; batches number `spoilt` hold NaN."""
    modality = "image" if isinstance(config, ImageTraining) else "text"
    runtime = Runtime("cpu")
    items = training_items(ShardSet(shard_set), modality, config, 1)
    training = set_up(items, runtime)
    inputs = training.encoder.inputs(config)
    batches = list(load(items.reader, inputs, items.plans(0, steps, 0, 1), 0))
    for number in spoilt:
        batches[number].inputs[0][2] = float("nan")
    return Stepper(training, iter(batches))


def checkpoint(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def remove_checkpoints_after(run: Path, step: int) -> None:
    """Leave only the checkpoints up to `step`."""
    for folder in (run / "checkpoints").iterdir():
        if folder > checkpoint(run, step):
            shutil.rmtree(folder)


def state_of(training) -> dict[str, torch.Tensor]:
    """Everything that a step depends on."""
    out = {f"encoder/{k}": v for k, v in training.encoder.state_dict().items()}
    out |= {f"moments/{k}": v for k, v in moments(training).items()}
    of_head = training.head_optimizer.state[training.head.weight]
    return out | {"head": training.head.weight} | {f"head/{k}": v for k, v in of_head.items()}


def equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """The same names, and every value equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def assert_same_end(one: Path, other: Path) -> None:
    """The encoders and the last checkpoints are equal to the byte."""
    files = [p.relative_to(one) for p in (one / "encoder").rglob("*") if p.is_file()]
    files += [p.relative_to(one) for p in checkpoint(one, STEPS).iterdir()]
    assert len(files) > 8
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def without_rate(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock and on what ran before in the process."""
    clock = {"samples_per_second", "step_seconds", "data_wait", "memory_gb"}
    rows = [row for row in read_metrics(run) if "save/seconds" not in row]
    return [{k: v for k, v in row.items() if k[6:] not in clock} for row in rows]
