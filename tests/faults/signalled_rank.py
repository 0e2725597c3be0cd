"""dist-train, but a rank sends itself SIGUSR1 when it has its first batch to embed.

Started as `-m tests.faults.signalled_rank RANK VERB …`; the other ranks take their time, so that
they have more to do when it happens.
"""

import os
import signal
import sys
import time

from dist_train.cli import main
from dist_train.encoders.batches import Batch

SECONDS = 0.3
"""That a batch of another rank takes."""


def _disturb(signalled: bool) -> None:
    inputs_on = Batch.inputs_on

    def slow(self: Batch, device: object) -> object:
        if signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            time.sleep(SECONDS)
        return inputs_on(self, device)

    Batch.inputs_on = slow


if __name__ == "__main__":
    _disturb(sys.argv.pop(1) == os.environ["RANK"])
    main()
