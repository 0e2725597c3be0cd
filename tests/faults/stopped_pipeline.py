"""`dist-train run CONFIG` stopped by a signal in every stage, one after the other, then to its end.

Started as `-m tests.faults.stopped_pipeline CONFIG`. Each attempt is a fork that sends itself a
signal when it reaches a place of PLACES for the first time. The last line printed lists places and
exit codes.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from itertools import cycle

import torch

from dist_train.cli import main

PLACES = [
    "shards.pack.pack:seal",
    "dist_train.training.checkpoint:Checkpoints.load_newest",
    "dist_train.training.loop:export",
    "dist_train.embedding.embed:unit_vectors",
    "dist_train.embedding.embed:_finish",
    "dist_train.matching.index:build_shard",
    "dist_train.matching.index:_finish",
    "dist_train.matching.join:score_block_pair",
    "dist_train.matching.build_pairs:finish",
    "dist_train.decisions.match:_decide",
    "dist_train.decisions.score:per_item_scores",
    "dist_train.decisions.score:write_scores",
    "dist_train.report.html:gather",
    "dist_train.report.html:write_atomic",
]
"""Functions between two checks for a signal, and after the last check of a stage."""


def signal_at(place: str, number: signal.Signals) -> None:
    """From now on the first call of `place` begins with the signal."""
    module, _, name = place.partition(":")
    *inside, last = name.split(".")
    holder = importlib.import_module(module)
    for part in inside:
        holder = getattr(holder, part)
    function = getattr(holder, last)

    def signalled(*arguments, **options):
        setattr(holder, last, function)
        os.kill(os.getpid(), number)
        return function(*arguments, **options)

    setattr(holder, last, signalled)


def attempt(config: str, place: str | None, number: signal.Signals) -> int:
    """Run the pipeline in a forked process; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        if place is not None:
            signal_at(place, number)
        sys.argv = ["dist-train", "run", config]
        main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads would not be in the forks
    for place in PLACES:  # once, and not in every fork
        importlib.import_module(place.partition(":")[0])
    numbers = cycle([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    ends = [(place, attempt(sys.argv[1], place, next(numbers))) for place in [*PLACES, None]]
    print(json.dumps(ends))
