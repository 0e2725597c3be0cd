"""Checks of the machine: memory, disk, limits, clock, caches, locks, ports."""

import os
import resource
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from dist_train.doctor.finding import Finding, fault, note
from shards.storage.files import format_bytes

FEW_FILES = 4096
LITTLE_DISK = 10 * 10**9
SKEW = 5.0
"""Seconds; HTTP gives complete ones, and file times decide which checkpoint or lock is newer."""
BUILD = 3600.0
"""Seconds after which no compiler can still be building an extension."""


def shared_memory(folder: Path, needed: int) -> Finding:
    """Whether `folder` has the `needed` bytes for the batches of all loaders of this machine."""
    free = shutil.disk_usage(folder).free
    message = f"{format_bytes(free)} free in {folder}, the loaders need about "
    message += format_bytes(needed)
    if free < needed:
        return fault(
            "shared memory",
            f"{message}: workers would die of a bus error",
            "start the container with --shm-size=8g or --ipc=host; else --workers 0 or a "
            "smaller --batch-size",
        )
    return Finding("shared memory", message)


def open_files(limits: tuple[int, int]) -> Finding:
    """Whether the soft and hard `limits` on open files are high enough."""
    soft, hard = (FEW_FILES if n == resource.RLIM_INFINITY else n for n in limits)
    message = f"at most {soft} (up to {hard})"
    remedy = f"ulimit -n {max(FEW_FILES, hard)}; in an sbatch script before srun"
    if soft < 1024:
        return fault("open files", f"{message}: too few for loaders and FAISS shards", remedy)
    if soft < FEW_FILES:
        return note("open files", message, remedy)
    return Finding("open files", message)


def locked_memory(soft: int, infiniband: int) -> Finding:
    """Whether the `soft` limit (bytes) on locked memory allows the `infiniband` ports to work."""
    limited = soft != resource.RLIM_INFINITY
    message = f"at most {format_bytes(soft)}" if limited else "unlimited"
    if infiniband and limited:
        remedy = "ulimit -l unlimited (limits.conf, or LimitMEMLOCK of slurmd)"
        return fault("locked memory", f"{message}, but InfiniBand locks what it sends", remedy)
    return Finding("locked memory", message)


def free_disk(folder: Path) -> Finding:
    """Free space where the stages are written."""
    free = shutil.disk_usage(existing(folder)).free
    message = f"{format_bytes(free)} free at {folder}"
    if free < LITTLE_DISK:
        return note("disk", message, "dist-train plan CONFIG.yaml shows what each stage will need")
    return Finding("disk", message)


def writable(name: str, folder: Path, variable: str) -> Finding:
    """Whether `folder`, which `variable` sets, exists or can be created, and can be written."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            pass
    except OSError as error:
        remedy = f"{variable}=FOLDER on a disk that can be written"
        return fault(name, f"{folder} cannot be written ({error.strerror})", remedy)
    return Finding(name, f"{folder} can be written")


def clock(ahead: float, other: str) -> Finding:
    """Whether this machine's clock, `ahead` seconds ahead of the `other`, is right."""
    message = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} {other}"
    if abs(ahead) > SKEW:
        return fault(
            "clock",
            message,
            "set it by NTP (timedatectl set-ntp true; chronyc makestep): logs and file times of "
            "several nodes are compared",
        )
    return Finding("clock", message)


def ahead_of_files(folder: Path) -> float:
    """Seconds that the clock is ahead of the times that the file system of `folder` records."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return time.time() - os.stat(file.name).st_mtime


def extension_locks(folder: Path, now: float) -> Finding:
    """Locks that compilers of torch extensions left below `folder`, which block later builds."""
    locks = sorted(path for path in folder.rglob("lock") if path.is_file())
    held = set()  # what processes of this machine have open, as far as we may see
    for link in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        with suppress(OSError):
            held.add(Path(os.readlink(link)))
    stale = ""
    for lock in locks:
        # On a folder that several machines share, another one may hold it.
        longest = BUILD if _is_shared(lock) else 0
        if lock.resolve() not in held and now - lock.stat().st_mtime > longest:
            stale += f" {lock}"
    if stale:
        message = f"{stale[1:]}: no process builds there, and every start waits for it silently"
        return fault("extension lock", message, f"rm{stale}")
    busy = f", {len(locks)} being built" if locks else ""
    return Finding("extension lock", f"none is stale in {folder}{busy}")


def port(named: str) -> Finding:
    """Whether rank 0 can listen on the port `named`."""
    if not named.isdecimal() or not 0 < int(named) < 65_536:
        message = f"MASTER_PORT is {named!r}, not a port from 1 to 65535"
        return fault("port", message, "unset MASTER_PORT, or set it to a free port")
    number = int(named)
    with socket.socket() as probe:
        # As the launcher does: connections of an earlier job that still linger do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            return fault(
                "port",
                f"{number} is taken ({error.strerror}): the ranks could not connect",
                "accelerate launch --main_process_port N with another; or end the process that "
                f"has it (ss -ltnp 'sport = :{number}')",
            )
    return Finding("port", f"{number} is free")


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _is_shared(path: Path) -> bool:
    """Whether a path lies on a network file system, by the table of mounts."""
    longest, kind = 0, ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, what = line.split()[:3]
        if path.resolve().is_relative_to(where) and len(where) >= longest:
            longest, kind = len(where), what
    return kind.startswith(("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "cifs"))
