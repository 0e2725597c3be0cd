"""Processes that do one piece of work on request, so that contenders take turns."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

Answer = Callable[[str], Any]


class Worker:
    """A process in which `serve(*arguments)` returns the function that answers every request."""

    def __init__(self, serve: Callable[..., Answer], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, serve, *arguments), daemon=True)

    def __enter__(self) -> "Worker":
        self._process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.send("end")
        self._process.join()

    def ask(self, what: str) -> None:
        """Start a request; others may get theirs before it has answered."""
        self._pipe.send(what)

    def answer(self) -> Any:
        """Wait for what it says to the last word."""
        return self._pipe.recv()


def _live(pipe: Any, serve: Callable[..., Answer], *arguments: object) -> None:
    answer = serve(*arguments)
    while (what := pipe.recv()) != "end":
        pipe.send(answer(what))
    if dist.is_initialized():
        dist.destroy_process_group()
