"""A rank that hangs ends all within the timeout; one that works for longer is waited for."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_train.distributed.barrier import VARIABLE, timeout
from shards.storage.errors import BadInput
from tests.support.launching import ROOT, command, environment, free_port

pytestmark = pytest.mark.timeout(600)


SECONDS = 15
"""Above what two processes may start apart on a busy machine: the first barrier has it too."""


def start(arguments: list[str], **env: object) -> subprocess.Popen:
    """A command whose collectives may take SECONDS."""
    env = {VARIABLE: SECONDS, "GLOO_SOCKET_IFNAME": "lo"} | env
    return subprocess.Popen(
        arguments, env=environment() | {name: str(value) for name, value in env.items()}, cwd=ROOT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def rank_0_of_two(*arguments: object) -> tuple[int, str, float]:
    """Exit code and output of the first of two waiting_rank's, and the seconds it took."""
    rank_command = [sys.executable, "-m", "tests.distributed.waiting_rank", *map(str, arguments)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    began = time.monotonic()
    ranks = [start(rank_command, RANK=rank, LOCAL_RANK=rank, **where) for rank in range(2)]
    try:
        output, _ = ranks[0].communicate(timeout=200)
        return ranks[0].returncode, output, time.monotonic() - began
    finally:
        for rank in ranks:
            end(rank)


def end(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(30)


def test_a_rank_that_works_for_longer_than_the_timeout_is_waited_for() -> None:
    code, output, took = rank_0_of_two(2 * SECONDS, "-")
    assert code == 0, output
    assert took > 2 * SECONDS
    assert "rank 0 met" in output


def test_a_rank_that_is_silent_in_a_meeting_is_named_and_given_up() -> None:
    code, output, took = rank_0_of_two(0, "stopped")
    assert code != 0
    assert f"rank 1 has been silent for {SECONDS} s" in output
    assert took < 120


def test_a_rank_that_hangs_in_training_ends_all(image_options: list[object], tmp_path: Path):
    out = tmp_path / "run"
    options = [500 if option == 0.8 else option for option in image_options]  # of epochs
    train_command = command(2, "train", "image", *options, "--out", out)
    process = start(train_command)
    try:
        metrics, until = out / "metrics.jsonl", time.monotonic() + 200
        while not metrics.exists() or "train/loss" not in metrics.read_text():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, "no step was made"
            time.sleep(0.1)
        ranks = [p for p in psutil.Process(process.pid).children() if "dist_train" in p.cmdline()]
        second = next(p for p in ranks if p.environ().get("RANK") == "1")
        second.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        output, _ = process.communicate(timeout=120)
        took = time.monotonic() - stopped
    finally:
        end(process)
    assert process.returncode != 0
    assert took < SECONDS + 90, "and 30 s of the launcher before it kills, and a busy machine"
    assert "imed out" in output or "timeout" in output
    assert all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in ranks)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(BadInput, match=f"{VARIABLE}={text}"):
        timeout()
