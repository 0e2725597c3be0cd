"""Signals to the whole process group, as Slurm, a container's stop and a terminal send them.

Loader workers get them too. Whatever the moment, the verb ends with 3, its work is on disk, nothing
of it stays alive, and the same command ends in the bytes of an undisturbed run.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import psutil
import pytest

from shards.storage.stage_files import status_of
from shards.storage.stops import stops_blocked
from shards.storage.workers import leave_stops_to_parent
from tests.support.comparing import losses, weights
from tests.support.launching import command, environment, run
from tests.support.processes import kill, wait_for

pytestmark = pytest.mark.timeout(1800)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start(world: int, *verb: object) -> subprocess.Popen:
    """A verb in a new process group, as a shell or Slurm starts it."""
    return subprocess.Popen(
        command(world, *verb), env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def processes_of(out: Path) -> list[psutil.Process]:
    """Every living process that was started for `out`, loader workers among them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(out) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def signalled(out: Path, verb: list[object], draw: random.Random, longest: float) -> list[int]:
    """Start the verb once for each signal, at a random moment sent to its group; its exit codes."""
    codes: list[int] = []
    for number in draw.sample(SIGNALS, len(SIGNALS)):
        (out / "status.json").unlink(missing_ok=True)
        process = start(1, *verb)
        try:
            wait_for(lambda: status_of(out) == "running", process)
            time.sleep(draw.uniform(0, longest))
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=120)
        finally:
            kill(process)
        assert process.returncode in (0, 3), output
        assert status_of(out) == {0: "done", 3: "preempted"}[process.returncode], output
        assert "Traceback" not in output
        assert processes_of(out) == []
        codes.append(process.returncode)
        if codes[-1] == 0:  # it had ended before
            break
    return codes


@pytest.fixture(scope="module")
def train(image_options: list[object]) -> Callable[[Path], list[object]]:
    """The shared training, longer, with loader workers; validations and saves among its steps."""
    given = dict(zip(image_options[::2], image_options[1::2], strict=True))
    given |= {"--workers": 2, "--epochs": 4, "--validate-every": 1, "--checkpoint-every": 7}
    arguments = [word for pair in given.items() for word in pair]
    return lambda out: ["train", "image", *arguments, "--out", out]


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(1, *train(out))
    return out


@pytest.mark.parametrize(
    "trial", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 9))]
)
def test_a_training_signalled_at_random_moments(
    trial: int, train, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert 3 in signalled(out, train(out), random.Random(trial), 2.5)
    run(1, *train(out))
    assert losses(out) == losses(trained)
    ours, theirs = weights(out), weights(trained)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_ranks_under_a_launcher_save_when_its_group_is_signalled(
    number: int, train, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(2, *train(out))
    try:
        wait_for((out / "checkpoints").exists, process, 120)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=120)
    finally:
        kill(process)
    assert status_of(out) == "preempted", output
    assert "checkpoint written" in output or "in the validation" in output
    assert "DataLoader worker" not in output
    assert processes_of(out) == []


@pytest.mark.parametrize(
    "trial", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 9))]
)
def test_an_embedding_signalled_at_random_moments(
    trial: int, shard_set: Path, image_run: Path, embedded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "embedding"
    verb = embed(shard_set, image_run, out)
    signalled(out, verb, random.Random(trial), 1.5)
    run(1, *verb)
    for path in embedded.glob("*.npy"):
        np.testing.assert_array_equal(np.load(out / path.name), np.load(path))
    assert json.loads((out / "manifest.json").read_text())["files"]


def embed(shards: Path, run: Path, out: Path) -> list[object]:
    """With the loader workers that are the default, in small batches."""
    return ["embed", "--shards", shards, "--image", run, "--out", out, "--batch-size", 4]


@pytest.fixture(scope="module")
def embedded(shard_set: Path, image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "embedding"
    run(1, *embed(shard_set, image_run, out))
    return out


@pytest.mark.parametrize(
    "trial", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 9))]
)
def test_a_pack_signalled_at_random_moments(
    trial: int, catalogue: Path, shard_set: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    verb = [
        "pack", catalogue / "catalogue.csv", "--images", catalogue / "images", "--out", out,
        "--size", 48, "--workers", 2,
    ]  # fmt: skip
    signalled(out, verb, random.Random(trial), 2)  # the workers start within the first
    run(1, *verb)
    for tar in shard_set.glob("*/*.tar"):
        assert (out / tar.relative_to(shard_set)).read_bytes() == tar.read_bytes()


def test_a_pack_signalled_as_its_workers_start(catalogue: Path, tmp_path: Path) -> None:
    """A process that is just starting Python has no handler yet."""
    out = tmp_path / "shards"
    verb = ["pack", catalogue / "catalogue.csv", "--images", catalogue / "images", "--out", out,
            "--size", 48, "--workers", 3]  # fmt: skip
    for workers in (1, 2, 3):
        process = start(1, *verb)
        try:
            ours = psutil.Process(process.pid)
            # One more is multiprocessing's resource tracker.
            wait_for(lambda ours=ours, n=workers + 1: len(ours.children()) >= n, process)
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=120)
        finally:
            kill(process)
        assert process.returncode == 3, output
        assert output.splitlines()[-1] == (
            f"dist-train: {out}: stopped by a signal; the same command goes on"
        )
        assert "Traceback" not in output


# ── every verb, from its first moments on


@pytest.fixture(scope="module")
def matched(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with index, pairs and matches over `embedded`."""
    folder = tmp_path_factory.mktemp("matched")
    for verb in matching(embedded, folder, folder).values():
        run(1, *verb)
    return folder


def matching(embedded: Path, ready: Path, out: Path) -> dict[str, list[object]]:
    """The commands of the stages after embed, by their verb; they read `ready` and write `out`."""
    return {
        "index": ["index", embedded, "--out", out / "index"],
        "join": ["join", embedded, "--index", ready / "index", "--out", out / "pairs"],
        "match": ["match", ready / "pairs", "--out", out / "matches"],
        "evaluate": ["evaluate", ready / "matches"],
        "report": ["report", ready / "matches"],
    }


def has_handlers(process: subprocess.Popen) -> bool:
    """Whether the process catches SIGTERM, which it does from its first lines of Python on."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    ("verb", "trial"),
    [
        *((verb, 0) for verb in ("match", "evaluate", "report")),
        *(
            pytest.param(verb, trial, marks=pytest.mark.full)
            for verb in ("generate", "verify", "index", "join", "match", "evaluate", "report")
            for trial in range(1, 4)
        ),
    ],
)
def test_a_verb_signalled_at_a_random_moment(
    verb: str, trial: int, shard_set: Path, embedded: Path, matched: Path, tmp_path: Path
) -> None:
    words = {
        "generate": ["generate", "--items", 2000, "--workers", 2, "--out", tmp_path / "generated"],
        "verify": ["verify", shard_set, "--workers", 2],
        **matching(embedded, matched, tmp_path),
    }[verb]
    draw = random.Random(f"{verb}{trial}")
    for number in draw.sample(SIGNALS, len(SIGNALS)):
        process = start(1, *words)
        try:
            wait_for(lambda process=process: has_handlers(process), process)
            time.sleep(draw.uniform(0, 3))
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=120)
        finally:
            kill(process)
        assert process.returncode in (0, 3), output
        assert "Traceback" not in output
        assert output.count("stopped by a signal") == (process.returncode == 3)
        for path in tmp_path.rglob("status.json"):
            assert status_of(path.parent) in ("done", "preempted")
        assert list(tmp_path.rglob("*.tmp-*")) == []
        assert processes_of(tmp_path) == []
    run(1, *words)


# ── workers and their parent


def test_loader_workers_end_with_a_killed_training(train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(1, *train(out))
    try:
        wait_for(lambda: len(processes_of(out)) == 3, process)
        process.kill()
        process.wait()
        end = time.monotonic() + 3  # by themselves torch's look for it every five seconds
        while processes_of(out):
            assert time.monotonic() < end, "workers outlive their training"
            time.sleep(0.05)
    finally:
        for left in processes_of(out):
            left.kill()


def test_a_killed_loader_worker_is_reported_in_one_line(train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(1, *train(out))
    try:
        wait_for(lambda: len(processes_of(out)) == 3, process)
        wait_for((out / "checkpoints").exists, process, 120)
        psutil.Process(process.pid).children()[-1].kill()
        output, _ = process.communicate(timeout=120)
    finally:
        kill(process)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert "a loader worker was killed, perhaps for lack of memory" in output.splitlines()[-1]
    assert status_of(out) == "failed"


def worker(begins: Event, ready: Event) -> None:
    """A process that leaves stops to its parent once it may begin."""
    begins.wait()
    leave_stops_to_parent()
    ready.set()
    time.sleep(60)
    os._exit(9)


def test_a_loader_worker_ends_by_its_parent_alone() -> None:
    context = multiprocessing.get_context("fork")
    begins, ready = context.Event(), context.Event()
    begins.set()
    with stops_blocked():
        child = context.Process(target=worker, args=(begins, ready))
        child.start()
        assert ready.wait(60)
    for number in SIGNALS:  # sent by another process than the parent
        subprocess.run(["kill", f"-{number.value}", str(child.pid)], check=True)
    os.kill(child.pid, signal.SIGINT)
    child.join(0.2)
    assert child.is_alive()
    child.terminate()
    child.join(60)
    assert child.exitcode == 0


def test_a_loader_worker_whose_parent_died_before_it_began_ends() -> None:
    context = multiprocessing.get_context("fork")
    begins, ready = context.Event(), context.Event()
    hears, says = context.Pipe(duplex=False)

    def parent() -> None:
        child = context.Process(target=worker, args=(begins, ready))
        child.start()
        says.send(child.pid)
        os._exit(0)

    process = context.Process(target=parent)
    process.start()
    left = psutil.Process(hears.recv())
    process.join(60)
    begins.set()
    left.wait(30)
    assert not ready.is_set()
