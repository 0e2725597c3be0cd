"""Slurm's own commands: submit and cancel a job, and read its state."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from shards.storage.errors import BadInput, Failed

PATIENCE = 120
"""Seconds that a busy controller may take to answer."""
WAITS = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNS = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
RUNS |= {"STAGE_OUT"}


class JobState(NamedTuple):
    """State of a job, or of an array of tasks."""

    state: str
    """waits, runs, done, cancelled, failed, or empty if Slurm does not know the job any more."""
    reason: str = ""


def missing() -> str:
    """Why nothing can be submitted from here; empty if a Slurm controller answers."""
    if shutil.which("sbatch") is None:
        return "Slurm's commands (sbatch) are not on this machine"
    done = run("scontrol", "ping")
    return "" if done.returncode == 0 else "Slurm's controller does not answer (scontrol ping)"


def submit(script: Path, after: Iterable[str]) -> str:
    """Submit a script that starts when the jobs `after` have succeeded; returns its job number."""
    dependency = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{':'.join(after)}"]
    done = run("sbatch", "--parsable", *(dependency if after else []), str(script))
    if done.returncode:
        raise BadInput(f"{script}: refused by sbatch ({_one_line(done.stderr)})")
    return done.stdout.strip().partition(";")[0]


def refusal(script: Path) -> str:
    """Why sbatch would refuse a script, without submitting it; empty if it would not."""
    done = run("sbatch", "--test-only", str(script))
    return _one_line(done.stderr) if done.returncode else ""


def job_state(job: str) -> JobState:
    """State of a job by the controller, or by the accounting if the controller has forgotten it.

    Raises Failed if the controller does not answer.
    """
    done = run("scontrol", "--oneliner", "show", "job", job)
    if done.returncode == 0:
        return parse_scontrol(done.stdout)
    if "Invalid job id" not in done.stderr:
        error = _one_line(done.stderr)
        raise Failed(f"scontrol show job {job}: {error}; is Slurm's controller up?")
    if shutil.which("sacct") is None:
        return JobState("")
    accounts = run("sacct", "-n", "-P", "-X", "-j", job, "-o", "State,ExitCode,Reason")
    rows = [line.split("|") for line in accounts.stdout.splitlines() if line.count("|") == 2]
    return _combine([_task_state(state.split()[0], code, reason) for state, code, reason in rows])


def parse_scontrol(text: str) -> JobState:
    """The state in the output of `scontrol --oneliner show job`, which has a line for each task."""
    tasks = []
    for line in text.splitlines():
        if "JobState=" not in line:
            continue
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        since = f"{facts.get('NodeList', '')} since {facts.get('StartTime', '')}"
        if restarts := int(facts.get("Restarts", "0")):
            since += f", restart {restarts}"
        code, reason = facts.get("ExitCode", ""), facts.get("Reason", "")
        tasks.append(_task_state(facts["JobState"], code, reason, since))
    return _combine(tasks)


def _task_state(state: str, code: str, reason: str, since: str = "") -> JobState:
    """From Slurm's state, exit code and reason; `since` describes where and when it started."""
    if state in WAITS:
        return JobState("waits", reason)
    if state in RUNS:
        return JobState("runs", since)
    if state == "COMPLETED":
        return JobState("done")
    known = f"{reason} " if reason not in ("", "None") else ""
    if state == "CANCELLED":
        return JobState("cancelled", known.strip() or "by scancel")
    return JobState("failed", f"{state} {known}exit code {code}")


def _combine(tasks: list[JobState]) -> JobState:
    """An array runs while a task runs, waits while a task waits; then the worst task counts."""
    for state in ("runs", "waits", "failed", "cancelled", "done"):
        alike = [task for task in tasks if task.state == state]
        if not alike:
            continue
        share = f"{len(alike)} of {len(tasks)} tasks" if len(tasks) > 1 else ""
        return JobState(state, ": ".join(filter(None, (share, alike[0].reason))))
    return JobState("")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a command; BadInput if it is not installed, Failed if it does not answer."""
    try:
        return subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise BadInput(
            f"{arguments[0]}: not on this machine, but other Slurm commands are"
        ) from None
    except subprocess.TimeoutExpired:
        command = " ".join(arguments)
        raise Failed(
            f"{command}: no answer within {PATIENCE} s; is Slurm's controller up?"
        ) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())
