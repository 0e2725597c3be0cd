"""Waiting for other ranks for as long as they live: hours of unequal work, minutes of silence.

A collective has a timeout of minutes, so that one rank that hangs ends all of them. But rank 0 may
hash a file for an hour, and one rank may have a block more to do than another. So ranks that come
far apart do not wait in a collective. Each says in the group's store that it has come, a thread
says every few seconds that the rank attempts, and only one that is silent for long is given up.
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
TELL_AFTER = 300.0
"""Seconds of waiting after which the log says for whom."""
LONGEST_PAUSE = 0.5
log = logging.getLogger(__name__)
_groups = itertools.count()


def timeout() -> timedelta:
    """How long a collective may take, and how long a rank may be silent."""
    text = os.environ.get(VARIABLE, str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise BadInput(f"{VARIABLE}={text}: write a number of seconds, such as {SECONDS:.0f}")
    return timedelta(seconds=seconds)


class Barrier:
    """The place where the ranks of the default process group wait for each other."""

    def __init__(self, rank: int, world: int) -> None:
        """All ranks make theirs at the same point."""
        self.rank, self.world = rank, world
        # A store of our own numbers: a process may make several, all ranks in the same order.
        self._store = dist.PrefixStore(f"dist_train/{next(_groups)}", _get_default_store())
        self._silence = timeout().total_seconds()
        self._every = min(10.0, self._silence / 5)
        self._number = 0
        self._ended = threading.Event()
        atexit.register(self._ended.set)
        threading.Thread(target=self._beat, name="meeting", daemon=True).start()

    def wait(self) -> None:
        """Until all ranks have come here; Failed when one is silent for longer than `timeout`."""
        self._number += 1
        names = [f"came/{self._number}/{rank}" for rank in range(self.world)]
        try:
            self._store.set(names[self.rank], "")
            self._wait_for(names)
            # All that are here have left the one before.
            self._store.delete_key(f"came/{self._number - 1}/{self.rank}")
        except dist.DistError as error:
            raise Failed(
                f"rank {self.rank}: the process that keeps the ranks together is gone "
                f"({str(error).splitlines()[0]}); the same command goes on"
            ) from None

    def request_stop(self) -> None:
        """From now on `stop_requested` says so on every rank."""
        self._store.set("stop", "")

    def stop_requested(self) -> bool:
        """Some rank has asked to stop; no rank waits for another to be told."""
        return self._store.check(["stop"])

    def _wait_for(self, names: list[str]) -> None:
        began = looked = time.monotonic()
        heard = {rank: (b"", began) for rank in range(self.world)}
        pause, told = 0.001, False
        while not self._store.check(names):
            time.sleep(pause)
            pause, now = min(2 * pause, LONGEST_PAUSE), time.monotonic()
            if now - looked > self._every:
                looked = now
                missing = [rank for rank in heard if not self._store.check([names[rank]])]
                self._listen(missing, heard, now)
                if not told and missing and now - began > TELL_AFTER:
                    told = True
                    log.warning("rank %d waits for rank %s, which works", self.rank, missing)

    def _listen(self, ranks: list[int], heard: dict[int, tuple[bytes, float]], now: float) -> None:
        for rank in ranks:
            name = f"beat/{rank}"
            beat = self._store.get(name) if self._store.check([name]) else b""
            if beat != heard[rank][0]:
                heard[rank] = (beat, now)
            elif now - heard[rank][1] > self._silence:
                raise Failed(
                    f"rank {rank} has been silent for {self._silence:.0f} s: its node is down, its "
                    f"link is cut or it is stopped; the same command goes on ({VARIABLE} in "
                    "seconds allows more)"
                )

    def _beat(self) -> None:
        for count in itertools.count(1):
            try:
                self._store.set(f"beat/{self.rank}", str(count))
            except dist.DistError:
                return  # the group is gone, and the rank will hear of it
            if self._ended.wait(self._every):
                return
