"""Worker processes. A stop signal to the whole process group is handled by their owner alone."""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from shards.storage.errors import Failed
from shards.storage.stops import STOPS, stops_blocked


def each(
    function: Callable[..., Any], jobs: Iterable[tuple], workers: int, work: str = "working"
) -> Generator[Any]:
    """Yield `function(*job)` of every job in their order; in this process when `workers` is 1.

    At most 2 × `workers` jobs are held. Raises Failed, naming `work`, when a process was killed.
    """
    if workers == 1:
        yield from (function(*job) for job in jobs)
        return
    # spawn: a forked child would inherit whatever threads the parent has started.
    context = get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    with watched, held:
        with stops_blocked():
            # Started by itself: its start unblocks SIGINT and SIGTERM in this process.
            resource_tracker.ensure_running()
        with stops_blocked():
            pool = ProcessPoolExecutor(workers, context, _start_worker, (watched,))
        try:
            running: deque[Future] = deque()
            for job in jobs:
                with stops_blocked():  # each of the first jobs starts a process
                    running.append(pool.submit(function, *job))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            held.close()  # the pool's SIGTERM, which they ignore, would leave the others waiting
            raise Failed(
                f"{work}: one of {workers} processes was killed, perhaps for lack of memory (see "
                "dmesg); the same command goes on, with fewer --workers in less memory"
            ) from None
        except BaseException:
            held.close()  # ends the workers: unfinished jobs are repeated by the next start
            raise
        finally:
            pool.shutdown()


def _start_worker(watched: Connection) -> None:
    """Ignore STOPS, and exit as soon as the pipe's other end closes, even by the owner's death."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        watched.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_stops_to_parent() -> None:
    """Called in a process of multiprocessing: only its parent's SIGTERM or death ends it."""
    # Not ignored: torch and multiprocessing end workers by SIGTERM. Inherited by the thread below.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    started_by = multiprocessing.parent_process()  # os.getppid() is another once it is dead
    assert started_by is not None, "not a process of multiprocessing"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != started_by.pid:  # it died before prctl, from when on the kernel reports it
        os._exit(1)

    def wait() -> None:
        received = signal.sigwaitinfo(STOPS)
        while (received.si_signo, received.si_pid) != (signal.SIGTERM, started_by.pid):
            received = signal.sigwaitinfo(STOPS)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
