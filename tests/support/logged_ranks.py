"""Trainings whose ranks log the items of every batch: see logging_rank."""

import json
import subprocess
from pathlib import Path

from tests.support.launching import command, environment


def start_logged(world: int, log: Path, *verb: object) -> subprocess.Popen:
    """A verb on `world` ranks that log the items of every batch."""
    arguments = command(world, *verb)
    at = arguments.index("dist_train", arguments.index("-m", 2) if world > 1 else 0)
    arguments[at : at + 1] = ["tests.support.logging_rank", str(log)]
    return subprocess.Popen(
        arguments, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def logged_rows(log: Path, rank: int) -> list:
    """The first step of an attempt on a rank, then its batches; empty when it was killed before."""
    path = log.with_name(f"{log.name}-{rank}.jsonl")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
