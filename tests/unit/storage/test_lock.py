"""One process at a time: who waits, who goes on, and what a file system without locks does."""

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shards.storage.lock import locked

HOLD = """
import sys
from pathlib import Path
from shards.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path, order = tmp_path / "deep" / "er" / "lock", []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"

        def wait() -> None:
            with locked(path):
                order.append("ours")

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.2)
        assert order == []
        order.append("killed")
        other.kill()
        waiting.join(20)
    assert order == ["killed", "ours"]


def test_one_at_a_time_and_free_after_an_error(tmp_path: Path) -> None:
    inside, most = [], []

    def work() -> None:
        for _ in range(20):
            with locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (80, 1)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        raise ZeroDivisionError
    with locked(tmp_path / "lock"):
        pass
    assert os.listdir("/proc/self/fd") == before


def test_who_waited_for_a_folder_that_was_removed_holds_the_new_lock(tmp_path: Path) -> None:
    """Else it and the next that comes would both go on."""
    path, got, leave = tmp_path / "work" / "lock", threading.Event(), threading.Event()

    def wait() -> None:
        with locked(path):
            got.set()
            leave.wait(20)

    waiting, before = threading.Thread(target=wait), os.listdir("/proc/self/fd")
    with locked(path):
        waiting.start()
        waiting.join(0.2)
        shutil.rmtree(path.parent)
    assert got.wait(20)
    with path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    leave.set()
    waiting.join()
    assert os.listdir("/proc/self/fd") == before


def test_a_stop_while_it_waits_is_heard_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(file: int, kind: int) -> None:
        raise KeyboardInterrupt

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "flock", stopped)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock"):
        pytest.fail("went on without the lock")
    assert os.listdir("/proc/self/fd") == before


def test_a_file_system_without_locks_is_gone_on_with_after_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO, errno.EACCES]

    def failing(file: int, kind: int) -> None:
        assert kind == fcntl.LOCK_EX
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", failing)
    before = os.listdir("/proc/self/fd")
    with caplog.at_level(logging.WARNING):
        for times, number in enumerate(numbers[:3], 1):  # noqa: B007
            with locked(tmp_path / "lock"):
                assert len(caplog.records) == times
    assert "lock: a file system without locks" in caplog.text
    for number in numbers[3:]:
        with pytest.raises(OSError, match=os.strerror(number)), locked(tmp_path / "lock"):
            pytest.fail("went on without the lock")
    assert os.listdir("/proc/self/fd") == before
