"""Real processes over gloo that stay and answer one question after the other."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """W processes of one group; `ask` has each of them call a function of `module`.

    One server has imported it and forks them, so that many are started as fast as one.
    """

    def __init__(self, world: int, folder: Path, module: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([module])
        self.world, self.members = world, []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, world, str(folder))
            process = context.Process(target=_answer, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def ask(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
        """`function(rank, world, *arguments)` of every rank; raises what one of them raised."""
        for _, pipe in self.members:
            pipe.send((function, arguments))
        answers = []
        for rank, (_, pipe) in enumerate(self.members):
            assert pipe.poll(timeout), f"rank {rank} of {self.world} gave no answer to {arguments}"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def close(self) -> None:
        """End them."""
        for process, pipe in self.members:
            pipe.close()
            process.join(5)
            process.kill()


def as_launched(rank: int, world: int) -> None:
    """Have a stage that begins in this process find the group, as one that was launched does.

    A stop that was requested of an earlier stage is forgotten.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    if world > 1:
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def _answer(pipe: Any, rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        # By a file: a port found free may be taken again before rank 0 listens on it.
        rendezvous = f"file://{folder}/rendezvous-{world}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(function(rank, world, *arguments))
        except Exception as error:
            pipe.send(error)
    os._exit(0)  # gloo's threads may abort an interpreter that ends
