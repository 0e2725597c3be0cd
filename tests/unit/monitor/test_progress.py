"""How far the work is, in a log: a line a minute with the time left at this process's own pace."""

import logging

import pytest

from dist_train.monitor.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that every bar sees, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_line_a_minute(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress_bar("join", "block pair", 100, quiet=False) as bar:
        bar.n, bar.initial = 40, 40  # another process did these
        for _ in range(20):
            clock[0] += 10
            bar.update(1)
    lines = [record.message for record in caplog.records]
    assert lines == [
        "join: 0 of 100 block pairs done, ? left at this pace",
        "join: 46 of 100 block pairs done, 09:00 left at this pace",
        "join: 52 of 100 block pairs done, 08:00 left at this pace",
        "join: 58 of 100 block pairs done, 07:00 left at this pace",
        "join: 60 of 100 block pairs done, 06:40 left at this pace",
    ]


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress_bar("join", "block pair", 2, quiet=True) as bar:
        bar.update(2)
    assert not caplog.records
