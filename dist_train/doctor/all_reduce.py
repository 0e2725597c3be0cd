"""An all-reduce among real processes: whether they meet, whether the sum is right, how fast it is.

Bus bandwidth as nccl-tests define it (doc/PERFORMANCE.md there): 2 (W - 1) / W of the bytes a
second, what a ring moves past each rank.
"""

import multiprocessing
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from dist_train.doctor.finding import Finding, fault

NUMBERS = {"gloo": 1 << 22, "nccl": 1 << 26}
"""float32 of the tensor that is summed: 17 MB, 268 MB."""
ROUNDS = 5


def all_reduce(backend: str, world: int, seconds: float = 180) -> Finding:
    """`world` processes of their own sum a tensor over `backend`, within `seconds`."""
    try:
        gigabytes = bus_bandwidth(backend, world, seconds)
    except (RuntimeError, TimeoutError) as error:
        return fault("all-reduce", f"{backend} over {world} processes: {error}", REMEDY[backend])
    said = f"{backend}, {world} processes on this machine: {gigabytes:.2f} GB/s of the bus"
    return Finding("all-reduce", said)


REMEDY = {
    "gloo": "GLOO_SOCKET_IFNAME=lo for one machine, else the interface that other nodes reach",
    "nccl": "NCCL_DEBUG=INFO tells where it stops; NCCL_P2P_DISABLE=1 and NCCL_SOCKET_IFNAME=... "
    "tell whether a link is at fault",
}


def bus_bandwidth(backend: str, world: int, seconds: float) -> float:
    """GB/s of an all-reduce; raises as `ask_ranks` does, of a wrong sum too."""
    numbers = NUMBERS[backend]
    slowest = max(ask_ranks(fastest_sum, backend, world, seconds, numbers))
    return bus_share("all_reduce", world) * 4 * numbers / slowest / 1e9


def bus_share(collective: str, world: int) -> float:
    """What a ring moves past each rank, as a share of the whole tensor."""
    alone = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[collective]
    return alone * (world - 1) / world if world > 1 else 1.0


def ask_ranks(
    function: Callable[..., Any], backend: str, world: int, seconds: float, *arguments: Any
) -> list[Any]:
    """`function(rank, world, device, *arguments)` in `world` processes that are one group.

    Raises RuntimeError with what a rank met, TimeoutError when one gives no answer in `seconds`.
    """
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        what = (function, backend, folder, seconds, arguments)
        ranks = [
            context.Process(target=_rank, args=(says, rank, world, *what), daemon=True)
            for rank, (_, says) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        try:
            return _answers([hears for hears, _ in pipes], time.monotonic() + seconds)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _answers(pipes: list[Connection], until: float) -> list[Any]:
    answers: list[Any] = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError(f"rank {rank} gave no answer")
        try:
            answer, fault = pipe.recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} died") from None
        if fault:
            raise RuntimeError(f"rank {rank}: {fault}")
        answers.append(answer)
    return answers


def _rank(
    pipe: Connection, rank: int, world: int, function: Callable[..., Any], backend: str,
    folder: str, seconds: float, arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    try:
        torch.set_num_threads(1)
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        meeting = f"file://{Path(folder) / 'meeting'}"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world,
                                timeout=timedelta(seconds=seconds))  # fmt: skip
        pipe.send((function(rank, world, device, *arguments), ""))
        # Nobody leaves while another may still hear from it; then all are ended.
        time.sleep(seconds)
    except Exception as error:  # told to the process that asks, by name
        said = (str(error).splitlines() or [""])[0][:200]
        pipe.send((None, f"{type(error).__name__}: {said}"))


def fastest_sum(rank: int, world: int, device: torch.device, numbers: int) -> float:
    """Least seconds of an all-reduce of `numbers` float32; ArithmeticError for a wrong sum."""
    values, times = torch.empty(numbers, device=device), []
    for _ in range(ROUNDS + 1):  # the first connects
        values.fill_(rank + 1)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])  # waits for a GPU too
        times.append(time.perf_counter() - start)
        if total != world * (world + 1) / 2 or not bool((values == total).all()):
            raise ArithmeticError(f"the sum over {world} ranks came out as {total}")
    return min(times[1:])
