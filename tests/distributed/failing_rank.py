"""dist-train, but the second rank meets an error in a shard: what do the other ranks do?

Started as `-m tests.distributed.failing_rank FILE VERB …`; FILE is made when the error is raised.
"""

import os
import sys
from pathlib import Path

from dist_train.cli import main
from shards.read.shard_set import ItemReader
from shards.storage.errors import Corrupt

READS = 40


def _fail_at_some_read(file: Path) -> None:
    read, count = ItemReader.read, 0

    def failing(self: ItemReader, position: int, photo: bool = True):
        nonlocal count
        count += 1
        if count > READS:
            file.touch()
            raise Corrupt(f"{self.tars[0]}: gone")
        return read(self, position, photo)

    ItemReader.read = failing


if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    if os.environ["RANK"] == "1":
        _fail_at_some_read(file)
    main()
