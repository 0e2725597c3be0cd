"""Tables larger than memory: SQLite in a temporary file, whose sorts spill beside it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from shards.storage.files import temporary_name

CACHE = 16_000  # kB


@contextmanager
def scratch(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield an empty database beside `path` under a temporary name; removed when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)
    try:
        with closing(create(temporary)) as database:
            yield database
    finally:
        temporary.unlink(missing_ok=True)


def create(path: Path) -> sqlite3.Connection:
    """Create a database of one writer. After a kill it is created again: no journal, no locks."""
    database = sqlite3.connect(f"{path.absolute().as_uri()}?vfs=unix-none", uri=True)
    folder = str(path.absolute().parent).replace("'", "''")
    database.execute("PRAGMA journal_mode=OFF")
    database.execute("PRAGMA synchronous=OFF")
    database.execute(f"PRAGMA cache_size=-{CACHE}")
    database.execute("PRAGMA temp_store=FILE")
    # Without this, sorts spill into /tmp, which is memory on many nodes.
    database.execute(f"PRAGMA temp_store_directory='{folder}'")
    return database
