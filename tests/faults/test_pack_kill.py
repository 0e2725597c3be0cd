"""A pack that is killed at any moment and started again ends in the same bytes."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.pack.pack import pack
from shards.read.shard_set import ShardSet
from shards.storage import stage_files
from shards.storage.errors import Corrupt, Unfinished
from shards.tar.write import write_shard
from tests.support.packing import OPTIONS, command, finish, started, temporary_files

# ── a real process, at random moments


WAYS = {"one worker": [[]], "workers": [["--workers", "3"]],
        "tasks": [["--task", str(n), "--of", "3"] for n in range(3)]}  # fmt: skip
PHASES = ("plan", "build", "seal")


@pytest.mark.parametrize(
    "trial", [*range(5), *(pytest.param(n, marks=pytest.mark.full) for n in range(5, 50))]
)
def test_killed_at_a_random_moment(
    few: Path, undisturbed: dict[str, str], tmp_path: Path, trial: int
) -> None:
    out, draw = tmp_path / "s", random.Random(trial)
    way, phase = list(WAYS)[trial % 3], PHASES[(trial + trial // 3) % 3]
    with started(few, out, WAYS[way]) as processes:
        shards = sum(name.endswith(".idx") for name in undisturbed)
        wait_for_phase(out, phase, shards, draw)
        time.sleep(draw.uniform(0, 0.15))
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            os.killpg(process.pid, signal.SIGKILL)
    print(f"{way}, {phase}: {len(alive)} of {len(processes)} killed, {standing(out)}")
    assert (out / "stage.json").exists()
    assert finish(few, out) == undisturbed


def wait_for_phase(out: Path, phase: str, shards: int, draw: random.Random) -> None:
    """Until the plan is being made, some shards stand, or all do."""
    wanted = {"plan": 0, "build": draw.randrange(1, shards), "seal": shards}[phase]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        begun = (out / "stage.json").exists()
        if begun and len(list(out.glob("*/*.idx"))) >= wanted:
            return
        time.sleep(0.002)
    raise AssertionError(f"no {phase} in time: {standing(out)}")


def standing(out: Path) -> str:
    """How far a pack came."""
    names = [path.name for path in out.rglob("*") if path.is_file()]
    marks = ["plan.sqlite", "items.parquet", "manifest.json"]
    return f"{sum(n.endswith('.idx') for n in names)} shards, {[n for n in marks if n in names]}"


# ── at every rename: what is on disk changes there and nowhere else

DRIVER = """
import os, signal, sys
from pathlib import Path
from shards.storage import files
from shards.pack.pack import pack
from shards.photos.options import PackOptions

catalogue, folder = Path(sys.argv[1]), Path(sys.argv[2])
replace = os.replace

def pack_into(out):
    pack(catalogue, catalogue.parent / "images", out, PackOptions(size=24, shard_items=6))

def killed_at(number, after):
    count = 0
    def counted(old, new):
        nonlocal count
        if count == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    os.replace = counted
    pack_into(folder / str(number))

number = 0
while True:
    child = os.fork()
    if not child:
        try:
            killed_at(number, sys.argv[3] == "after")
        finally:
            os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break  # it ended by itself: there is no such rename
    number += 1
print(number)
"""


@pytest.fixture(scope="module")
def very_few(catalogue: Path) -> Path:
    lines = (catalogue / "catalogue.csv").read_text().splitlines(keepends=True)
    (catalogue / "very_few.csv").write_text("".join(lines[:16]))
    return catalogue / "very_few.csv"


@pytest.mark.parametrize("moment", ["before", pytest.param("after", marks=pytest.mark.full)])
def test_killed_at_every_rename(very_few: Path, tmp_path: Path, moment: str) -> None:
    undisturbed = finish(very_few, tmp_path / "undisturbed")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(very_few), str(tmp_path), moment],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    renames = int(done.stdout)
    shards = sum(name.endswith(".tar") for name in undisturbed)
    # Three a shard (tar, facts, idx), then at least stage, plan, items and manifest.
    assert renames >= 3 * shards + 4
    failed = {}
    for number in range(renames):
        try:
            if finish(very_few, tmp_path / str(number)) != undisturbed:
                failed[number] = "other bytes"
        except Exception as error:
            failed[number] = repr(error)
    assert failed == {}


# ── what a kill can leave


def test_a_folder_claimed_only_by_a_temporary_file_is_taken(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    out.mkdir()
    (out / f".stage.json.tmp-{os.uname().nodename}-1").write_text("{")
    assert finish(few, out) == undisturbed


def test_temporary_files_of_a_killed_pack_do_not_stay(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    pack(few, few.parent / "images", out, OPTIONS)
    (out / "manifest.json").unlink()
    (out / "train" / "000000.idx").unlink()
    (out / "train" / f".000000.tar.tmp-{os.uname().nodename}-1").write_bytes(bytes(10_000))
    assert finish(few, out) == undisturbed
    assert temporary_files(out) == []


def test_shards_that_are_marked_are_not_built_again(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    command_ = command(few, out)
    process = subprocess.Popen(command_, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*/*.idx"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    marked = {index.with_suffix(".tar") for index in out.glob("*/*.idx")}
    before = {tar: tar.stat().st_ino for tar in marked}
    finish(few, out)
    assert len(before) >= 2
    assert {tar: tar.stat().st_ino for tar in marked} == before


def test_a_reader_says_that_a_killed_pack_is_unfinished(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    stage_files.begin(out, "shard set", {}, {})
    with pytest.raises(Unfinished, match="run the same command again"):
        ShardSet(out)


# ── signals


def test_sigterm_ends_as_stopped_and_resumable(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    process = subprocess.Popen(command(few, out), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("*/*.idx")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.terminate()
    output = process.communicate(timeout=60)[1]
    status = json.loads((out / "status.json").read_text())["status"]
    assert finish(few, out) == undisturbed
    assert (process.returncode, status) == (3, "preempted"), output


def test_workers_of_a_killed_pack_do_not_stay(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    process = subprocess.Popen(
        command(few, out, "--workers", "2"), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("*/*.tar")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        left, deadline = _members(process.pid), time.monotonic() + 5
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = _members(process.pid)
        assert left == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_pack_with_the_remedy(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    with started(few, out, [["--workers", "2"]]) as (process,):
        wait_for_phase(out, "build", 2, random.Random(0))
        os.kill(_children(process.pid)[-1], signal.SIGKILL)
        output = process.communicate(timeout=100)[0]
    assert process.returncode == 1, output
    assert "packing: one of 2 processes was killed" in output
    assert "same command goes on" in output
    assert "Traceback" not in output
    assert json.loads((out / "status.json").read_text())["status"] == "failed"
    assert finish(few, out) == undisturbed


def _children(parent: int) -> list[int]:
    """The spawned processes of a parent, without the tracker of its resources."""
    found = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _members(group: int) -> list[str]:
    """Command lines of the processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


# ── a disk that gives other bytes back


def test_a_shard_that_reads_back_otherwise_is_never_marked(tmp_path: Path) -> None:
    tar = tmp_path / "000000.tar"

    def samples():
        yield 0, -1, {"json": b"{}" * 500_000}
        # Whatever was written so far is overwritten under the writer's hands.
        temporary = next(tmp_path.glob(".*"))
        with temporary.open("r+b") as file:
            file.seek(512)
            file.write(b"XX")
        yield 1, -1, {"json": b"{}"}

    with pytest.raises(Corrupt, match=r"slot 0, member json"):
        write_shard(tar, samples(), before_mark=lambda: None)
    assert list(tmp_path.iterdir()) == []
