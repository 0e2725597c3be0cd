"""launch/slurm/stage.sh and the scripts beside it, among programs that write down what they hear.

What a running Slurm makes of them: tests/slurm.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.launching import ROOT
from tests.support.recorded_programs import Programs

SLURM = ROOT / "launch" / "slurm"
SRUN = """
[[ ${!#} == true ]] && exit "$(cat "$here/lost" 2>/dev/null || echo 0)"
while [[ $1 == -* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" || code=$?; done
exit ${code:-0}
"""
PYTHON = """
env >"$here/env"
grep SigIgn "/proc/$$/status" >"$here/ignored"
[[ ! -e $here/does ]] || . "$here/does"
exit "$(cat "$here/code" 2>/dev/null || echo 0)"
"""
SCONTROL = """
case "$*" in
"show hostnames node[1-2]") echo node1; echo node2 ;;
"--oneliner show node node1") [[ -e $here/nowhere ]] ||
    echo "NodeName=node1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=node1" ;;
"--oneliner show job"*) cat "$here/job" ;;
requeue*) [[ ! -e $here/held ]] ;;
*) exit 1 ;;
esac
"""
SLEEP = f"exec {shutil.which('sleep')} 0.02"


class Job(Programs):
    """The script as batch step of a job, and the programs around it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "bin")
        self.folder = folder
        programs = {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "sleep": SLEEP}
        for name, body in (programs | {"scancel": ""}).items():
            self.add(name, body)
        self.stands()

    def stands(self, state: str = "RUNNING", reason: str = "None", restarts: int = 0) -> None:
        """What Slurm says of the job when the stage has ended."""
        (self.bin / "job").write_text(
            f"JobId=70 JobName=x JobState={state} Reason={reason} Requeue=1 "
            f"Restarts={restarts} BatchFlag=1\n"
        )

    def ends(self, code: int, status: str = "") -> None:
        """How each process of the stage ends, and what it says of itself in ./run."""
        (self.bin / "code").write_text(str(code))
        said = f'echo \'{{"status": "{status}"}}\' >run/status.json\n' if status else ""
        (self.bin / "does").write_text(said)
        (self.folder / "run").mkdir(exist_ok=True)

    def start(
        self, *words: str, nodes: int = 1, gpus: int = 1, **more: str | None
    ) -> subprocess.Popen:
        """`stage.sh WORDS` on so many nodes with so many GPUs each; None: a variable is not set."""
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(("SLURM_", "DIST_TRAIN_", "OMP_", "GPUS"))}  # fmt: skip
        given = {
            "PATH": self.path, "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": str(nodes), "SLURM_NODEID": "0", "SLURM_CPUS_PER_TASK": "16",
            "SLURM_GPUS_ON_NODE": str(gpus),
        }  # fmt: skip
        env = {name: value for name, value in (clean | given | more).items() if value is not None}
        return subprocess.Popen(
            ["bash", str(SLURM / "stage.sh"), *words], cwd=self.folder, env=env,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *words: str, **more) -> tuple[int, str]:
        """From start to end: the exit code, and what it said."""
        self.forget()
        process = self.start(*words, **more)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def requeued(self) -> list[list[str]]:
        """What Slurm was told to requeue."""
        return [words[2:] for words in self.calls("scontrol") if words[1] == "requeue"]

    def stage(self) -> list[list[str]]:
        """The words of each process that was started."""
        return [words[1:] for words in self.calls("python")]

    def environment(self) -> dict[str, str]:
        """Of the process that was started last."""
        lines = (self.bin / "env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def ignores(self, number: signal.Signals) -> bool:
        """Whether the process that was started last did not hear of a signal."""
        return bool(int((self.bin / "ignored").read_text().split()[1], 16) >> (number - 1) & 1)

    def wait_for(self, condition, process: subprocess.Popen) -> None:
        """Until the condition holds; fails when the script ends first."""
        end = time.monotonic() + 30
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, self.calls()
            time.sleep(0.01)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


TRAIN = ("train", "image", "--shards", "s", "--out", "run")


def port_of(words: list[str]) -> int:
    """Where the launcher has the processes meet."""
    return int(words[words.index("--main_process_port") + 1])


# ── what is started


@pytest.mark.parametrize(
    ("verb", "nodes", "gpus", "task", "launched"),
    [
        ("train", 1, 1, None, False), ("train", 1, 2, None, True), ("train", 2, 1, None, True),
        ("train", 1, 2, "0", True), ("embed", 1, 2, None, True), ("index", 1, 2, None, True),
        ("join", 1, 2, None, True), ("join", 1, 2, "3", False), ("pack", 1, 4, None, False),
        ("match", 1, 4, None, False),
        ("evaluate", 1, 4, None, False), ("report", 1, 1, None, False),
    ],
)  # fmt: skip
def test_which_stages_get_a_launcher(
    job: Job, verb: str, nodes: int, gpus: int, task: str | None, launched: bool
) -> None:
    array = {} if task is None else {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "69"}
    job.ends(0, "done")
    code, output = job.run(verb, "--out", "run", nodes=nodes, gpus=gpus, **array)
    assert code == 0, output
    assert len(job.stage()) == (nodes if launched else 1)
    module = "accelerate.commands.launch" if launched else "dist_train"
    assert all(words[:2] == ["-m", module] for words in job.stage())


def test_one_launcher_a_node_over_all_processes(job: Job) -> None:
    job.ends(0, "done")
    code, output = job.run(*TRAIN, nodes=2, gpus=4)
    assert code == 0, output
    (srun,) = (words for words in job.calls("srun") if words[-1] != "true")
    assert srun[1 : srun.index("bash")] == ["--export=ALL", "--label", "--kill-on-bad-exit=1"]
    port = str(port_of(job.stage()[0]))
    for node, words in enumerate(job.stage()):
        assert words == [
            "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml",
            "--num_machines", "2", "--num_processes", "8", "--machine_rank", str(node),
            "--main_process_ip", "127.0.0.1", "--main_process_port", port,
            "--max_restarts", "0", "-m", "dist_train", *TRAIN,
        ]  # fmt: skip
    # The launcher would pass TERM on to workers that have it already, and end at USR1.
    assert job.ignores(signal.SIGTERM)
    assert job.ignores(signal.SIGUSR1)
    assert job.environment()["PET_SIGNALS_TO_HANDLE"] == "SIGINT"
    assert "train is done (exit code 0)" in output
    assert "job 70, restart 0, node[1-2]: train image --shards s --out run" in output


def test_one_process_by_itself_is_started_plainly_and_hears_signals(job: Job) -> None:
    job.ends(0)
    assert job.run("pack", "my catalogue.csv", "--out", "run", gpus=4)[0] == 0
    (srun,) = job.calls("srun")
    assert srun[1 : srun.index("bash")] == ["--export=ALL", "--ntasks=1"]
    assert job.stage() == [["-m", "dist_train", "pack", "my catalogue.csv", "--out", "run"]]
    assert not job.ignores(signal.SIGTERM)
    assert not job.ignores(signal.SIGUSR1)


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_the_environment_says_reaches_the_stage(job: Job, nodes: int) -> None:
    job.ends(0, "done")
    other = job.folder / "other" / "bin"
    other.mkdir(parents=True)
    shutil.copy(job.bin / "python", other / "python")
    job.add("container", 'exec "${@:2}"')
    code, output = job.run(
        *TRAIN, nodes=nodes, gpus=9, GPUS="1", ACCELERATE_CONFIG="mine.yaml",
        VENV=str(job.folder / "other"), CONTAINER="container image.sif",
        SRUN_OPTIONS="--mpi=none --cpu-bind=none", OMP_NUM_THREADS="7",
    )  # fmt: skip
    assert code == 0, output
    (srun,) = (words for words in job.calls("srun") if words[-1] != "true")
    assert srun[1:4] == ["--mpi=none", "--cpu-bind=none", "--export=ALL"]
    started = job.calls("container")
    assert len(started) == len(job.stage()) == nodes
    assert [words[:3] for words in started] == [["container", "image.sif", "python"]] * nodes
    environment = job.environment()
    assert environment["PATH"].split(":")[0] == str(other)
    assert environment["OMP_NUM_THREADS"] == "7"
    if nodes > 1:
        (words, _) = job.stage()
        assert words[words.index("--config_file") + 1] == "mine.yaml"
        assert words[words.index("--num_processes") + 1] == "2"


def test_what_lies_beside_the_job_is_used_where_nothing_is_said(job: Job) -> None:
    job.ends(0)
    assert job.run("report", "run", SLURM_GPUS_ON_NODE=None)[0] == 0
    environment = job.environment()
    assert environment["PATH"].split(":")[0] == str(job.folder / ".venv" / "bin")
    assert environment["GPUS"] == "1"


@pytest.mark.parametrize(
    ("cpus", "gpus", "threads"),
    [("16", 8, "2"), ("17", 8, "2"), ("8", 8, "1"), ("2", 8, "1"), (None, 2, "1"), ("16", 1, "16")],
)
def test_the_cores_of_a_node_are_shared_by_its_processes(
    job: Job, cpus: str | None, gpus: int, threads: str
) -> None:
    job.ends(0, "done")
    job.run(*TRAIN, gpus=gpus, SLURM_CPUS_PER_TASK=cpus)
    environment = job.environment()
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["SRUN_CPUS_PER_TASK"] == (cpus or "1")


def test_a_task_of_an_array_has_its_number_everywhere(job: Job) -> None:
    """Requeue by SLURM_JOB_ID would start the whole array again; %a is the task's."""
    job.ends(3)
    job.stands(restarts=2)
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "69", "SLURM_RESTART_COUNT": "2"}
    job.run("pack", "--task", "%a", "--out", "run/%a-%a", **array)
    assert job.stage() == [["-m", "dist_train", "pack", "--task", "5", "--out", "run/5-5"]]
    environment = job.environment()
    assert (environment["DIST_TRAIN_JOB"], environment["DIST_TRAIN_RESTART"]) == ("69_5", "2")
    assert job.requeued() == [["69_5"]]
    asked = [words for words in job.calls("scontrol") if words[2:4] == ["show", "job"]]
    assert asked == [["scontrol", "--oneliner", "show", "job", "69_5"]]


def test_without_an_array_the_job_is_its_number_and_the_task_0(job: Job) -> None:
    job.ends(0)
    job.run("pack", "--task", "%a")
    assert job.stage()[0][-1] == "0"
    environment = job.environment()
    assert (environment["DIST_TRAIN_JOB"], environment["DIST_TRAIN_RESTART"]) == ("70", "0")


# ── where the processes meet


def test_every_job_and_restart_meets_elsewhere(job: Job) -> None:
    job.ends(0, "done")
    ports = []
    for number, restarts in ((70, 0), (70, 1), (71, 0), (71, 1), (10**8 + 3, 2)):
        job.stands(restarts=restarts)
        job.run(*TRAIN, nodes=2, SLURM_JOB_ID=str(number), SLURM_RESTART_COUNT=str(restarts))
        (port,) = {port_of(words) for words in job.stage()}
        ports.append(port)
    assert len(set(ports)) == 5
    # Below what Linux hands out to outgoing connections (ip_local_port_range), above what is known.
    assert all(12_000 <= port < 32_768 for port in ports)


def test_a_port_on_which_something_listens_is_passed_over(job: Job) -> None:
    job.ends(0, "done")
    job.run(*TRAIN, nodes=2)
    port = port_of(job.stage()[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        job.run(*TRAIN, nodes=2)
    assert port < port_of(job.stage()[0]) < port + 50


@pytest.mark.parametrize("out", [("--out", "run"), ("--out=run",)])
@pytest.mark.parametrize("is_done", [True, False])
def test_the_word_of_a_run_before_is_not_taken_for_this_ones(
    job: Job, out: tuple[str, ...], is_done: bool
) -> None:
    """Of processes that die before they begin there is no word; what is done says so again."""
    job.ends(1)
    (job.folder / "run/status.json").write_text('{\n "status": "done"\n}')
    if is_done:
        (job.folder / "run/manifest.json").touch()
    code, output = job.run("train", "text", *out, nodes=2)
    assert (code, "train is done" in output) == ((0, True) if is_done else (1, False)), output
    assert (job.folder / "run/status.json").exists() == is_done


def test_what_cannot_work_is_refused_before_anything_starts(job: Job) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "6"}
    cases = [
        (("train", "image"), {}, "no folder for the result: give --out FOLDER"),
        (("train", "image", "--out"), {}, "no folder for the result"),
        (("report", "run"), {}, "report runs as one process here, but the job has 2 nodes"),
        (("join", "e", "--out", "run"), task, "join runs as one process here"),
        (("match", "p", "--out", "run"), {}, "match runs as one process here"),
    ]
    for words, more, said in cases:
        code, output = job.run(*words, nodes=2, **more)
        assert (code, said in output) == (1, True), output
        assert not job.calls("srun")
    (job.bin / "nowhere").touch()
    code, output = job.run(*TRAIN, nodes=2)
    assert (code, "scontrol does not know the first node's address" in output) == (1, True)
    assert not job.calls("srun")


# ── how it ends


@pytest.mark.parametrize(
    ("code", "ends", "again"),
    [(0, 0, False), (1, 1, False), (2, 2, False), (3, 3, True), (4, 4, False), (9, 9, False),
     (137, 137, False), (143, 143, True)],
)  # fmt: skip
def test_a_process_by_itself_says_how_it_ended(job: Job, code: int, ends: int, again: bool) -> None:
    """3: stopped and resumable; 143: TERM before it listened. Its word is the job's."""
    job.ends(code, "done")
    assert job.run("report", "run")[0] == ends
    assert job.requeued() == ([["70"]] if again else [])


@pytest.mark.parametrize(
    ("code", "status", "ends", "again"),
    [(0, "done", 0, False), (1, "done", 0, False), (0, "preempted", 1, True),
     (1, "preempted", 1, True), (0, "failed", 1, False), (1, "failed", 1, False),
     (137, "running", 137, False), (0, "running", 1, False), (0, "", 1, False),
     (3, "", 3, False), (143, "", 143, False)],
)  # fmt: skip
def test_under_a_launcher_the_status_says_how_it_ended(
    job: Job, code: int, status: str, ends: int, again: bool
) -> None:
    """A launcher gives 0 for what stopped in order, and 1 for whatever else there is."""
    job.ends(code, status)
    assert job.run(*TRAIN, gpus=2)[0] == ends
    assert job.requeued() == ([["70"]] if again else [])


@pytest.mark.parametrize(("nodes", "lost", "again"), [(2, 1, True), (2, 0, False), (1, 1, False)])
def test_what_fails_for_a_lost_node_goes_back_into_the_queue(
    job: Job, nodes: int, lost: int, again: bool
) -> None:
    job.ends(1, "failed")
    (job.bin / "lost").write_text(str(lost))
    code, output = job.run(*TRAIN, nodes=nodes, gpus=2)
    assert code == 1
    assert bool(job.requeued()) == again
    assert ("a node is lost" in output) == again
    asked = [words for words in job.calls("srun") if words[-1] == "true"]
    assert asked == ([["srun", "--overlap", "--ntasks-per-node=1", "true"]] if nodes > 1 else [])


@pytest.mark.parametrize("status", ["done", "preempted"])
def test_nodes_are_asked_only_when_something_failed(job: Job, status: str) -> None:
    job.ends(1, status)
    job.run(*TRAIN, nodes=2)
    assert not [words for words in job.calls("srun") if words[-1] == "true"]


@pytest.mark.parametrize(
    ("restarts", "most", "again"),
    [(0, None, True), (19, None, True), (20, None, False), (21, None, False), (0, "0", False),
     (1, "2", True), (2, "2", False)],
)  # fmt: skip
def test_how_often_a_job_requeues_itself(
    job: Job, restarts: int, most: str | None, again: bool
) -> None:
    """MAX_REQUEUES times, and not once more."""
    job.ends(3)
    job.stands(restarts=restarts)
    more = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    code, output = job.run("report", "run", **more | ({"MAX_REQUEUES": most} if most else {}))
    assert code == 3
    assert job.requeued() == ([["70"]] if again else [])
    gave_up = f"requeued {restarts} times already, giving up; submit again to continue"
    assert (gave_up in output) == (not again)


@pytest.mark.parametrize(
    ("state", "reason", "known", "said"),
    [
        ("RUNNING", "None", 1, "requeueing the job"),
        ("TIMEOUT", "TimeLimit", 1, "requeueing the job"),
        ("COMPLETING", "TimeLimit", 1, "requeueing the job"),
        ("CANCELLED", "None", 1, "cancelled or removed by Slurm"),
        ("PREEMPTED", "None", 1, "cancelled or removed by Slurm"),
        ("RUNNING", "None", 2, "already requeued by Slurm"),
        ("RUNNING", "None", 10, "already requeued by Slurm"),
        ("RUNNING", "None", 0, "already requeued by Slurm"),
    ],
)
def test_only_the_attempt_that_slurm_knows_and_nobody_cancelled_comes_back(
    job: Job, state: str, reason: str, known: int, said: str
) -> None:
    job.ends(3)
    job.stands(state, reason, known)
    code, output = job.run("report", "run", SLURM_RESTART_COUNT="1")
    assert (code, said in output) == (3, True), output
    assert job.requeued() == ([["70"]] if said == "requeueing the job" else [])


def test_it_waits_for_slurm_to_take_the_job_away(job: Job) -> None:
    """Ended sooner, the job would be taken for finished; where Slurm refuses, it ends at once."""
    job.ends(3)
    job.run("report", "run")
    assert ["sleep", "120"] in job.calls("sleep")
    (job.bin / "held").touch()
    assert job.run("report", "run")[0] == 3
    assert job.requeued() == [["70"]]
    assert ["sleep", "120"] not in job.calls("sleep")


# ── what it is told while the stage runs

UNTIL = f"""
for ((tries = 0; tries < 6000; tries++)); do # a failed test leaves nobody waiting for ever
    [[ ! -e $here/end ]] || break
    {shutil.which("sleep")} 0.01
done
"""


def runs(job: Job, status: str) -> None:
    """The stage goes on until `end` is there."""
    job.ends(0, status)
    with (job.bin / "does").open("a") as file:
        file.write(UNTIL)


def started(job: Job) -> bool:
    return bool(job.calls("python")) and (job.bin / "ignored").exists()


def test_near_the_limit_launched_processes_are_asked_until_they_hear(job: Job) -> None:
    runs(job, "running")
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "69"}
    process = job.start(*TRAIN, gpus=2, **array)
    job.wait_for(lambda: started(job) and len(job.calls("sleep")) > 2, process)
    assert not job.calls("scancel")
    process.send_signal(signal.SIGUSR1)
    job.wait_for(lambda: len(job.calls("scancel")) > 1, process)
    # It has heard: what it writes now is not to be disturbed.
    (job.folder / "run/status.json").write_text('{"status": "preempted"}')
    time.sleep(0.2)
    asked, slept = len(job.calls("scancel")), len(job.calls("sleep"))
    job.wait_for(lambda: len(job.calls("sleep")) > slept + 3, process)
    assert len(job.calls("scancel")) == asked
    (job.bin / "end").touch()
    output, _ = process.communicate(timeout=60)
    assert {tuple(words) for words in job.calls("scancel")} == {
        ("scancel", "--signal=USR1", "69_5.0")
    }
    assert "the time limit is near, requesting a stop" in output
    assert "train is preempted" in output


def test_near_the_limit_a_process_by_itself_is_told_once(job: Job) -> None:
    runs(job, "running")
    process = job.start("join", "e", "--out", "run")
    job.wait_for(lambda: started(job) and len(job.calls("sleep")) > 2, process)
    assert not job.calls("scancel")
    process.send_signal(signal.SIGUSR1)
    job.wait_for(lambda: bool(job.calls("scancel")), process)
    slept = len(job.calls("sleep"))
    job.wait_for(lambda: len(job.calls("sleep")) > slept + 3, process)
    (job.bin / "end").touch()
    process.communicate(timeout=60)
    assert job.calls("scancel") == [["scancel", "--signal=TERM", "70.0"]]


def test_asked_to_end_it_waits_for_the_stage_which_is_asked_too(job: Job) -> None:
    runs(job, "running")
    process = job.start("join", "e", "--out", "run")
    job.wait_for(lambda: started(job), process)
    process.send_signal(signal.SIGTERM)
    slept = len(job.calls("sleep"))
    job.wait_for(lambda: len(job.calls("sleep")) > slept + 3, process)
    (job.bin / "code").write_text("3")
    (job.bin / "end").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert not job.calls("scancel")
    assert output.index("received SIGTERM") < output.index("join is preempted (exit code 3)")
    assert job.requeued() == [["70"]]


# ── the scripts that users submit

COMMON = {"nodes": "1", "ntasks-per-node": "1", "requeue": "", "open-mode": "append",
          "signal": "B:USR1@180"}  # fmt: skip
OWN = {
    "pack": {"cpus-per-task": "4", "output": "%x-%A_%a.out", "job-name": "dist_train-pack"},
    "train": {"cpus-per-task": "16", "output": "%x-%j.out", "job-name": "dist_train-train"},
    "embed": {"cpus-per-task": "16", "output": "%x-%j.out", "job-name": "dist_train-embed"},
    "index": {"cpus-per-task": "16", "output": "%x-%j.out", "job-name": "dist_train-index"},
    "join": {"cpus-per-task": "16", "output": "%x-%j.out", "job-name": "dist_train-join"},
}
"""Without --requeue and --signal nothing would come back."""


def test_every_script_has_its_line_in_the_table() -> None:
    assert {path.stem for path in SLURM.glob("*.sbatch")} == OWN.keys()


@pytest.mark.parametrize("verb", OWN)
def test_what_a_script_asks_slurm_for_and_starts(verb: str, tmp_path: Path) -> None:
    text = (SLURM / f"{verb}.sbatch").read_text()
    asked = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE)
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH")
    assert dict(asked) == COMMON | OWN[verb]
    # sbatch looks no further than the first command.
    assert text.rindex("#SBATCH") < text.index("\nexec")
    beside = tmp_path / "launch" / "slurm"
    beside.mkdir(parents=True)
    programs = Programs(beside)
    programs.add("stage.sh", "exit 7")
    words = ["c.csv", "--out", "a folder", "%a"]
    done = subprocess.run(["bash", str(SLURM / f"{verb}.sbatch"), *words], cwd=tmp_path, timeout=20)
    assert done.returncode == 7
    task = ["--task", "%a"] if verb == "pack" else []
    assert programs.calls() == [["stage.sh", verb, *task, *words]]
