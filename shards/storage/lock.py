"""Lock files: one process at a time, on one machine or on a file system that several share."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from io import FileIO
from pathlib import Path
from typing import Any

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
log = logging.getLogger("shards")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for it; where there are no locks, only warn of it."""
    try:
        held: AbstractContextManager[Any] = open_locked(path, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: a file system without locks; start the last task by itself", path)
        held = nullcontext()
    with held:
        yield


def open_locked(path: Path, kind: int) -> FileIO:
    """Open `path`, created if need be, under a flock of `kind` (fcntl.LOCK_EX or LOCK_SH).

    Waits for the lock. A former holder may have removed or renamed the file meanwhile; so it is
    returned only if it still lies at `path`, else the one that lies there now is locked.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The last holder may remove the folder before the file is created, or the file after.
        with suppress(FileNotFoundError), ExitStack() as opened:
            file = FileIO(path, "r+", opener=lambda p, mode: os.open(p, mode | os.O_CREAT, 0o666))
            opened.enter_context(file)
            fcntl.flock(file, kind)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                opened.pop_all()
                return file
