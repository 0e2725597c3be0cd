"""Starting a verb on real processes, as a user does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU = "cpu.yaml"
LAUNCHERS = [CPU, *(f"deepspeed_zero{stage}.yaml" for stage in (1, 2, 3))]
"""Files of launch/accelerate that test_strategies trains under."""
DEFAULT = ROOT / "accelerate_config.yaml"
ONE = ROOT / "launch/accelerate/one_gpu.yaml"
MANY = ROOT / "launch/accelerate/many_nodes.yaml"
STARTED = [DEFAULT, ONE, MANY]
"""Files that test_launch_configs starts trainings with as they are."""


def environment() -> dict[str, str]:
    """The variables of a CPU machine: two single-thread ranks are two ranks' worth of work."""
    ours = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ours, "TOKENIZERS_PARALLELISM": "false"}


def command(world: int, *verb: object, launcher: str = CPU) -> list[str]:
    """The command line of a verb on `world` processes, under one of launch/accelerate's files."""
    arguments = [str(word) for word in verb]
    if world == 1 and launcher == CPU:
        return [sys.executable, "-m", "dist_train", *arguments]
    file = ROOT / "launch" / "accelerate" / launcher
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
        "--num_processes", str(world), "--main_process_port", str(free_port()),
        "--mixed_precision", "no", "-m", "dist_train", *arguments,
    ]  # fmt: skip


def run(world: int, *verb: object, launcher: str = CPU, timeout: float = 300) -> str:
    """Run a verb to its end; what it printed. Fails with that output when it fails."""
    env = environment()
    if launcher != CPU:
        env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
    done = subprocess.run(
        command(world, *verb, launcher=launcher), cwd=ROOT, env=env, text=True, timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
