"""Tables larger than memory: SQLite in a temporary file, which sorts on the disk.

Whatever the number of rows, a statement takes CACHE of memory and a sort spills beside the file.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

CACHE = 16_000  # kB


@contextmanager
def scratch(path: Path) -> Iterator[sqlite3.Connection]:
    """An empty database beside `path`, under a temporary name; gone when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with closing(create(temporary)) as database:
            yield database
    finally:
        temporary.unlink(missing_ok=True)


def create(path: Path) -> sqlite3.Connection:
    """A new database of one writer that is made anew after a kill: no journal and no locks."""
    database = sqlite3.connect(f"{path.absolute().as_uri()}?vfs=unix-none", uri=True)
    folder = str(path.absolute().parent).replace("'", "''")
    for pragma in (
        "journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE}", "temp_store=FILE",
        # Else sorts spill into /tmp, which is memory on many nodes.
        f"temp_store_directory='{folder}'",
    ):  # fmt: skip
        database.execute(f"PRAGMA {pragma}")
    return database


def read_only(path: Path) -> sqlite3.Connection:
    """A database that nobody writes any more, on a file system that may know no locks."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
