"""The doctor's checks, each on a real fault: wheels, drivers, mounts, ports, clocks, locks."""

import http.server
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from dist_train.doctor import machine, services, software
from dist_train.doctor.all_reduce import all_reduce
from dist_train.doctor.finding import Finding
from tests.support.launching import ROOT, environment
from tests.support.recorded_programs import Programs

MB = 10**6


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator:
    """Mounts a file system of memory with given options; only root may."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    where: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount-{len(where)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"this container may not mount: {done.stderr}")
        where.append(folder)
        return folder

    yield mount
    for folder in where:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


def is_fault(finding: Finding, *words: str) -> None:
    """A fault that says `words` and how to mend it."""
    assert finding.level == "fault", finding
    assert finding.remedy
    for word in words:
        assert word in str(finding)


# Software


def wheel(folder: Path, name: str) -> None:
    """What pip leaves of an installed package."""
    info = folder / f"{name.replace('-', '_')}-1.15.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.15.1\n")


def test_two_faiss_wheels(tmp_path: Path) -> None:
    is_fault(software.faiss_wheels([str(tmp_path)], 0), "not installed")
    wheel(tmp_path, "faiss-cpu")
    assert software.faiss_wheels([str(tmp_path)], 0).level == "fine"
    assert software.faiss_wheels([str(tmp_path)], 1).level == "note"
    wheel(tmp_path, "faiss-gpu-cu12")
    is_fault(software.faiss_wheels([str(tmp_path)], 0), "faiss-cpu 1.15.1, faiss-gpu-cu12",
             "pip uninstall -y faiss-cpu faiss-gpu")  # fmt: skip


def test_the_wheel_that_is_here() -> None:
    assert software.faiss_wheels(sys.path, 0).level == "fine"
    assert software.versions().level == "fine"


def test_a_torch_that_reads_weights_unsafely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "version", lambda name: "2.6.0+cpu")
    is_fault(software.versions(), "torch 2.6.0+cpu", "reads weights unsafely; install 2.10")


def card(bus: Path, number: int, vendor: str, kind: str) -> None:
    """A card as sysfs shows it."""
    folder = bus / f"0000:0{number}:00.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def nvidia_smi(programs: Programs, code: int, says: str) -> None:
    """A program that answers as nvidia-smi does."""
    programs.add("nvidia-smi", f"echo '{says}'\nexit {code}")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """The folder of programs that goes before all others."""
    found = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", found.path)
    return found


def test_a_missing_driver(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = tmp_path / "devices"
    card(bus, 2, "0x10de", "0x040300")  # a GPU's sound
    card(bus, 3, "0x8086", "0x030000")  # another maker's
    nvidia_smi(programs, 9, "NVIDIA-SMI has failed")
    assert software.gpu(bus, None, None, "auto").level == "fine"
    is_fault(software.gpu(bus, None, "13.0", "cuda"), "--device cuda")
    card(bus, 1, "0x10de", "0x030200")  # a GPU without a display
    is_fault(software.gpu(bus, None, "13.0", "auto"), "1 NVIDIA cards", "NVIDIA-SMI has failed")
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = software.gpu(bus, None, "13.0", "auto")
    is_fault(absent, "1 NVIDIA cards", "no driver", "nvidia-smi is not installed")


def test_a_driver_and_a_torch_that_do_not_fit(tmp_path: Path, programs: Programs) -> None:
    card(tmp_path, 1, "0x10de", "0x030200")
    nvidia_smi(programs, 0, "NVIDIA H100, 81559 MiB, 550.54")
    fits = software.gpu(tmp_path, (12, 4), "12.6", "cuda")
    assert (fits.level, "NVIDIA H100, 81559 MiB" in fits.message) == ("fine", True)
    is_fault(software.gpu(tmp_path, (12, 4), "13.0", "auto"), "CUDA 13.0", "12.4")
    is_fault(software.gpu(tmp_path, (12, 4), None, "auto"), "built for the CPU")


# Machine


def test_tiny_shared_memory(mounted) -> None:
    is_fault(machine.shared_memory(mounted("size=8m"), 64 * MB), "8.4 MB free", "--shm-size")
    assert machine.shared_memory(mounted("size=100m"), 64 * MB).level == "fine"


def test_shared_memory_needs_what_the_loaders_need(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    is_fault(machine.shared_memory(tmp_path, 2 * free), "bus error")


def test_limits() -> None:
    unlimited = resource.RLIM_INFINITY
    is_fault(machine.open_files((256, 4096)), "ulimit -n 4096")
    assert machine.open_files((1024, 1 << 20)).level == "note"
    assert machine.open_files((unlimited, unlimited)).level == "fine"
    is_fault(machine.locked_memory(64 * 1024, 2), "InfiniBand")
    assert machine.locked_memory(64 * 1024, 0).level == "fine"
    assert machine.locked_memory(unlimited, 2).level == "fine"


def test_little_disk(mounted, tmp_path: Path) -> None:
    assert machine.free_disk(mounted("size=50m") / "not" / "yet").level == "note"


def test_an_unwritable_cache(mounted, tmp_path: Path) -> None:
    assert machine.writable("cache", tmp_path / "new" / "cache", "HF_HOME").level == "fine"
    assert not (tmp_path / "new").exists()
    is_fault(machine.writable("cache", mounted("ro") / "hub", "HF_HOME"), "Read-only", "HF_HOME=")


def test_a_cache_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    is_fault(machine.writable("cache", tmp_path / "file" / "hub", "HF_HOME"), "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_cache_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    is_fault(machine.writable("cache", tmp_path, "HF_HOME"), "Permission denied")


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = taken.getsockname()[1]
        is_fault(machine.port(str(number)), f"{number} is taken", "--main_process_port")
    assert machine.port(str(number)).level == "fine"


@pytest.mark.parametrize("named", ["abc", "", "0", "65536", "-1"])
def test_a_port_that_is_none(named: str) -> None:
    is_fault(machine.port(named), "not a port from 1 to 65535", "unset MASTER_PORT")


# Clock


class Skewed(http.server.BaseHTTPRequestHandler):
    """A server whose clock is an hour behind, and that refuses what it is asked."""

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        self.send_header("Date", formatdate(time.time() - 3600, usegmt=True))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


def test_clock_skew() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Skewed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found, ahead = services.hub(f"http://127.0.0.1:{server.server_port}", offline=False)
        server.shutdown()
    assert found.level == "fine"
    assert ahead == pytest.approx(3600, abs=3)
    is_fault(machine.clock(ahead, "the hub"), "ahead of the hub", "NTP")
    is_fault(machine.clock(-ahead, "the hub"), "behind the hub")


def test_the_clock_of_this_file_system(tmp_path: Path) -> None:
    assert machine.clock(machine.ahead_of_files(tmp_path), "it").level == "fine"


# Extension locks

BUILDS = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(600)
"""


def test_a_stale_extension_lock(tmp_path: Path) -> None:
    """torch's own lock, held by a build, and left behind by one that was killed."""
    assert machine.extension_locks(tmp_path, time.time()).level == "fine"
    lock = tmp_path / "py311_cpu" / "shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    words = [sys.executable, "-c", BUILDS, str(lock)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        assert machine.extension_locks(tmp_path, time.time()).level == "fine"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        is_fault(machine.extension_locks(tmp_path, time.time() + 1), str(lock), f"rm {lock}")
    finally:
        process.kill()


# Services


def test_a_hub_that_is_out_of_reach() -> None:
    found, ahead = services.hub("http://127.0.0.1:1", offline=False)
    assert (found.level, ahead) == ("note", None)
    assert services.hub("http://127.0.0.1:1", offline=True)[0].level == "fine"


def test_slurm(tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.add("sbatch")
    programs.add("scontrol", "echo 'Slurmctld(primary) at ctl is UP'")
    found = services.slurm(True)
    assert (found.level, found.message) == ("fine", "Slurmctld(primary) at ctl is UP")
    programs.add("scontrol", "echo 'slurm_ping: error: unable to contact controller' >&2; exit 1")
    is_fault(services.slurm(True), "no controller answers (slurm_ping: error: unable to contact")
    assert services.slurm(False).level == "note"
    monkeypatch.setenv("PATH", str(tmp_path))
    found = services.slurm(True)
    assert (found.level, "not installed" in found.message) == ("fine", True)


# All-reduce


def test_an_all_reduce_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    is_fault(all_reduce("gloo", 2), "rank 0", "GLOO_SOCKET_IFNAME")


# The verb


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Of a machine with a lock that a compiler left behind."""
    lock = tmp_path / "build" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    ours = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "build"), "GLOO_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in environment().items() if name != "SLURM_CONF"} | ours


def test_the_verb_names_the_faults_and_ends_with_one(env: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ill = doctor(env | {"MASTER_PORT": str(taken.getsockname()[1])}, tmp_path)
    assert ill.returncode == 1, ill.stderr
    told = json.loads(ill.stdout)
    levels = {found["name"]: found["level"] for found in told["findings"]}
    assert levels["extension lock"] == levels["port"] == "fault"
    assert levels["all-reduce"] == levels["versions"] == levels["clock"] == "fine"
    assert told["fine"] is False
    assert "faults, see above" in ill.stderr


@pytest.mark.full
def test_the_verb_ends_with_zero_where_nothing_is_wrong(env: dict[str, str], tmp_path: Path):
    (tmp_path / "build" / "op" / "lock").unlink()
    with socket.socket() as free:
        free.bind(("", 0))
        number = free.getsockname()[1]
    well = doctor(env | {"MASTER_PORT": str(number)}, tmp_path)
    assert well.returncode == 0, well.stdout + well.stderr
    assert json.loads(well.stdout)["fine"] is True


def doctor(env: dict[str, str], out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "dist_train", "doctor", "--json", "--out", str(out)]
    return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
