"""One of two ranks that wait for each other: -m tests.distributed.waiting_rank SECONDS STOPPED.

Rank 0 works SECONDS before it comes; with STOPPED rank 1 stops as a whole, as a node that is cut.
"""

import os
import signal
import sys
import time

from dist_train.distributed.runtime import Runtime


def main(seconds: float, stopped: bool) -> None:
    runtime = Runtime("cpu")
    assert runtime.all_reduce_sum(1.0) == 2
    if stopped and runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if runtime.is_main:
        time.sleep(seconds)
    runtime.barrier()
    received = runtime.broadcast({"from": runtime.rank})
    assert received == {"from": 0}
    assert runtime.all_gather(runtime.rank) == [0, 1]
    print(f"rank {runtime.rank} met", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2] == "stopped")
