"""Processes of a test: started, waited for, killed with all below them."""

import contextlib
import subprocess
import time

import psutil

from tests.support.launching import command, environment


def start(world: int, *verb: object) -> subprocess.Popen:
    """A verb, running."""
    return subprocess.Popen(
        command(world, *verb), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    """Until the condition holds; fails when the process ends first or time runs out."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended too early:\n{process.communicate()[0]}")
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and all below it (a launcher starts its ranks in new sessions)."""
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    for one in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate()
