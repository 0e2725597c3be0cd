"""dist-train whose ranks log what they are served, and of which one may die or get a signal.

Started as `-m tests.support.dying_rank LOG FATE VERB …`. LOG-<rank>.jsonl gets the step that a rank
begins with, then the posting ids of every training batch, each before its step. FATE
is RANK:save:POINT (that rank is killed at the POINT-th change of the disk that its checkpoints
make), RANK:SIGNAL:BATCHES (it sends itself that signal with batch number BATCHES, counted from 1)
or none.
"""

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch

from dist_train.encoders import batches

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}


class Death:
    """SIGKILL at the `point`-th change of the disk within Checkpoints.save, counted over saves.

    A change is a write (of which half is done), an fsync, and the moment before a folder or name is
    made, moved or removed. After a rename comes an fsync, so a kill there is one after the rename.
    """

    def __init__(self, point: int) -> None:
        self.left, self.saving = point, False

    def arm(self) -> None:
        """Watch every change of the disk from now on."""
        from dist_train.training.checkpoint import Checkpoints

        save = Checkpoints.save

        def watched(*arguments: Any, **options: Any) -> Any:
            self.saving = True
            try:
                return save(*arguments, **options)
            finally:
                self.saving = False

        Checkpoints.save = watched
        sys.addaudithook(self._audit)
        os.fsync = self._before(os.fsync)
        writer = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._halving(writer, lambda call: Path(call[1]))
        Path.write_bytes = self._halving(Path.write_bytes, lambda call: call[0])

    def _audit(self, event: str, arguments: tuple) -> None:
        if self.saving and event in CHANGES and "/run/tensorboard" not in str(arguments[0]):
            self._count()

    def _before(self, change: Callable) -> Callable:
        def changed(*arguments: Any) -> Any:
            if self.saving:
                self._count()
            return change(*arguments)

        return changed

    def _halving(self, write: Callable, path_of: Callable[[tuple], Path]) -> Callable:
        def written(*arguments: Any, **options: Any) -> Any:
            outcome = write(*arguments, **options)
            if self.saving and self.left == 0:
                path = path_of(arguments)
                os.truncate(path, path.stat().st_size // 2)
            if self.saving:
                self._count()
            return outcome

        return written

    def _count(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def log_batches(path: str, number: int = 0, batch_of_signal: int = 0) -> None:
    """Log what this process is served in `path`, without a buffer: what a killed one wrote stays.

    With the batch `batch_of_signal`, counted from 1, it sends itself the signal `number`. To be
    called before the training is imported.
    """
    load = batches.load

    def write(value: object) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")

    def logged(*arguments: Any, **options: Any) -> Iterator[batches.Batch]:
        found, named = load(*arguments, **options), inspect.signature(load)
        stand_ins = named.bind(*arguments, **options).arguments.get("stand_ins")
        return found if stand_ins is None else each(found)  # a training alone has stand-ins

    def each(found: Iterator[batches.Batch]) -> Iterator[batches.Batch]:
        for count, batch in enumerate(found, 1):
            write(batch.posting_ids)
            if count == batch_of_signal:
                os.kill(os.getpid(), number)
            yield batch

    batches.load = logged
    from dist_train.training.checkpoint import Checkpoints

    load_newest = Checkpoints.load_newest

    def begun(self: Checkpoints, training: Any) -> int:
        step = load_newest(self, training)
        write(step)
        return step

    Checkpoints.load_newest = begun


if __name__ == "__main__":
    rank = os.environ.get("RANK", "0")
    log = f"{sys.argv.pop(1)}-{rank}.jsonl"
    chosen, how, count = (*sys.argv.pop(1).split(":"), "", "")[:3]
    if chosen == rank and how == "save":
        Death(int(count)).arm()
    signalled = chosen == rank and how != "save"
    log_batches(log, signal.Signals[how] if signalled else 0, int(count) if signalled else 0)
    from dist_train.cli import main

    main()
