"""An all-reduce among real processes: whether they connect, the sum is right, and how fast it is.

Bus bandwidth as nccl-tests define it (doc/PERFORMANCE.md there): 2 (W - 1) / W of the bytes a
second, what a ring moves past each rank.
"""

import multiprocessing
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from dist_train.doctor.finding import Finding, fault

BACKEND = {"cpu": "gloo", "cuda": "nccl"}
NUMBERS = {"gloo": 1 << 22, "nccl": 1 << 26}
"""float32 values of the tensor that is summed: 17 MB, 268 MB."""
ROUNDS = 5
REMEDY = {
    "gloo": "GLOO_SOCKET_IFNAME=lo for one machine, else the interface that other nodes reach",
    "nccl": "NCCL_DEBUG=INFO shows where it stops; NCCL_P2P_DISABLE=1 and NCCL_SOCKET_IFNAME=... "
    "show whether a link is at fault",
}


def all_reduce(backend: str, world: int, seconds: float = 180) -> Finding:
    """Whether `world` new processes can sum a tensor over `backend` within `seconds`."""
    try:
        gigabytes = bus_bandwidth(backend, world, NUMBERS[backend], seconds)
    except (RuntimeError, TimeoutError) as error:
        return fault("all-reduce", f"{backend} over {world} processes: {error}", REMEDY[backend])
    message = f"{backend}, {world} processes on this machine: {gigabytes:.2f} GB/s bus bandwidth"
    return Finding("all-reduce", message)


def bus_bandwidth(backend: str, world: int, numbers: int, seconds: float) -> float:
    """GB/s of an all-reduce of `numbers` float32; raises as `run_ranks`, also for a wrong sum."""
    work = partial(all_reduce_seconds, numbers=numbers)
    slowest = max(run_ranks(work, backend, world, seconds))
    factor = 2 * (world - 1) / world if world > 1 else 1.0
    return factor * 4 * numbers / slowest / 1e9


def all_reduce_seconds(rank: int, world: int, device: torch.device, numbers: int) -> float:
    """Least seconds of an all-reduce of `numbers` float32; ArithmeticError for a wrong sum."""
    values, times = torch.empty(numbers, device=device), []
    for _ in range(ROUNDS + 1):  # the first also connects
        values.fill_(rank + 1)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])  # waits for a GPU too
        times.append(time.perf_counter() - start)
        if total != world * (world + 1) / 2 or not bool((values == total).all()):
            raise ArithmeticError(f"the sum over {world} ranks is {total}")
    return min(times[1:])


def run_ranks(
    work: Callable[[int, int, torch.device], Any], backend: str, world: int, seconds: float
) -> list[Any]:
    """`work(rank, world, device)` in `world` new processes that are one group.

    Raises RuntimeError with the error of a rank, TimeoutError if one needs longer than `seconds`.
    """
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        shared = (work, backend, world, seconds, f"file://{Path(folder) / 'group'}")
        ranks = [
            context.Process(target=_rank, args=(rank, sender, *shared), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(ranks, pipes, strict=True):
            process.start()
            sender.close()  # then only the rank holds it, and its death ends the pipe
        until, results = time.monotonic() + seconds, []
        try:
            for rank, (receiver, _) in enumerate(pipes):
                if not receiver.poll(max(0.0, until - time.monotonic())):
                    raise TimeoutError(f"rank {rank} gave no result")
                try:
                    result, error = receiver.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died") from None
                if error:
                    raise RuntimeError(f"rank {rank}: {error}")
                results.append(result)
            return results
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _rank(
    rank: int, pipe: Connection, work: Callable, backend: str, world: int, seconds: float, url: str
) -> None:
    try:
        torch.set_num_threads(1)
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        limit = timedelta(seconds=seconds)
        dist.init_process_group(backend, url, limit, world_size=world, rank=rank)
        pipe.send((work(rank, world, device), ""))
        # No rank leaves while others may still need it; run_ranks ends all of them.
        time.sleep(seconds)
    except Exception as error:  # the parent process reports it
        first = (str(error).splitlines() or [""])[0][:200]
        pipe.send((None, f"{type(error).__name__}: {first}"))
