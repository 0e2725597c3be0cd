"""A training that stood still while the same command was started again: it writes nothing more."""

import signal
from pathlib import Path

from tests.support.comparing import losses, metrics_written, weights, write_times
from tests.support.processes import start, wait_for


def test_an_older_attempt_that_wakes_up_stops(
    image_options: list[object], image_run: Path, tmp_path: Path
) -> None:  # fmt: skip
    verb = ["train", "image", *image_options, "--out", tmp_path / "run"]
    older = start(1, *verb)
    wait_for(lambda: metrics_written(tmp_path / "run") >= 2, older, 280)
    older.send_signal(signal.SIGSTOP)
    newer = start(1, *verb)
    output, _ = newer.communicate(timeout=250)
    assert newer.returncode == 0, output
    before = write_times(tmp_path / "run")
    older.send_signal(signal.SIGCONT)
    output, _ = older.communicate(timeout=100)
    assert older.returncode == 1, output
    assert "this older start stops and writes nothing more" in output
    assert write_times(tmp_path / "run") == before
    assert losses(tmp_path / "run") == losses(image_run)
    ours, theirs = weights(tmp_path / "run"), weights(image_run)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
