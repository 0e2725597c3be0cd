"""A training of three steps that save, killed at each change of the disk and started again.

`-m tests.faults.every_save FOLDER SHARDS MODEL FIRST EACH`: FOLDER/undisturbed is what nothing
happened to, FOLDER/<point> what was killed there. From point FIRST on EACH-th ones are taken, until
there are no more; the last line printed lists them. Each attempt is a fork, so that
libraries are imported once.
"""

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path

import torch

from dist_train.config.training import ImageEncoderOptions, ImageTraining
from dist_train.training.data import training_items
from dist_train.training.loop import train
from shards.read.shard_set import ShardSet
from tests.support.dying_rank import Death

STEPS, BATCH = 3, 24


def attempt(shards: Path, model: Path, out: Path, point: int | None = None) -> int:
    """Train in a forked process that dies at `point`; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if point is not None:
            Death(point).arm()
        train("image", shards, out, options(shards, model))
        os._exit(0)
    finally:
        os._exit(1)


def options(shards: Path, model: Path) -> ImageTraining:
    """Three steps, a checkpoint after each, one of them kept: saving removes the one before."""
    encoder = ImageEncoderOptions(model=str(model), image_size=32)
    positions = training_items(ShardSet(shards), "image", ImageTraining(batch_size=BATCH), 1).order
    return ImageTraining(
        encoder=encoder, batch_size=BATCH, epochs=STEPS * BATCH / positions.positions,
        precision="fp32", checkpoint_every=1, keep=1, validate_every=0, log_every=1, workers=0,
        device="cpu",
    )  # fmt: skip


def main(folder: Path, shards: Path, model: Path, first: int, each: int) -> None:
    """Kill a training at each point and let the same command finish it."""
    torch.set_num_threads(1)  # threads would not be in the forks
    assert attempt(shards, model, folder / "undisturbed") == 0
    points = []
    for point in count(first, each):
        ended = attempt(shards, model, folder / str(point), point)
        if ended == 0:
            break  # there is no such change of the disk
        assert ended == -signal.SIGKILL
        assert attempt(shards, model, folder / str(point)) == 0, f"point {point}: does not go on"
        points.append(point)
    print(json.dumps(points))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:6]))
