"""Checks of what lies beyond the machine: the model hub and Slurm."""

import shutil
import subprocess
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime

from dist_train.doctor.finding import Finding, fault, note


def hub(endpoint: str, offline: bool) -> tuple[Finding, float | None]:
    """Whether models can be downloaded, and the seconds that our clock is ahead of the hub's.

    The seconds are None if the hub was not reached or gave no date.
    """
    if offline:
        return Finding("hub", "offline by HF_HUB_OFFLINE: cached and local models only"), None
    request = urllib.request.Request(endpoint, method="HEAD")
    began = time.time()
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")  # the hub answers, if only with a refusal
    except (OSError, ValueError) as error:
        remedy = "use models in local folders, or download them once where it is reached (HF_HOME)"
        return note("hub", f"{endpoint} is not reached ({error})", remedy), None
    ended = time.time()
    finding = Finding("hub", f"{endpoint} answers in {ended - began:.2f} s")
    if date is None:
        return finding, None
    # Servers give complete seconds, which are half a second old on average.
    return finding, (began + ended) / 2 - (parsedate_to_datetime(date).timestamp() + 0.5)


def slurm(configured: bool) -> Finding:
    """Whether Slurm's controller answers, if its commands are here; `configured` for a cluster."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        return Finding("Slurm", "not installed; only submit needs it")
    try:
        ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
        code, answer = ping.returncode, (ping.stdout + ping.stderr).strip()
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        code, answer = 1, str(error)
    first = (answer.splitlines() or ["?"])[0]
    if code == 0 and "UP" in answer:
        return Finding("Slurm", first)
    message = f"{sbatch} is installed, but no controller answers ({first[:100]})"
    if not configured:
        return note("Slurm", message, "set SLURM_CONF if this machine belongs to a cluster")
    return fault(
        "Slurm", message, "run scontrol ping; ask the cluster's support, or set SLURM_CONF"
    )
