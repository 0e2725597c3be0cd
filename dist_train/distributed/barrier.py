"""A barrier that waits as long as the other ranks are alive: hours of work, minutes of silence.

A collective has a timeout of minutes, so that one rank that hangs ends all of them. But rank 0 may
hash a file for an hour, and one rank may have a block more to do than another. So ranks that may
arrive far apart do not wait in a collective. Each records its arrival in the group's store, a
thread of each writes a heartbeat every few seconds, and a rank without heartbeats is given up.
"""

import atexit
import itertools
import logging
import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from shards.storage.errors import BadInput, Failed

VARIABLE = "DIST_TRAIN_TIMEOUT"
SECONDS = 600.0
LOG_AFTER = 300.0
"""Seconds of waiting after which the log names the ranks that are missing."""
LONGEST_PAUSE = 0.5
log = logging.getLogger(__name__)
_groups = itertools.count()


def timeout() -> timedelta:
    """How long a collective may take, and how long a rank may go without a heartbeat.

    From the environment variable DIST_TRAIN_TIMEOUT in seconds; BadInput if it is not a number.
    """
    text = os.environ.get(VARIABLE, str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise BadInput(f"{VARIABLE}={text}: write a number of seconds, such as {SECONDS:.0f}")
    return timedelta(seconds=seconds)


class Barrier:
    """A barrier of the ranks of the default process group."""

    def __init__(self, rank: int, world: int) -> None:
        """Every rank must create it at the same point."""
        self.rank, self.world = rank, world
        # A process may create several, all ranks in the same order: each has its own prefix.
        self._store = dist.PrefixStore(f"dist_train/{next(_groups)}", _get_default_store())
        self._silence = timeout().total_seconds()
        self._every = min(10.0, self._silence / 5)
        self._number = 0
        self._ended = threading.Event()
        atexit.register(self._ended.set)
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def wait(self) -> None:
        """Wait until all ranks are here; Failed if one has no heartbeat for `timeout`."""
        self._number += 1
        arrivals = [f"came/{self._number}/{rank}" for rank in range(self.world)]
        began = checked = time.monotonic()
        heartbeats = {rank: (b"", began) for rank in range(self.world)}
        pause, logged = 0.001, False
        try:
            self._store.set(arrivals[self.rank], "")
            while not self._store.check(arrivals):
                time.sleep(pause)
                pause, now = min(2 * pause, LONGEST_PAUSE), time.monotonic()
                if now - checked <= self._every:
                    continue
                checked = now
                missing = [rank for rank in heartbeats if not self._store.check([arrivals[rank]])]
                for rank in missing:
                    name = f"beat/{rank}"
                    beat = self._store.get(name) if self._store.check([name]) else b""
                    if beat != heartbeats[rank][0]:
                        heartbeats[rank] = (beat, now)
                silent = [rank for rank in missing if now - heartbeats[rank][1] > self._silence]
                if silent:
                    raise Failed(
                        f"rank {silent[0]} has been silent for {self._silence:.0f} s: its node is "
                        "down, its link is cut or it is stopped; the same command goes on "
                        f"({VARIABLE} in seconds allows more)"
                    )
                if missing and not logged and now - began > LOG_AFTER:
                    logged = True
                    log.warning("rank %d waits for ranks %s, which are working", self.rank, missing)
            # All ranks that are here have left the previous barrier.
            self._store.delete_key(f"came/{self._number - 1}/{self.rank}")
        except dist.DistError as error:
            raise Failed(
                f"rank {self.rank}: the process that holds the group's store is gone "
                f"({str(error).splitlines()[0]}); the same command goes on"
            ) from None

    def stop_requested(self, mine: bool) -> bool:
        """Some rank has requested a stop, by `mine` this one; does not wait for any rank."""
        if mine:
            self._store.set("stop", "")
        return mine or self._store.check(["stop"])

    def _send_heartbeats(self) -> None:
        for count in itertools.count(1):
            try:
                self._store.set(f"beat/{self.rank}", str(count))
            except dist.DistError:
                return  # the store is gone: the next collective or barrier raises
            if self._ended.wait(self._every):
                return
