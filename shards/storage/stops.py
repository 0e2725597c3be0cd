"""Stop signals: the work ends at once, or as soon as what is done is saved; never with a traceback.

A verb that is interrupted, and one that finds a stop requested, ends with Stopped: the same command
goes on.
"""

import _thread
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from shards.storage.errors import Stopped

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""The signals that request a stop: from a launcher or container, Slurm's time limit, Ctrl-C."""
ENDS = (signal.SIGTERM, signal.SIGINT)
"""Those that end the process when they come once more after StopFlag.GRACE."""


class StopFlag:
    """Records that a signal of STOPS has requested a stop of this process.

    The first one raises KeyboardInterrupt as well, where `stops_interrupt` wants it. GRACE seconds
    after the first SIGTERM or SIGINT another one ends the process at once. Not earlier: a launcher
    that receives the signal passes it on to ranks that have received it already.
    """

    GRACE = 20.0

    def __init__(self) -> None:
        self.requested, self.interrupts, self.interrupted = False, False, False
        self._pid = os.getpid()
        self._before = {number: signal.signal(number, self._on_signal) for number in STOPS}
        # Python's handlers wait for the main thread, which may be stuck in a collective.
        received, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        _thread.start_new_thread(self._end_by_second, (received,))

    @classmethod
    def current(cls) -> "StopFlag | None":
        """The flag of this process, if it has one."""
        flag = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        return flag if isinstance(flag, StopFlag) and flag._pid == os.getpid() else None

    @classmethod
    def installed(cls) -> "StopFlag":
        """The flag of this process, so that a stage sees a signal that came before it began."""
        return cls.current() or cls()

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt, once, if a stop is requested where it is wanted."""
        if self.requested and self.interrupts and not self.interrupted:
            self.interrupted = True
            sys.unraisablehook = self._on_swallowed
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A process that a library forked inherits this handler, but is not to stop.
            if number != signal.SIGUSR1:
                os._exit(0)
            return
        self.requested = True
        self.interrupt()

    def _end_by_second(self, received: int) -> None:
        """GRACE seconds after the first signal of ENDS let the system end the process by one."""
        with open(received, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in ENDS:
                    time.sleep(self.GRACE)
                    for end in ENDS:
                        if signal.getsignal(end) == self._on_signal:  # else the outcome is final
                            ctypes.CDLL(None).signal(end, None)  # SIG_DFL
                    return

    def remove(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)  # ends the thread

    def _on_swallowed(self, swallowed: Any) -> None:
        """A destructor or callback cannot pass the interrupt on: it comes again a moment later."""
        if not issubclass(swallowed.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(swallowed)
            return
        self.interrupted = False
        timer = threading.Timer(0.01, _thread.interrupt_main)
        timer.daemon = True
        timer.start()


@contextmanager
def stops_interrupt(wanted: bool = True) -> Iterator[None]:
    """Inside the block the first of STOPS raises KeyboardInterrupt, as does one that came before.

    If it is not `wanted`, none does: what may not be torn apart checks the flag instead. It is no
    Exception, so code that catches those of a broken photo does not swallow the stop; where a
    library makes another error of it, KeyboardInterrupt is raised from that at the block's end.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield
        return
    known = StopFlag.current()
    flag = known or StopFlag()
    outer = flag.interrupts
    try:
        flag.interrupts = wanted
        flag.interrupt()
        yield
    except Exception as error:
        if flag.interrupted and not isinstance(error, Stopped):
            raise KeyboardInterrupt from error
        raise
    finally:
        flag.interrupts = outer
        if known is None:
            flag.remove()


@contextmanager
def stops_blocked() -> Iterator[None]:
    """Processes started inside begin with STOPS blocked; a stop of this one waits for the end."""
    is_main = threading.current_thread() is threading.main_thread()  # which alone is interrupted
    flag = StopFlag.current() if is_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        # A signal that this thread blocks comes to another, such as one of torch's, and its handler
        # then runs in this one all the same.
        with stops_interrupt(False) if flag else nullcontext():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if flag:
        flag.interrupt()
