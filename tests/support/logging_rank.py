"""dist-train whose ranks log the items of every step.

Started as `-m tests.support.logging_rank LOG VERB …`: LOG-<rank>.jsonl gets the step that the
process begins with, then the item numbers of every batch, each before its step.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from dist_train.cli import main
from dist_train.encoders.batches import Batch
from dist_train.training import loop
from dist_train.training.checkpoint import Checkpoints


def _log_batches(path: str) -> None:
    load, load_newest = loop.load, Checkpoints.load_newest

    def write(value: object) -> None:
        # Written without a buffer: what a killed process wrote stays.
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")

    def logged_load(*arguments: Any, **options: Any) -> Iterator[Batch]:
        for batch in load(*arguments, **options):
            write(batch.items.tolist())
            yield batch

    def logged_load_newest(self: Checkpoints, training: Any) -> int:
        step = load_newest(self, training)
        write(step)
        return step

    loop.load, Checkpoints.load_newest = logged_load, logged_load_newest


if __name__ == "__main__":
    _log_batches(f"{sys.argv.pop(1)}-{os.environ.get('RANK', '0')}.jsonl")
    main()
