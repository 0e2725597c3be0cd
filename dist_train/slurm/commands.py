"""Talking to Slurm by its own commands: submit, cancel, and how a job stands."""

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
RUNS = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING",
        "STAGE_OUT"}  # fmt: skip


class Seen(NamedTuple):
    """How a job, or an array of tasks, stands."""

    state: str
    """waits, runs, done, cancelled, failed, or empty where Slurm no longer knows the job."""
    why: str = ""

    @property
    def is_alive(self) -> bool:
        """It is in the queue or runs."""
        return self.state in ("waits", "runs")


def missing() -> str:
    """Why nothing can be submitted from here; empty where a Slurm answers."""
    if shutil.which("sbatch") is None:
        return "Slurm's commands (sbatch) are not on this machine"
    done = _run("scontrol", "ping")
    return "" if done.returncode == 0 else "Slurm's controller does not answer (scontrol ping)"


def submit(script: Path, after: Iterable[str]) -> str:
    """Submit a script that begins when the jobs `after` have ended well; the job's number."""
    waits = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{':'.join(after)}"]
    done = _run("sbatch", "--parsable", *(waits if after else []), str(script))
    if done.returncode:
        raise BadInput(f"{script}: refused by sbatch ({_line(done.stderr)})")
    return done.stdout.strip().partition(";")[0]


def refusal(script: Path) -> str:
    """What sbatch has against a script, without submitting it; empty when nothing."""
    done = _run("sbatch", "--test-only", str(script))
    return _line(done.stderr) if done.returncode else ""


def cancel(job: str) -> None:
    """Take a job out of the queue."""
    _run("scancel", job)


def seen(job: str) -> Seen:
    """How a job stands, from the controller, or from the accounting once that has forgotten it."""
    done = _run("scontrol", "--oneliner", "show", "job", job)
    if done.returncode == 0:
        return told(done.stdout)
    if "Invalid job id" not in done.stderr:
        raise Failed(f"scontrol show job {job}: {_line(done.stderr)}; is Slurm's controller up?")
    if shutil.which("sacct") is None:
        return Seen("")
    kept = _run("sacct", "-n", "-P", "-X", "-j", job, "-o", "State,ExitCode,Reason")
    rows = [line.split("|") for line in kept.stdout.splitlines() if line.count("|") == 2]
    return _together([_one(state.split()[0], code, reason, "") for state, code, reason in rows])


def told(text: str) -> Seen:
    """How the job stands that `scontrol --oneliner show job` tells of, a line a task."""
    return _together([_task(line) for line in text.splitlines() if "JobState=" in line])


def _task(line: str) -> Seen:
    facts = dict(re.findall(r"(\w+)=(\S*)", line))
    restarts = int(facts.get("Restarts", "0"))
    since = f"{facts.get('NodeList', '')} since {facts.get('StartTime', '')}"
    again = f", restart {restarts}" if restarts else ""
    return _one(facts["JobState"], facts.get("ExitCode", ""), facts.get("Reason", ""),
                since + again)  # fmt: skip


def _one(state: str, code: str, reason: str, since: str) -> Seen:
    if state in WAITS:
        return Seen("waits", reason)
    if state in RUNS:
        return Seen("runs", since)
    if state == "COMPLETED":
        return Seen("done")
    why = f"{reason} " if reason not in ("", "None") else ""
    if state == "CANCELLED":
        return Seen("cancelled", why.strip() or "by scancel")
    return Seen("failed", f"{state} {why}exit code {code}")


def _together(tasks: list[Seen]) -> Seen:
    """Of an array: it runs while one runs and waits while one waits; then the worst counts."""
    for state in ("runs", "waits", "failed", "cancelled", "done"):
        some = [task for task in tasks if task.state == state]
        if some:
            share = f"{len(some)} of {len(tasks)} tasks: " if len(tasks) > 1 else ""
            return Seen(state, f"{share}{some[0].why}" if some[0].why else share.rstrip(": "))
    return Seen("")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise BadInput(f"{words[0]}: not on this machine, though others of Slurm are") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(words)}: no answer within {PATIENCE} s; "
                     "is Slurm's controller up?") from None  # fmt: skip


def _line(text: str) -> str:
    return " ".join(text.split())
