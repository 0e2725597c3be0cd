"""What links cost, apart from everything else: python -m benchmarks.links [step] [MBIT ...].

Up to four ranks, each in a separate network namespace on one bridge, their links cut down by tc
(a token bucket in both directions). Printed for each collective are the seconds, the bytes that
each rank sent (counted by the kernel) beside those of a ring, and the share of the link's rate that
was used; for a complete training step (step) the bytes on the wire beside the formula of
docs/design/scale.md. Needs root.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TAG, NET = f"dtl{os.getpid() % 10_000}", "10.78.0"
PORT = 23_456
RATES = (100, 1000)
"""Mbit/s."""
SIZES = (1 << 14, 1 << 18, 1 << 20)
"""float32 of the whole tensor: 64 kB, 1 MB, 4 MB."""
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def ip(*arguments: object, needed: bool = True) -> None:
    """One ip or tc command."""
    line = [str(word) for word in arguments]
    subprocess.run(line, check=needed, capture_output=True, timeout=30)


@contextmanager
def hosts(count: int, mbit: int) -> Iterator[list[str]]:
    """Names of namespaces on one bridge, each with a link of `mbit` Mbit/s each way."""
    names = [f"{TAG}-{n}" for n in range(count)]
    try:
        ip("ip", "link", "add", f"{TAG}br", "type", "bridge")
        ip("ip", "link", "set", f"{TAG}br", "up")
        for n, name in enumerate(names):
            outer = f"{TAG}v{n}"
            ip("ip", "netns", "add", name)
            ip("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("ip", "link", "set", outer, "master", f"{TAG}br", "up")
            inside = ("ip", "-n", name)
            ip(*inside, "link", "set", "lo", "up")
            ip(*inside, "addr", "add", f"{NET}.{n + 1}/24", "dev", "eth0")
            ip(*inside, "link", "set", "eth0", "up")
            bucket = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "200ms")
            ip("tc", "qdisc", "add", "dev", outer, *bucket)
            ip("tc", "-n", name, "qdisc", "add", "dev", "eth0", *bucket)
        yield names
    finally:
        for n, name in enumerate(names):
            ip("ip", "link", "del", f"{TAG}v{n}", needed=False)
            ip("ip", "netns", "del", name, needed=False)
        ip("ip", "link", "del", f"{TAG}br", needed=False)


def measure(world: int, mbit: int, what: str) -> list[dict[str, Any]]:
    """What rank 0 of `world` measured over such links."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with hosts(world, mbit) as names:
        line = [sys.executable, "-m", "benchmarks.links", "rank"]
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *line, str(rank), str(world), what],
                env=env, stdout=subprocess.PIPE, text=True,
            )
            for rank, name in enumerate(names)
        ]  # fmt: skip
        try:
            outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return json.loads(outputs[0])


def rank(number: int, world: int, what: str) -> None:
    """One rank's measurements, as JSON."""
    import torch.distributed as dist

    where = f"tcp://{NET}.1:{PORT}"
    dist.init_process_group("gloo", init_method=where, rank=number, world_size=world)
    rows = step_rows(number, world) if what == "step" else list(collective_rows(number, world))
    dist.barrier()
    print(json.dumps(rows))


def collective_rows(number: int, world: int) -> Iterator[dict[str, Any]]:
    """Each collective, by size."""
    for name, make in collectives(number, world).items():
        for numbers in SIZES:
            work = make(numbers)
            work()  # connects
            seconds, sent = timed(work, 3)
            yield {"what": name, "bytes": 4 * numbers, "seconds": seconds, "sent": sent,
                   "ring": ring_share(name, world) * 4 * numbers}  # fmt: skip


def step_rows(number: int, world: int) -> list[dict[str, Any]]:
    """A whole training step."""
    from benchmarks.scaling import TrainingStep, predicted

    step = TrainingStep(number, world)
    for _ in range(2):  # DDP settles its buckets
        step()
    seconds, sent = timed(step, 2)
    whole = predicted(step, world)
    return [{"what": "step", "bytes": sum(whole.values()), "seconds": seconds, "sent": sent,
             "ring": step_sends(whole, world)}]  # fmt: skip


def ring_share(name: str, world: int) -> float:
    """What a ring sends from each rank, as a share of the whole tensor."""
    return (2 if name == "all_reduce" else 1) * (world - 1) / world


def step_sends(whole: dict[str, int], world: int) -> float:
    """Bytes that leave a rank in a step: encoder and neck are summed, the head's are halves."""
    return (
        ring_share("all_reduce", world) * (whole["encoder"] + whole["neck"])
        + ring_share("all_gather", world) * whole["head"]
    )


def collectives(number: int, world: int) -> dict[str, Callable[[int], Callable[[], object]]]:
    """By name: of the numbers of the whole tensor, what is called."""
    import torch
    import torch.distributed as dist

    def all_reduce(numbers: int) -> Callable[[], object]:
        whole = torch.ones(numbers)
        return lambda: dist.all_reduce(whole)

    def all_gather(numbers: int) -> Callable[[], object]:
        part = torch.ones(numbers // world)
        whole = torch.empty(len(part) * world)
        return lambda: dist.all_gather_into_tensor(whole, part)

    def reduce_scatter(numbers: int) -> Callable[[], object]:
        part = torch.empty(numbers // world)
        whole = torch.ones(len(part) * world)
        return lambda: dist.reduce_scatter_tensor(part, whole)

    return {"all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter}


def timed(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds and bytes sent, of one of `rounds`."""
    import torch.distributed as dist

    dist.barrier()
    before, start = int(SENT.read_text()), time.perf_counter()
    for _ in range(rounds):
        work()
    took = time.perf_counter() - start
    return took / rounds, (int(SENT.read_text()) - before) / rounds


def main(arguments: list[str]) -> None:
    """Print a line a collective (or for the step), number of ranks and rate."""
    what = "step" if "step" in arguments else "collectives"
    rates = [int(word) for word in arguments if word.isdigit()] or RATES
    print("Mbit/s ranks what                bytes   seconds sent/ring of the link")
    for mbit in rates:
        for world in (2, 3, 4):
            for row in measure(world, mbit, what):
                used = row["sent"] * 8 / row["seconds"] / mbit / 1e6
                ratio = row["sent"] / row["ring"]
                print(f"{mbit:6} {world:5} {row['what']:14} {row['bytes']:10} "
                      f"{row['seconds']:9.4f} {ratio:9.3f} {used:11.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main(sys.argv[1:])
