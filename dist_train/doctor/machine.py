"""Checks of the machine: room, limits, clock, caches, locks, ports. Each of what it is given."""

import os
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

from dist_train.doctor.finding import Finding, fault, note
from shards.storage.files import format_bytes

FEW_FILES = 4096
LITTLE_DISK = 10 * 10**9
SKEW = 5.0
"""Seconds; HTTP tells whole ones, and file times decide which checkpoint and lock is newer."""
BUILD = 3600.0
"""Seconds after which no compiler is still at an extension."""


def shared_memory(folder: Path, needed: int) -> Finding:
    """Loaders hand batches over in `folder`; `needed` bytes for all ranks of this machine."""
    free = shutil.disk_usage(folder).free
    said = (
        f"{format_bytes(free)} free in {folder}, about {format_bytes(needed)} needed by the loaders"
    )
    if free < needed:
        return fault("shared memory", f"{said}: workers would die of a bus error",
                     "start the container with --shm-size=8g or --ipc=host; else --workers 0 or a "
                     "smaller --batch-size")  # fmt: skip
    return Finding("shared memory", said)


def open_files(limits: tuple[int, int]) -> Finding:
    """`limits` on open files: soft and hard."""
    soft, hard = (FEW_FILES if n == resource.RLIM_INFINITY else n for n in limits)
    said = f"at most {soft} (up to {hard})"
    remedy = f"ulimit -n {max(FEW_FILES, hard)}; in an sbatch script before srun"
    if soft < 1024:
        return fault("open files", f"{said}: loaders and FAISS shards run out of them", remedy)
    return note("open files", said, remedy) if soft < FEW_FILES else Finding("open files", said)


def locked_memory(soft: int, fabrics: int) -> Finding:
    """`soft` limit on locked memory, in bytes; `fabrics` are the machine's InfiniBand ports."""
    said = "unlimited" if soft == resource.RLIM_INFINITY else f"at most {format_bytes(soft)}"
    if fabrics and soft != resource.RLIM_INFINITY:
        return fault("locked memory", f"{said}, but InfiniBand registers what it sends",
                     "ulimit -l unlimited (limits.conf, or LimitMEMLOCK of slurmd)")  # fmt: skip
    return Finding("locked memory", said)


def free_disk(folder: Path) -> Finding:
    """Room where the stages are written."""
    free = shutil.disk_usage(existing(folder)).free
    said = f"{format_bytes(free)} free at {folder}"
    if free < LITTLE_DISK:
        return note("disk", said, "dist-train plan CONFIG.yaml tells what each stage will take")
    return Finding("disk", said)


def writable(name: str, folder: Path, variable: str) -> Finding:
    """Whether a file can be made in `folder`, or it itself; `variable` names another."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            pass
    except OSError as error:
        return fault(name, f"{folder} cannot be written ({error.strerror})",
                     f"{variable}=FOLDER on a disk that can be")  # fmt: skip
    return Finding(name, f"{folder} can be written")


def clock(ahead: float, of: str) -> Finding:
    """By how many seconds this machine's clock is `ahead` of that of `of`."""
    said = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} {of}"
    if abs(ahead) > SKEW:
        return fault("clock", said, "set it by NTP (timedatectl set-ntp true; chronyc makestep): "
                     "logs and file times of several nodes are compared")  # fmt: skip
    return Finding("clock", said)


def ahead_of_files(folder: Path) -> float:
    """Seconds by which the clock is ahead of what the file system of `folder` stamps on a file."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        before = time.time()
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        middle = (before + time.time()) / 2
        return middle - os.stat(file.name).st_mtime


def extension_locks(folder: Path, now: float) -> Finding:
    """Locks that compilers of torch extensions left below `folder`: all later builds wait there."""
    locks = sorted(path for path in folder.rglob("lock") if path.is_file())
    held = _open_files() if locks else set()
    # On a folder that several machines share, another one may hold it.
    stale = [
        path for path in locks
        if path.resolve() not in held
        and now - path.stat().st_mtime > (BUILD if _is_shared(path) else 0)
    ]  # fmt: skip
    if stale:
        return fault("extension lock", f"{', '.join(map(str, stale))}: nobody builds there, and "
                     "every start waits for it without a word",
                     f"rm {' '.join(map(str, stale))}")  # fmt: skip
    busy = f", {len(locks)} being built" if locks else ""
    return Finding("extension lock", f"none is stale in {folder}{busy}")


def port(named: str) -> Finding:
    """Whether rank 0 can listen on the port that is `named`."""
    if not named.isdecimal() or not 0 < int(named) < 65_536:
        return fault("port", f"MASTER_PORT is {named!r}, not a port from 1 to 65535",
                     "unset MASTER_PORT, or set it to a free port")  # fmt: skip
    number = int(named)
    with socket.socket() as probe:
        # As the launcher does: what only lingers from a job before this one is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            return fault("port", f"{number} is taken ({error.strerror}): the ranks would not meet",
                         "accelerate launch --main_process_port N with another; end the job that "
                         f"has it (ss -ltnp 'sport = :{number}')")  # fmt: skip
    return Finding("port", f"{number} is free")


def _is_shared(path: Path) -> bool:
    """Whether a path lies on a network file system, as the table of mounts tells."""
    best, kind = 0, ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, what = line.split()[:3]
        if path.resolve().is_relative_to(where) and len(where) >= best:
            best, kind = len(where), what
    return kind.startswith(("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "cifs"))


def _open_files() -> set[Path]:
    """Files that some process of this machine, of those we may look into, has open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(Path(os.readlink(link)))
        except OSError:
            continue
    return found


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group (v2)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    here = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        return min(here, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return here


def existing(folder: Path) -> Path:
    """`folder`, or what is there of the path to it."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
