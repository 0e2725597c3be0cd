"""A private Slurm on this machine: its own ports or its own network, no accounting, no systemd.

Two forms. `plain`: every node is a slurmd with its own port on 127.0.0.1; any user can start it.
`hosts`: every node is a network namespace with its own address and host name, so that a node can
die and a link can be cut; needs root. Both find each other by SLURM_CONF alone, and are taken down
by the pids that they wrote.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

HOW_TO_GET = "Slurm is not installed: apt-get install --no-install-recommends slurm-wlm"
SBIN = "/usr/sbin:/sbin"
NETWORK = "10.77.0"
CONF = """
ClusterName=ci
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoAddrCache
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={run}/log/slurmctld.log
SlurmdLogFile={run}/log/slurmd.%n.log
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
KillWait=30
CompleteWait=0
MinJobAge=3600
InactiveLimit=0
OverTimeLimit=0
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10:00 State=UP PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501


def is_installed() -> bool:
    """Debian's slurm-wlm is here."""
    return all(shutil.which(name, path=_path()) for name in ("slurmctld", "slurmd", "sbatch"))


def can_have_hosts() -> bool:
    """Root, and a kernel that lets it make networks."""
    if os.geteuid() != 0 or not shutil.which("ip", path=_path()):
        return False
    name = f"dt{os.getpid()}probe"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return added.returncode == 0


class Cluster:
    """A running Slurm of some nodes, each with 4 CPUs whatever the machine has."""

    def __init__(self, run: Path, nodes: int, hosts: bool) -> None:
        """Start it below `run`; RuntimeError with the daemons' logs when it does not come up."""
        self.run, self.hosts = run, hosts
        self.names = [f"node{n}" for n in range(1, nodes + 1)]
        self.conf, self.tag = run / "slurm.conf", f"dt{os.getpid()}"
        for folder in ("log", "state", *(f"spool.{name}" for name in self.names)):
            (run / folder).mkdir(parents=True)
        try:
            if hosts:
                self._make_network()
            self._write_conf()
            self._daemon("ctl", "slurmctld", "-c")
            for name in self.names:
                self.start_node(name)
            self.wait_for(lambda: self._idle() == nodes, 60, "idle nodes")
        except BaseException:
            print(self.logs())
            self.stop()
            raise

    # ── what a test does with it

    def environment(self) -> dict[str, str]:
        """The variables by which Slurm's commands find it."""
        gloo = "eth0" if self.hosts else "lo"
        return {**os.environ, "SLURM_CONF": str(self.conf), "PATH": _path(),
                "GLOO_SOCKET_IFNAME": gloo}  # fmt: skip

    def call(self, *arguments: object, host: str = "ctl", check: bool = True, **more: str) -> str:
        """A command on a host; what it printed. Fails with that when it fails."""
        done = subprocess.run(
            [*self.on(host), *map(str, arguments)], env=self.environment() | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{arguments}: {done.stdout}"
        return done.stdout

    def sbatch(self, *arguments: object, **more: str) -> str:
        """Submit a job; its number."""
        return self.call("sbatch", "--parsable", *arguments, **more).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "-o", "show", "job", job)))

    def wait_until(self, job: str, state: str, restarts: int = 0, seconds: float = 240) -> None:
        """Until the job is in `state`, with so many restarts; fails when it has ended otherwise."""

        def there() -> bool:
            found = self.job(job)
            ended = found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            wanted = found["JobState"] == state and int(found["Restarts"]) >= restarts
            assert wanted or not ended, f"job {job} is {found['JobState']}, not {state}"
            return wanted

        self.wait_for(there, seconds, f"job {job} {state}")

    def wait_for(self, condition, seconds: float, what: str) -> None:
        """Poll until the condition holds; fails with the state of the cluster when it does not."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                queue = self.call("squeue", check=False) + self.call(
                    "sinfo", "-N", "-l", check=False
                )
                raise AssertionError(f"no {what} within {seconds:.0f} s\n{queue}")
            time.sleep(0.3)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._daemon(name, "slurmd", *([] if self.hosts else ["-N", name]))

    def kill_node(self, name: str) -> None:
        """The node dies: every process of it, at once (form hosts)."""
        for pid in self.pids(name):
            _kill(pid, signal.SIGKILL)

    def link(self, name: str, up: bool) -> None:
        """Cut the link of a node, or restore it (form hosts)."""
        _ip("link", "set", f"{self.tag}v{name[4:]}", "up" if up else "down")

    def pids(self, name: str) -> list[int]:
        """The processes of a node, or of ctl (form hosts)."""
        command = ["ip", "netns", "pids", f"{self.tag}-{name}"]
        listed = subprocess.run(command, env=_sbin(), text=True, capture_output=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def logs(self) -> str:
        """The end of every daemon's log."""
        return "\n".join(
            f"{path.name}: " + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted((self.run / "log").glob("*.log"))
        )

    def daemons(self) -> list[int]:
        """The pids of the daemons that wrote one and are alive."""
        found = []
        for file in self.run.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):  # it goes with its daemon
                found.append(int(file.read_text()))
        return [pid for pid in found if _is_alive(pid)]

    def stop(self) -> None:
        """End all jobs and daemons, by pid; networks are removed."""
        with contextlib.suppress(Exception):
            jobs = self.call("squeue", "-h", "-o", "%A", check=False).split()
            for job in set(filter(str.isdigit, jobs)):
                self.call("scancel", "--signal=KILL", "--full", job, check=False)
                self.call("scancel", job, check=False)
        pids = self.daemons()
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while self.daemons() and time.monotonic() < end:
            time.sleep(0.1)
        for pid in self.daemons():
            _kill(pid, signal.SIGKILL)
        if self.hosts:
            self._remove_network()

    # ── how it is started

    def _write_conf(self) -> None:
        text = CONF.format(run=self.run, user=getpass.getuser())
        nodes = f"NodeName=node[1-{len(self.names)}]"
        each = "CPUs=4 RealMemory=4000 State=UNKNOWN"
        if self.hosts:
            text += f"SlurmctldHost=ctl({NETWORK}.254)\nSlurmctldPort=6817\nSlurmdPort=6818\n"
            text += f"{nodes} {each}\n"
        else:
            control, *ports = _free_ports(len(self.names) + 1)
            text += f"SlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={control}\n"
            text += "".join(
                f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} {each}\n"
                for name, port in zip(self.names, ports, strict=True)
            )
        self.conf.write_text(text)

    def _make_network(self) -> None:
        hosts = {"ctl": 254} | {name: int(name[4:]) for name in self.names}
        lines = [f"{NETWORK}.{octet} {name}" for name, octet in hosts.items()]
        (self.run / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        _ip("link", "add", f"{self.tag}br", "type", "bridge")
        _ip("link", "set", f"{self.tag}br", "up")
        for name, octet in hosts.items():
            space, outer = f"{self.tag}-{name}", f"{self.tag}v{octet}"
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outer, "master", f"{self.tag}br", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{NETWORK}.{octet}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _remove_network(self) -> None:
        for name in ("ctl", *self.names):
            for pid in self.pids(name):  # what jobs have left
                _kill(pid, signal.SIGKILL)
            octet = "254" if name == "ctl" else name[4:]
            for arguments in (["link", "del", f"{self.tag}v{octet}"],
                          ["netns", "del", f"{self.tag}-{name}"]):  # fmt: skip
                subprocess.run(["ip", *arguments], env=_sbin(), capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self.tag}br"], env=_sbin(), capture_output=True,
                       check=False)  # fmt: skip

    def on(self, host: str) -> list[str]:
        """The arguments that put a command on a host. `ip netns exec` would hide the cgroups."""
        if not self.hosts:
            return []
        inner = f'mount --bind {self.run}/hosts /etc/hosts && hostname {host} && exec "$@"'
        return ["nsenter", f"--net=/run/netns/{self.tag}-{host}", "unshare", "--uts", "--mount",
                "sh", "-c", inner, "sh"]  # fmt: skip

    def _daemon(self, host: str, name: str, *arguments: str) -> None:
        subprocess.run(
            [*self.on(host), name, *arguments, "-f", str(self.conf)], env=self.environment(),
            check=True, timeout=60, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _idle(self) -> int:
        listed = self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
        return len([line for line in listed.split() if line in self.names])


def _path() -> str:
    return f"{os.environ['PATH']}:{SBIN}"


def _sbin() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], env=_sbin(), check=True, capture_output=True, timeout=20)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False
