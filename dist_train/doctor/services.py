"""Checks of what lies beyond the machine: the model hub, Slurm."""

import subprocess
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from dist_train.doctor.finding import Finding, fault, note

SECONDS = 10.0


def hub(endpoint: str, offline: bool) -> tuple[Finding, float | None]:
    """Whether models can be fetched, and by how many seconds our clock is ahead of the hub's."""
    remedy = "models from local folders, or fetched once on a machine that reaches it (HF_HOME)"
    if offline:
        return Finding("hub", "offline by HF_HUB_OFFLINE: cached and local models only"), None
    request = urllib.request.Request(endpoint, method="HEAD")
    began = time.time()
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")  # it answers, if only with a refusal
    except (OSError, ValueError) as error:
        return note("hub", f"{endpoint} is not reached ({error})", remedy), None
    found = Finding("hub", f"{endpoint} answers in {time.time() - began:.2f} s")
    if date is None:
        return found, None
    # The whole second that the server names is half a second old on average.
    there = parsedate_to_datetime(date).timestamp() + 0.5
    return found, (began + time.time()) / 2 - there


def slurm(sbatch: str | None, answer: tuple[int, str], configured: bool) -> Finding:
    """From where `sbatch` lies, and the exit code and `answer` of scontrol ping."""
    if sbatch is None:
        return Finding("Slurm", "none here; submit needs it, nothing else does")
    code, said = answer
    if code == 0 and "UP" in said:
        return Finding("Slurm", said.splitlines()[0])
    told = f"{sbatch} is here, but no controller answers ({(said.splitlines() or ['?'])[0][:100]})"
    if not configured:
        return note("Slurm", told, "SLURM_CONF=... where it belongs to a cluster")
    return fault("Slurm", told, "scontrol ping; ask the cluster's people, or set SLURM_CONF")


def ask_controller() -> tuple[int, str]:
    """Exit code and answer of scontrol ping."""
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, (done.stdout + done.stderr).strip()
