"""Worker processes, which leave it to their owner to answer a signal to the whole group."""

import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from shards.errors import Failed

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks for a stop: a launcher or container, Slurm before a time limit, Ctrl-C."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def each(
    function: Callable[..., Any], jobs: Iterable[tuple], workers: int, work: str = "working"
) -> Generator[Any]:
    """Yield `function(*job)` of every job in their order; in this process when `workers` is 1.

    Few jobs are held at a time, so that their number costs no memory. Raises Failed, saying what
    `work` it was, when a process was killed.
    """
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    # spawn: a forked child would inherit whatever threads the parent has started.
    context = get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    with watched, held:
        with stops_blocked():
            resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM here once it started
        with stops_blocked():
            pool = ProcessPoolExecutor(workers, context, _end_with, (watched,))
            pool.submit(os.getpid)  # the first job starts the processes
        try:
            running: deque[Future] = deque()
            for job in jobs:
                running.append(pool.submit(function, *job))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise Failed(
                f"{work}: one of {workers} processes was killed, perhaps for want of memory (dmesg "
                "tells); the same command goes on, with fewer --workers in less memory"
            ) from None
        except BaseException:
            held.close()  # what is half done is done again: a stop does not wait for it
            raise
        finally:
            pool.shutdown()


def _end_with(watched: Connection) -> None:
    """End this worker as soon as the other end is closed, be it that its owner was killed."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        watched.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stops_blocked() -> Iterator[None]:
    """Processes that are started within it begin with STOPS blocked.

    What arrives for this process meanwhile is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_stops_to_parent() -> None:
    """Called in a worker: from now on its parent's SIGTERM or death ends it, no other of STOPS.

    SIGTERM cannot simply be ignored: torch and multiprocessing end workers by it and wait.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # inherited by the thread below
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died in between
        os._exit(1)

    def wait() -> None:
        said = signal.sigwaitinfo(STOPS)
        while (said.si_signo, said.si_pid) != (signal.SIGTERM, parent):
            said = signal.sigwaitinfo(STOPS)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def stops_interrupt() -> Iterator[None]:
    """Within it STOPS raise KeyboardInterrupt, and no second one does; main thread only."""
    # No Exception: what catches those of a broken photo would swallow the stop.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)  # a second one must not disturb the ending
    raise KeyboardInterrupt
