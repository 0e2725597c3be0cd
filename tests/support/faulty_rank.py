"""dist-train with a fault of one rank in one of its training steps.

Started as `-m tests.support.faulty_rank WHAT RANK STEP VERB …`, with accumulation 1. WHAT is
`raise`, `kill`, `nan` (NaN in the batch), `flip` (a bit of a weight) or `head` (the gradient of a
class centre is infinite). STEP counts this attempt's batches from 0; `3-7` is a range of them. The
file that the variable FAULT_AT names is created at that moment.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dist_train.cli import main
from dist_train.encoders.batches import Batch
from dist_train.heads.chunks import Exponentials
from dist_train.training import loop
from dist_train.training.loop import Stepper


class Fault:
    """A fault of this rank."""

    def __init__(self, what: str, steps: str) -> None:
        first, _, last = steps.partition("-")
        self.what, self.steps = what, range(int(first), int(last or first) + 1)

    def arm(self) -> None:
        """Wrap the loading of batches and the step."""
        load, run_step = loop.load, Stepper.run_step

        def faulty_load(*arguments: Any, **options: Any) -> Iterator[Batch]:
            for count, batch in enumerate(load(*arguments, **options)):
                if count in self.steps and self.what == "nan":
                    batch.inputs[0][:1] = float("nan")
                yield batch

        def faulty_step(stepper: Stepper, step: int) -> Any:
            if step in self.steps:
                self._happen(stepper)
            return run_step(stepper, step)

        loop.load, Stepper.run_step = faulty_load, faulty_step

    def _happen(self, stepper: Stepper) -> None:
        if file := os.environ.get("FAULT_AT"):
            Path(file).touch()
        if self.what == "raise":
            raise ValueError("the moon is in the way")
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "flip":
            weight = next(p for p in stepper.training.encoder.parameters() if p.ndim > 1)
            weight.data.view(torch.int32)[(0,) * weight.ndim] ^= 1 << 22
        if self.what == "head":
            spoil_centres()


def spoil_centres() -> None:
    """The next gradient of this rank's centres is infinite in one place."""
    gradients = Exponentials.gradients

    def spoilt(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        Exponentials.gradients = gradients
        d_embeddings, d_rows = gradients(*arguments)
        d_rows[0, 0] = torch.inf
        return d_embeddings, d_rows

    Exponentials.gradients = spoilt


if __name__ == "__main__":
    what, rank, steps = (sys.argv.pop(1) for _ in range(3))
    if os.environ.get("RANK", "0") == rank:
        Fault(what, steps).arm()
    main()
