"""One process among none: blocks of work, stop signals, the status of a stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.distributed.launcher import under_launcher
from dist_train.distributed.precision import autocast
from dist_train.distributed.runtime import Runtime, row_blocks, sum_over_ranks
from shards.storage import stage_files
from shards.storage.errors import BadInput, NoGPU, Stopped
from shards.storage.stops import stops_interrupt


@pytest.fixture
def runtime():
    """A runtime; its signal handlers go when the test ends (tests/conftest.py)."""
    return Runtime("cpu")


# Blocks


@settings(deadline=None)
@given(st.integers(0, 20_000), st.integers(1, 500), st.integers(0, 10_000))
def test_row_blocks_cover_exactly_within_their_bounds(rows, smallest, more):
    blocks = row_blocks(rows, smallest, smallest + more)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][
        : len(blocks)
    ]
    assert (blocks[-1].stop if blocks else 0) == rows
    assert all(len(block) > 0 for block in blocks)
    sizes = {len(block) for block in blocks[:-1]}
    assert len(sizes) <= 1
    assert all(smallest <= size <= smallest + more for size in sizes)


def test_about_64_blocks_where_the_bounds_let_it():
    assert len(row_blocks(1_000_000)) == 64
    assert len(row_blocks(100)) == 1
    assert len(row_blocks(10**8)) == -(-(10**8) // 65_536)


# One process


def test_a_runtime_alone(runtime):
    assert (runtime.rank, runtime.world, runtime.is_main) == (0, 1, True)
    assert runtime.device == torch.device("cpu")
    assert runtime.share([1, 2, 3]) == [1, 2, 3]
    assert runtime.all_reduce_sum(2.5) == 2.5
    assert runtime.broadcast({"a": [1]}) == {"a": [1]}
    runtime.barrier()
    values = torch.ones(3, requires_grad=True)
    sum_over_ranks(values).sum().backward()
    assert values.grad.tolist() == [1, 1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(NoGPU, match="--device cuda"):
        Runtime("cuda")


def test_autocast_follows_the_option():
    cpu = torch.device("cpu")
    x = torch.ones(2, 2)
    with autocast("bf16", cpu):
        assert (x @ x).dtype == torch.bfloat16
        with autocast("fp32", cpu):
            assert (x @ x).dtype == torch.float32


def test_under_launcher_reads_what_launchers_set(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not under_launcher()
    monkeypatch.setenv("RANK", "0")
    assert under_launcher()


# Stage


def test_a_stage_tells_how_it_ended(runtime, tmp_path):
    def status() -> tuple[str, str]:
        told = json.loads((tmp_path / "out/status.json").read_text())
        return told["status"], told["reason"]

    def work(ending: BaseException | None) -> None:
        with runtime.stage(tmp_path / "out", "run", {"a": 1}, {}) as done:
            assert not done
            assert status() == ("running", "")
            if ending is not None:
                raise ending
            (tmp_path / "out/x").write_text("x")
            stage_files.finish(tmp_path / "out", {}, [tmp_path / "out/x"])

    with pytest.raises(Stopped):
        work(Stopped("after step 4"))
    assert status() == ("preempted", "after step 4")
    with pytest.raises(ValueError, match="bad"):
        work(ValueError("bad"))
    assert status() == ("failed", "rank 0: ValueError: bad")
    with pytest.raises(SystemError):
        work(SystemError())
    assert status()[0] == "failed"
    work(None)
    assert status() == ("done", "")
    with runtime.stage(tmp_path / "out", "run", {"a": 1}, {}) as done:
        assert done is True
    assert status() == ("done", "")


def test_a_stage_refuses_a_foreign_folder_without_a_trace(runtime, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(BadInput, match="something else"), runtime.stage(tmp_path, "run", {}, {}):
        pytest.fail("must not begin")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(runtime, number):
    assert not runtime.stop_requested()
    assert not runtime.any_stop_requested()
    runtime.stop_together(Path("m"))
    os.kill(os.getpid(), number)
    assert runtime.stop_requested()
    assert runtime.any_stop_requested()
    with pytest.raises(Stopped, match="m: stopped by a signal; the same command goes on"):
        runtime.stop_together(Path("m"))
    os.kill(os.getpid(), number)  # at once again: a launcher passing it on
    assert runtime.stop_requested()


def stage_interrupted(runtime: Runtime, out: Path, work) -> None:
    """A stage that does `work`, which a signal ends."""

    def begun() -> None:
        with runtime.stage(out, "run", {}, {}):
            work()
            pytest.fail("goes on")

    with pytest.raises(Stopped, match="out: stopped by a signal; the same command goes on"):
        begun()
    assert stage_files.status_of(out) == "preempted"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_of_one_process_at_once(runtime, tmp_path, number):
    stage_interrupted(runtime, tmp_path / "out", lambda: os.kill(os.getpid(), number))


def test_a_signal_before_the_stage_ends_it_as_it_begins(runtime, tmp_path):
    os.kill(os.getpid(), signal.SIGINT)
    stage_interrupted(runtime, tmp_path / "out", lambda: pytest.fail("begins"))


def test_what_may_not_be_torn_apart_looks_for_the_signal_itself(runtime, tmp_path):
    with runtime.stage(tmp_path / "out", "run", {}, {}), stops_interrupt(False):
        os.kill(os.getpid(), signal.SIGINT)
        assert runtime.stop_requested()


def test_a_destructor_that_swallows_the_signal_does_not_lose_it(runtime, tmp_path):
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        Dying()
        time.sleep(10)

    stage_interrupted(runtime, tmp_path / "out", work)


def test_a_library_that_makes_an_error_of_the_signal_does_not_fail_the_stage(runtime, tmp_path):
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise RuntimeError("user-defined function raised exception") from error

    stage_interrupted(runtime, tmp_path / "out", work)


def test_a_child_process_does_not_catch_the_stop(runtime):
    """One that a library forks ends on SIGTERM and goes on after SIGUSR1."""
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0 if runtime.stop_requested() else 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    hears, says = os.pipe()
    child = os.fork()
    if not child:
        os.write(says, b"!")  # Python forgets signals that come before a fork has ended
        time.sleep(30)
        os._exit(9)
    os.read(hears, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGTERM)
    os.close(hears)
    os.close(says)
    assert not runtime.stop_requested()


def python(code: str, *arguments: str, **env: str) -> subprocess.Popen:
    """A fresh interpreter, without what a launcher would have left in the environment."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in left}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=clean | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


STUBBORN = """
import time
from dist_train.distributed.runtime import Runtime
from shards.storage.stops import StopFlag
StopFlag.GRACE = 1.0
mine = Runtime("cpu")
print("ready", flush=True)
told = False
while True:
    time.sleep(0.01)
    if mine.stop_requested() and not told:
        print("asked", flush=True)
        told = True
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_only_after_the_grace(number):
    process = python(STUBBORN)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.9)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=20) == -number
    finally:
        process.kill()
        process.communicate()


STUCK = """
import hashlib
from shards.storage.stops import StopFlag
StopFlag.GRACE = 1.0
StopFlag.installed()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a line of Python
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_is_stuck_below_python(number):
    process = python(STUCK)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None
        time.sleep(1)
        process.send_signal(number)
        assert process.wait(timeout=20) == -number
    finally:
        process.kill()
        process.communicate()


REFUSED = """
import os, sys
from dist_train.distributed.runtime import Runtime
from shards.storage.errors import BadInput
if "late" in sys.argv:
    Runtime("cpu")
    os.environ["WORLD_SIZE"] = "2"
try:
    Runtime("cpu")
except BadInput as refused:
    print(refused)
"""


@pytest.mark.parametrize("late", [True, False])
def test_fewer_processes_than_the_launcher_meant_are_refused(late):
    """In a group of one, or with no word from the launcher but the number of processes."""
    env = {} if late else {"WORLD_SIZE": "2"}
    said, _ = python(REFUSED, *(["late"] if late else []), **env).communicate(timeout=120)
    assert "meant 2 processes" in said
    assert "accelerate launch --num_processes 2" in said
    assert len(said.splitlines()) == 1


# Under Slurm


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, "only itself"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "RANK": "0",
          "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "8 processes, 8 of them on its node"),
    ],
    ids=["no launcher", "a launcher of one node"],
)  # fmt: skip
def test_a_node_that_thinks_it_is_alone_stops(monkeypatch, variables, what):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=what):
        Runtime("cpu")


ENDED = """
import signal, sys
from dist_train import cli
sys.argv = ["dist-train", "generate", "--items", "3", "--no-photos", "--out", sys.argv[1] + "/out"]
cli.main()
print([int(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)])
"""


def test_a_verb_that_is_done_hears_no_signal(tmp_path):
    """Python puts the default back as it ends, and a late signal would look like a failure."""
    said, errors = python(ENDED, str(tmp_path)).communicate(timeout=60)
    assert said.splitlines()[-1] == str([int(signal.SIG_IGN)] * 3), errors
