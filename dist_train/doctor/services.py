"""Checks of what lies beyond the machine: the model hub and Slurm."""

import subprocess
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from dist_train.doctor.finding import Finding, fault, note

SECONDS = 10.0


def hub(endpoint: str, offline: bool) -> tuple[Finding, float | None]:
    """Whether models can be downloaded, and the seconds that our clock is ahead of the hub's.

    The seconds are None if the hub was not reached or gave no date.
    """
    remedy = "use models in local folders, or download them once where it is reached (HF_HOME)"
    if offline:
        return Finding("hub", "offline by HF_HUB_OFFLINE: cached and local models only"), None
    request = urllib.request.Request(endpoint, method="HEAD")
    began = time.time()
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")  # the hub answers, if only with a refusal
    except (OSError, ValueError) as error:
        return note("hub", f"{endpoint} is not reached ({error})", remedy), None
    ended = time.time()
    finding = Finding("hub", f"{endpoint} answers in {ended - began:.2f} s")
    if date is None:
        return finding, None
    # Servers give complete seconds, which are half a second old on average.
    return finding, (began + ended) / 2 - (parsedate_to_datetime(date).timestamp() + 0.5)


def slurm(sbatch: str | None, ping: tuple[int, str], configured: bool) -> Finding:
    """From the path of `sbatch` and the result of `ping_controller`."""
    if sbatch is None:
        return Finding("Slurm", "not installed; only submit needs it")
    code, answer = ping
    if code == 0 and "UP" in answer:
        return Finding("Slurm", answer.splitlines()[0])
    first = (answer.splitlines() or ["?"])[0][:100]
    message = f"{sbatch} is installed, but no controller answers ({first})"
    if not configured:
        return note("Slurm", message, "set SLURM_CONF if this machine belongs to a cluster")
    return fault(
        "Slurm", message, "run scontrol ping; ask the cluster's support, or set SLURM_CONF"
    )


def ping_controller() -> tuple[int, str]:
    """Exit code and output of scontrol ping."""
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, (done.stdout + done.stderr).strip()
