"""Stop signals: a stage that receives one saves its work and ends; the same command goes on."""

import os
import signal
import time
from types import FrameType

from shards.storage.workers import STOPS


class StopFlag:
    """Records that a signal of STOPS has requested a stop of this process.

    SIGTERM or SIGINT again after GRACE seconds ends the process. Not earlier: a launcher that
    receives the signal passes it on to ranks that have received it already.
    """

    GRACE = 20.0

    def __init__(self) -> None:
        self.requested = False
        self._first_request = 0.0
        self._pid = os.getpid()
        for number in STOPS:
            signal.signal(number, self._on_signal)

    @classmethod
    def installed(cls) -> "StopFlag":
        """The flag of this process, so that a stage sees a signal that came before it began."""
        flag = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(flag, StopFlag) and flag._pid == os.getpid():
            return flag
        return cls()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A process that a library forked inherits this handler, but is not to stop.
            if number != signal.SIGUSR1:
                os._exit(0)
            return
        if number != signal.SIGUSR1:
            now = time.monotonic()
            if self._first_request and now - self._first_request > self.GRACE:
                signal.signal(number, signal.SIG_DFL)
                os.kill(self._pid, number)
            self._first_request = self._first_request or now
        self.requested = True
