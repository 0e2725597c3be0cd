"""What a second worker of the join gains: python -m benchmarks.workers

One and two single-thread workers over one folder, beside one and two processes that only multiply
matrices: the machine itself gives less than twice with both cores busy. By the clock, in turns,
medians of some rounds; the start of the processes does not count. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.joining import THRESHOLD, vectors

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
ENVIRONMENT["THP_MEM_ALLOC_ENABLE"] = "1"  # as build_pairs sets it
PRODUCTS = 150
"""Products of 2048 x 768 with its transpose, in all, however many processes share them."""


def multiply(share: float) -> None:
    """Wait for a line, multiply, tell."""
    a = np.random.default_rng(0).random((2048, 768), np.float32)
    out = np.empty((2048, 2048), np.float32)
    np.matmul(a, a.T, out=out)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(round(PRODUCTS * share)):
        np.matmul(a, a.T, out=out)
    print(time.time(), flush=True)


def work(items: int, folder: Path, number: int, workers: int) -> None:
    """Wait for a line, score block pairs until all are done, report."""
    import torch

    torch.set_num_threads(1)
    from dist_train.distributed.runtime import Runtime
    from dist_train.matching.blocks import block_size, blocks_of
    from dist_train.matching.engines import GemmEngine
    from dist_train.matching.join import JoinLimits, join
    from dist_train.matching.kernels import kernels_for
    from dist_train.matching.sampling import time_kernels
    from dist_train.matching.vectors import vectors_of_array

    item_vectors, kernels = (
        vectors_of_array(vectors(items, 768)),
        kernels_for(torch.device("cpu"), False),
    )
    kernel = time_kernels(item_vectors, THRESHOLD, 0, kernels)[0].kernel
    engine = GemmEngine(item_vectors, blocks_of(item_vectors, block_size(items)), kernel, 99)
    runtime = Runtime("cpu")
    runtime.rank, runtime.world = number, workers
    print("ready", flush=True)
    sys.stdin.readline()
    join(engine, JoinLimits(THRESHOLD), folder, runtime)
    print(time.time(), flush=True)


def seconds(arguments: list[list[str]]) -> float:
    """From the start signal until the last of these processes is done."""
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.workers", *word],
            env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
        for word in arguments
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
    begin = time.time()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    return max(float(child.communicate()[0]) for child in children) - begin


def main() -> None:
    """Rounds of one and two, multiplying and joining."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--multiply", type=float)
    parser.add_argument("--work", nargs=3, metavar=("FOLDER", "NUMBER", "WORKERS"))
    args = parser.parse_args()
    if args.multiply:
        multiply(args.multiply)
    elif args.work:
        work(args.items, Path(args.work[0]), int(args.work[1]), int(args.work[2]))
    else:
        rounds(args.items, args.rounds)


def rounds(items: int, count: int) -> None:
    """Print the seconds of every round, and what the second of two gains."""
    taken: dict[str, list[float]] = {}
    for _ in range(count):
        for n in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                both = [["--multiply", str(1 / n)]] * n
                taken.setdefault(f"multiply {n}", []).append(seconds(both))
                both = [["--items", str(items), "--work", folder, str(k), str(n)]
                        for k in range(n)]  # fmt: skip
                taken.setdefault(f"join {n}", []).append(seconds(both))
        print(json.dumps({name: round(times[-1], 2) for name, times in taken.items()}), flush=True)
    gain = {name: median(taken[f"{name} 1"]) / median(taken[f"{name} 2"])
            for name in ("multiply", "join")}  # fmt: skip
    print(json.dumps({"gain": gain, "join / multiply": gain["join"] / gain["multiply"]}))


if __name__ == "__main__":
    main()
