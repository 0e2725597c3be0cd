"""A training on two nodes with two processes each, on a running Slurm, that is taken away and back.

Whatever happens to it, it ends with the bits of the training that nothing happened to.
"""

import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest

from shards.storage.stage_files import status_of
from tests.support.comparing import losses, weights, write_times
from tests.support.launching import ROOT, run
from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.timeout(3000)
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
ENVIRONMENT = {"GPUS": "2", "ACCELERATE_CONFIG": "launch/accelerate/cpu.yaml"}
ENVIRONMENT |= {"ACCELERATE_USE_CPU": "true"}


class Training:
    """A training job: its run, its log."""

    def __init__(self, cluster: Cluster, folder: Path, options: list[object]) -> None:
        folder.mkdir()
        self.cluster, self.run, self.log = cluster, folder / "run", folder / "log"
        self.job = cluster.sbatch(
            "--nodes=2", "--cpus-per-task=2", "--time=30", "--signal=B:USR1@180", "--chdir", ROOT,
            "--output", self.log, SCRIPT, "image", *options, "--out", self.run, **ENVIRONMENT,
        )  # fmt: skip

    def held(self, restarts: int) -> psutil.Process:
        """One of its processes, stopped (SIGSTOP) some steps into an attempt: all wait for it."""
        self.wait("RUNNING", restarts)
        begun = f"restart {restarts}, "
        self.cluster.wait_for(lambda: begun in self.text(), 120, begun)
        end = time.monotonic() + 600
        while self.text().rpartition(begun)[2].count(": loss") < 4:
            assert time.monotonic() < end, f"no 4 steps\n{self.text()[-6000:]}"
            time.sleep(0.02)
        worker = next(p for p in self.workers() if p.environ().get("RANK") == "3")
        worker.suspend()
        return worker

    def workers(self) -> list[psutil.Process]:
        """Its processes of all nodes and all attempts."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                arguments = process.cmdline()
                if str(self.run) in arguments and "-u" in arguments[:2]:
                    found.append(process)
        return found

    def wait(self, state: str, restarts: int = 0) -> None:
        try:
            self.cluster.wait_until(self.job, state, restarts, 900)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()[-6000:]}") from None

    def text(self) -> str:
        """The log of all its attempts."""
        return self.log.read_text() if self.log.exists() else ""

    def begun_at(self) -> list[int]:
        """The steps that its later attempts went on from."""
        lines = [line for line in self.text().splitlines() if "going on from step" in line]
        return [int(line.rpartition(" ")[2]) for line in lines]


@pytest.fixture(scope="module")
def options(image_options: list[object]) -> list[object]:
    """Some sixty steps of the shared training, with loader workers as users have them."""
    given = dict(zip(image_options[::2], image_options[1::2], strict=True))
    given |= {"--epochs": 8, "--validate-every": 0, "--checkpoint-every": 20, "--workers": 2}
    return [word for pair in given.items() for word in pair]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path, options: list[object]) -> Path:
    """The run that nothing happens to."""
    training = Training(cluster, folder / "undisturbed", options)
    training.wait("COMPLETED")
    assert training.begun_at() == []
    return training.run


def same(run: Path, other: Path) -> None:
    """To the bit: every loss of every step, every weight."""
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert losses(run) == losses(other)
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_preempted_near_its_limit_requeued_and_a_node_lost(
    cluster: Cluster, folder: Path, options: list[object], undisturbed: Path
) -> None:
    training = Training(cluster, folder / "disturbed", options)
    preempt(training, training.held(restarts=0))
    reach_limit(training, training.held(restarts=1))
    training.held(restarts=2)
    cluster.call("scontrol", "requeue", training.job)
    training.held(restarts=3)
    if cluster.hosts:
        cluster.kill_node("node2")
        training.wait("RUNNING", restarts=4)
        cluster.start_node("node2")
    else:  # nodes are no hosts here that could die
        cluster.call("scontrol", "requeue", training.job)
    training.wait("COMPLETED", restarts=4)
    same(training.run, undisturbed)
    begun = training.begun_at()
    assert len(begun) == 4
    assert begun == sorted(begun)
    assert begun[0] > 0
    log = training.text()
    assert log.count("requeueing the job") >= 2, log
    assert "the time limit is near" in log
    # On request it saves where it is, not where the next checkpoint would be.
    assert any(step % 20 for step in begun[:2]), begun


def test_one_process_with_loader_workers_near_its_limit(
    cluster: Cluster, folder: Path, options: list[object], tmp_path: Path
) -> None:
    """Slurm's TERM reaches every process of the step, those of the loader too."""
    stages = ROOT / "launch" / "slurm"
    run_folder, embedding = tmp_path / "run", tmp_path / "embedding"
    shards = options[options.index("--shards") + 1]
    verbs = [
        (stages / "train.sbatch", run_folder, "image", *options),
        (stages / "embed.sbatch", embedding, "--shards", shards, "--image", run_folder,
         "--batch-size", 1, "--workers", 2),
    ]  # fmt: skip
    for script, out, *arguments in verbs:
        log = tmp_path / f"{out.name}.log"
        job = cluster.sbatch(
            "--nodes=1", "--cpus-per-task=2", "--time=30", "--signal=B:USR1@180", "--chdir", ROOT,
            "--output", log, script, *arguments, "--out", out, GPUS="1", ACCELERATE_USE_CPU="true",
        )  # fmt: skip
        cluster.wait_for(lambda out=out: status_of(out) == "running", 120, f"beginning: {log}")
        cluster.call("scancel", "--batch", "--signal=USR1", job)  # as --signal does near the limit
        cluster.wait_until(job, "PENDING", 1)
        assert "is preempted (exit code 3)" in log.read_text(), log.read_text()
        cluster.wait_until(job, "COMPLETED", 1, 400)
    run(1, "train", "image", *options, "--out", tmp_path / "undisturbed")
    same(run_folder, tmp_path / "undisturbed")


def preempt(training: Training, held: psutil.Process) -> None:
    """Another job wants all nodes."""
    cluster = training.cluster
    cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null",
                   "--wrap", "true")  # fmt: skip
    cluster.wait_for(lambda: cluster.job(training.job)["PreemptTime"] != "None", 60, "preemption")
    held.resume()


def reach_limit(training: Training, held: psutil.Process) -> None:
    """Less is left of its time than the three minutes in which it is to stop."""
    cluster, known = training.cluster, training.cluster.job(training.job)
    hours, minutes, _ = known["RunTime"].split(":")
    limit = int(hours) * 60 + int(minutes) + 3
    cluster.call("scontrol", "update", f"JobId={training.job}", f"TimeLimit={limit}")
    cluster.wait_for(lambda: "time limit is near" in training.text(), 90, "warning")
    held.resume()
    training.wait("PENDING", restarts=2)
    cluster.call("scontrol", "update", f"JobId={training.job}", "TimeLimit=30")


@pytest.mark.full
def test_the_link_of_the_first_node_is_cut(
    cluster: Cluster, folder: Path, options: list[object], undisturbed: Path
) -> None:
    """Rank 0 stays alive while the job is started again elsewhere, and changes nothing."""
    if not cluster.hosts:
        pytest.skip("cutting a link takes nodes that are hosts: root and ip")
    training = Training(cluster, folder / "cut", options)
    held = training.held(restarts=0)
    cut = cluster.job(training.job)["BatchHost"]
    older = [p for p in training.workers() if p.pid in cluster.pids(cut)]
    assert len(older) == 2
    cluster.link(cut, up=False)
    held.resume()
    training.wait("RUNNING", restarts=1)
    assert cut not in cluster.call("squeue", "-h", "-o", "%N", "-j", training.job)
    assert all(p.is_running() for p in older), "the cut node is to go on, as real ones do"
    training.wait("COMPLETED", restarts=1)
    before = write_times(training.run)
    cluster.link(cut, up=True)
    cluster.wait_for(lambda: not any(map(is_alive, older)), 200, "end of the older attempt")
    assert write_times(training.run) == before
    same(training.run, undisturbed)


def is_alive(process: psutil.Process) -> bool:
    """It is there, and no zombie."""
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
