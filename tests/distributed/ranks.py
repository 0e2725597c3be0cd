"""Real processes over gloo that stay and answer one question after the other."""

import multiprocessing
import os
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


def _answer(pipe: Any, rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        # By a file: a port found free may be taken again before rank 0 listens on it.
        meeting = f"file://{folder}/meeting-{world}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
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
