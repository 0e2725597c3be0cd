"""A training that stood still while the same command was started again: it writes nothing more."""

import signal
from pathlib import Path

from tests.faults.test_stops import rows_of, start, wait_for
from tests.support.comparing import losses, weights


def state_of(run: Path) -> dict[str, int]:
    """When every file of a run was last written; TensorBoard's are of one attempt each, and closed."""
    files = [path for path in run.rglob("*") if "tensorboard" not in path.parts]
    return {str(path): path.stat().st_mtime_ns for path in sorted(files)}


def test_an_older_life_that_wakes_up_stops(
    image_options: list[object], image_run: Path, tmp_path: Path
) -> None:  # fmt: skip
    verb = ["train", "image", *image_options, "--out", tmp_path / "run"]
    older = start(1, *verb)
    wait_for(lambda: rows_of(tmp_path / "run") >= 2, older, 280)
    older.send_signal(signal.SIGSTOP)
    newer = start(1, *verb)
    output, _ = newer.communicate(timeout=250)
    assert newer.returncode == 0, output
    before = state_of(tmp_path / "run")
    older.send_signal(signal.SIGCONT)
    output, _ = older.communicate(timeout=100)
    assert older.returncode == 1, output
    assert "this older start stops and writes nothing more" in output
    assert state_of(tmp_path / "run") == before
    assert losses(tmp_path / "run") == losses(image_run)
    ours, theirs = weights(tmp_path / "run"), weights(image_run)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
