"""Two starts of the same stage: the earlier one writes nothing once the later one has begun."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime
from dist_train.training import loop
from dist_train.training.loop import train
from shards.storage import stage_files
from shards.storage.errors import BadInput, Failed, Stopped
from tests.support.comparing import write_times
from tests.support.short_training import STEPS, checkpoint, image_config


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIST_TRAIN_JOB", "DIST_TRAIN_RESTART"):
        monkeypatch.delenv(name, raising=False)


def begin_newer(out: Path) -> None:
    """Another start of the stage writes its first word."""
    stage_files.write_status(out, "running", by=stage.new_attempt())


def status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


# ── what an attempt is


def test_every_start_is_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = [stage.new_attempt() for _ in range(100)]
    assert len({attempt["attempt"] for attempt in attempts}) == 100
    assert all(attempt.keys() == {"attempt"} for attempt in attempts)
    monkeypatch.setenv("DIST_TRAIN_JOB", "17_3")
    attempt = stage.new_attempt()
    assert (attempt["job"], attempt["restart"]) == ("17_3", 0)
    monkeypatch.setenv("DIST_TRAIN_RESTART", "4")
    assert stage.new_attempt()["restart"] == 4


@pytest.mark.parametrize(
    ("job", "restart", "late"),
    [("17", 1, True), ("17", 2, False), ("17", 3, False), ("18", 1, False), (None, 0, False)],
)
def test_before_it_begins_only_a_later_restart_of_its_job_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None, restart: int, late: bool
) -> None:
    """The status is of job 17, restart 2; `late` is the start that must not begin."""
    known = {"attempt": "x", "job": "17", "restart": 2}
    stage_files.begin(tmp_path, stage.RUN, {}, {})
    stage_files.write_status(tmp_path, "running", by=known)
    if job:
        monkeypatch.setenv("DIST_TRAIN_JOB", job)
        monkeypatch.setenv("DIST_TRAIN_RESTART", str(restart))
    before = write_times(tmp_path)
    runtime = Runtime("cpu")
    if late:
        with pytest.raises(BadInput, match="Slurm job 17 restart 2"):  # noqa: SIM117
            with runtime.stage(tmp_path, stage.RUN, {}, {}):
                pytest.fail("must not begin")
        assert write_times(tmp_path) == before
        return
    with runtime.stage(tmp_path, stage.RUN, {}, {}):
        assert status(tmp_path).get("job") == job
        assert status(tmp_path)["attempt"] != "x"


def test_once_begun_any_other_is_newer_and_named(tmp_path: Path) -> None:
    mine = stage.new_attempt()
    stage_files.begin(tmp_path, stage.RUN, {}, {})
    assert stage.newer_attempt(tmp_path, {}) == "", "it has not begun"
    stage_files.write_status(tmp_path, "running", by=mine)
    assert stage.newer_attempt(tmp_path, mine) == ""
    begin_newer(tmp_path)
    said = stage.newer_attempt(tmp_path, mine)
    assert said.startswith(f"{tmp_path}: begun again elsewhere ({os.uname().nodename});")
    stage_files.write_status(tmp_path, "running", by={"attempt": "y", "job": "17", "restart": 2})
    assert f"({os.uname().nodename}, Slurm job 17 restart 2)" in stage.newer_attempt(tmp_path, mine)


# ── a stage that ends when it is no longer the newest


@pytest.mark.parametrize(
    "ending",
    [Stopped("after step 4"), Failed("no room"), ValueError("bad"), KeyboardInterrupt(), None],
    ids=lambda ending: type(ending).__name__,
)
def test_the_earlier_one_ends_without_a_word(tmp_path: Path, ending: BaseException | None) -> None:
    """An interrupt is a wish to stop and raised as Stopped; other errors stay as they are."""
    out, runtime = tmp_path / "run", Runtime("cpu")

    def live() -> None:
        with runtime.stage(out, stage.RUN, {}, {}):
            runtime.check_newest(out)
            begin_newer(out)
            if ending is not None:
                raise ending
            runtime.check_newest(out)
            pytest.fail("must not commit")

    interrupted = isinstance(ending, KeyboardInterrupt)
    with pytest.raises(Stopped if interrupted else type(ending) if ending else Failed) as ended:
        live()
    assert ending is None or interrupted or ended.value is ending
    assert ending or "this older start stops and writes nothing more" in str(ended.value)
    found = status(out)
    assert (found["status"], found["reason"]) == ("running", "")
    assert found["attempt"] != runtime.attempt["attempt"]


def test_the_newest_keeps_its_name_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that, `status` and the next start know whose word it is."""
    monkeypatch.setenv("DIST_TRAIN_JOB", "17")
    monkeypatch.setenv("DIST_TRAIN_RESTART", "2")
    runtime = Runtime("cpu")
    for ending, state in ((Stopped("now"), "preempted"), (ValueError("bad"), "failed")):
        with pytest.raises(type(ending)), runtime.stage(tmp_path / state, stage.RUN, {}, {}):
            raise ending
        found = status(tmp_path / state)
        assert found["status"] == state
        assert {name: found[name] for name in runtime.attempt} == runtime.attempt
        assert (found["job"], found["restart"]) == ("17", 2)


# ── a training, at every place where it writes


@pytest.fixture
def at(caplog: pytest.LogCaptureFixture) -> Iterator:
    """Calls a function when the training says something for the first time."""
    log, handlers = logging.getLogger("dist_train"), []

    def when(words: str, then) -> None:
        class Listener(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if words in record.getMessage() and self in handlers:
                    handlers.remove(self)
                    then()

        handlers.append(Listener())
        log.addHandler(handlers[-1])

    yield when
    for handler in [h for h in log.handlers if type(h).__name__ == "Listener"]:
        log.removeHandler(handler)


QUIET = {"log_every": 99, "checkpoint_every": 99, "validate_every": 0, "compare_every": 0}


def stops(shard_set: Path, out: Path, config) -> None:
    """The training is the earlier one when it ends."""
    with pytest.raises(Failed, match="this older start stops and writes nothing more"):
        train("image", shard_set, out, config)
    assert status(out)["status"] == "running"
    assert not (out / "manifest.json").exists()
    assert not (out / "encoder").exists()


def test_no_row_of_metrics(shard_set: Path, tiny_vit: Path, tmp_path: Path, at) -> None:
    out = tmp_path / "run"
    at("step 3 of 7", lambda: begin_newer(out))
    stops(shard_set, out, image_config(tiny_vit, **QUIET | {"log_every": 1}))
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(rows) == 2


def test_no_checkpoint_is_begun_and_none_of_the_newer_removed(
    shard_set: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the newer one is writing lies beside what the older one would write."""
    out, real = tmp_path / "run", loop.load
    theirs = out / "checkpoints" / ".step-00000004.tmp-newer" / "head-00000.safetensors"

    def load(*arguments, **options):
        for number, batch in enumerate(real(*arguments, **options), 1):
            if number == 4:
                begin_newer(out)
                theirs.parent.mkdir()
                theirs.write_text("half of it")
            yield batch

    monkeypatch.setattr(loop, "load", load)
    stops(shard_set, out, image_config(tiny_vit, **QUIET | {"checkpoint_every": 2}))
    assert {path.name for path in (out / "checkpoints").iterdir()} == {
        checkpoint(out, 2).name, theirs.parent.name
    }  # fmt: skip
    assert theirs.read_text() == "half of it"


def test_no_checkpoint_is_put_in_place(
    shard_set: Path, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "run", os.fsync
    begun: list[int] = []

    def fsync(file: int) -> None:
        if not begun and list(out.glob("checkpoints/.step-00000004.tmp-*")):
            begun.append(1)
            begin_newer(out)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    stops(shard_set, out, image_config(tiny_vit, **QUIET | {"checkpoint_every": 2}))
    assert begun
    assert not checkpoint(out, 4).exists()


def test_no_encoder_and_no_manifest(shard_set: Path, tiny_vit: Path, tmp_path: Path, at) -> None:
    out = tmp_path / "run"
    at(f"step-{STEPS:08d}: written", lambda: begin_newer(out))
    stops(shard_set, out, image_config(tiny_vit, **QUIET))
    assert checkpoint(out, STEPS).exists()
