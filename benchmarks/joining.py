"""The join beside FAISS and beside the machine's limit: python -m benchmarks.joining

N items of D columns with planted groups of four, t = 0.5, one thread; every contender in a process
of its own, all in one run and in turns, slice by slice, so that what else the machine does falls on
all alike. "default" is the join at its defaults, block pairs committed to disk and 5 neighbours of
every item kept, beside FAISS's range_search and its search for 6 (the item itself included);
"gemm" and "faiss" find the pairs alone. CPU seconds of the whole search, the choice of the kernel
included (no reading, no start). Kernel variables are changed only in those processes. The limit is
N^2 D at the best float32 product of the machine seen in the run. The last line is JSON: figures and
ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dist_train.config.options import JoinConfig

THRESHOLD, BOTH_THRESHOLD = 0.5, 0.6
NEIGHBOURS = JoinConfig().neighbours
KERNELS = ("Zen", "Haswell", "SkylakeX")
SLICES, FAISS_SLICES, FAISS_ROWS = 24, 6, 512
"""Query rows of one slice of the limit and of FAISS, whose cost is the same for each row."""
Slices = Generator[dict[str, Any], None, None]


def vectors(items: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit rows float16 (N, D) in groups of four of cosine about 0.77, in random order."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.standard_normal((items // 4, width), np.float32), 4, axis=0)
    rows += np.float32(0.55) * rng.standard_normal((len(rows), width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[rng.permutation(len(rows))].astype(np.float16)


def limit(rows: np.ndarray, parts: int, neighbours: int) -> Slices:
    """A float32 product by NumPy and one by torch, whichever is faster; its rate."""
    import torch

    torch.set_num_threads(1)
    size, width = 2048, rows.shape[1]
    a, out = np.random.default_rng(0).random((size, width), np.float32), np.empty((size, size))
    out = out.astype(np.float32)
    mine, theirs = torch.from_numpy(a), torch.empty(size, size)
    ways = (lambda: np.matmul(a, a.T, out=out), lambda: torch.mm(mine, mine.T, out=theirs))
    for _ in range(SLICES):
        spent = []
        for work in ways:
            begin = time.process_time()
            work()
            spent.append(time.process_time() - begin)
        yield {"gflops": 2e-9 * size**2 * width / min(spent)}


def ours(rows: np.ndarray, parts: int, neighbours: int) -> Slices:
    """The engine gemm through to scored pairs; `parts` 2: image and text of half the width.

    With neighbours the block pairs are committed to a folder, as the stage does.
    """
    import torch

    torch.set_num_threads(1)
    from dist_train.distributed.precision import supports_bf16
    from dist_train.embedding.store import Rows
    from dist_train.matching.blocks import block_size, blocks_of
    from dist_train.matching.engines import GemmEngine
    from dist_train.matching.join import JoinLimits, score_block_pair, score_candidates
    from dist_train.matching.kernels import kernels_for
    from dist_train.matching.nearest import KthBestScores
    from dist_train.matching.sampling import time_kernels
    from dist_train.matching.vectors import ItemVectors, ModalityVectors
    from dist_train.matching.work_folder import WorkFolder

    items = len(rows)
    names, here = ("image", "text")[:parts], np.ones(items, bool)
    halves = np.split(rows.astype(np.float32), parts, axis=1)
    units = [half / np.linalg.norm(half, axis=1, keepdims=True) for half in halves]
    item_vectors = ItemVectors({
        name: ModalityVectors(Rows([unit.astype(np.float16)]), here, 1 / parts)
        for name, unit in zip(names, units, strict=True)
    })  # fmt: skip
    threshold = THRESHOLD if parts == 1 else BOTH_THRESHOLD
    yield {"wait": True}
    kernels = kernels_for(torch.device("cpu"), supports_bf16(torch.device("cpu")))
    best, pairs = time_kernels(item_vectors, threshold, neighbours, kernels)[0], 0
    engine = GemmEngine(
        item_vectors, blocks_of(item_vectors, block_size(items)), best.kernel, held=99
    )
    yield {"how": str(best)}
    if neighbours:
        with TemporaryDirectory() as folder:
            work, limits = WorkFolder(Path(folder)), JoinLimits(threshold, neighbours)
            known = KthBestScores(work.hidden / "kth_best.f32", items)
            for pair in engine.block_pairs:
                score_block_pair(engine, limits, pair, work, known)
                yield {}
            files = work.pairs.glob("*.parquet")
            yield {"pairs": sum(pq.read_metadata(file).num_rows for file in files)}
        return
    for pair in engine.block_pairs:
        for query, database in engine.candidates(pair, threshold):
            table = score_candidates(engine, query, database)
            pairs += int((table.score >= np.float32(threshold)).sum())
        yield {"pairs": pairs}


def peer(rows: np.ndarray, parts: int, neighbours: int) -> Slices:
    """faiss.IndexFlat.range_search as the wheel comes, on some rows, scaled to all.

    With neighbours each row is searched for them too: FAISS has no call for both.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    wide, found = rows.astype(np.float32), 0
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(wide)
    yield {"wait": True}
    for start in range(0, FAISS_SLICES * FAISS_ROWS, FAISS_ROWS):
        queries = wide[start : start + FAISS_ROWS]
        if len(queries):
            limits, _, _ = index.range_search(
                queries, float(np.nextafter(np.float32(THRESHOLD), 0))
            )
            found += int(limits[-1]) - len(queries)
            if neighbours:
                index.search(queries, neighbours + 1)
        yield {"pairs": found, "share": min(1.0, (start + len(queries)) / len(rows))}


CONTENDERS = {
    "limit": (limit, 1, 0),
    "faiss": (peer, 1, 0),
    "gemm": (ours, 1, 0),
    "image+text": (ours, 2, 0),
    "faiss default": (peer, 1, NEIGHBOURS),
    "default": (ours, 1, NEIGHBOURS),
}
"""The work, the modalities of a vector, and the neighbours of an item that are found."""


def contend(name: str, rows: np.ndarray) -> None:
    """Do a slice for each line that comes in; answer with its CPU seconds and its result."""
    work, *sizes = CONTENDERS[name]
    slices = work(rows, *sizes)
    for _ in sys.stdin:
        begin = time.process_time()
        result = next(slices, None)
        spent = 0.0 if result is None or "wait" in result else time.process_time() - begin
        print(json.dumps({"cpu": spent, "result": result}), flush=True)


@dataclass
class Child:
    """A contender in a separate process."""

    process: subprocess.Popen
    cpu: list[float] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    best: float = 0.0
    rates: list[float] = field(default_factory=list)
    done: bool = False
    slices: int = 50

    def go(self) -> None:
        """One slice; a contender whose kernel this processor lacks is done with nothing."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        answer = json.loads(line) if line.startswith("{") else {"result": None}
        self.done = answer["result"] is None
        if not self.done:
            self.cpu.append(answer["cpu"])
            self.result |= answer["result"]
            self.rates += [answer["result"]["gflops"]] if "gflops" in answer["result"] else []

    def seconds(self) -> float:
        """CPU seconds of the whole job; infinite when it could not run."""
        return sum(self.cpu) / self.result.get("share", 1.0) if any(self.cpu) else float("inf")


def start(args: argparse.Namespace, name: str, **variables: str) -> Child:
    """Start a contender with these variables and one thread."""
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"} | variables
    env["THP_MEM_ALLOC_ENABLE"] = "1"  # as build_pairs sets it
    env["OMP_NUM_THREADS"] = env["OPENBLAS_NUM_THREADS"] = "1"
    arguments = ["--items", str(args.items), "--width", str(args.width), "--contender", name]
    arguments += ["--vectors", args.vectors] if args.vectors else []
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.joining", *arguments],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return Child(
        process,
        slices={"limit": SLICES, "faiss": FAISS_SLICES, "faiss default": FAISS_SLICES}.get(
            name, 50
        ),
    )


def in_turns(children: dict[str, Child]) -> None:
    """Slice by slice, so that all are about equally far at any time."""
    while waiting := [child for child in children.values() if not child.done]:
        min(waiting, key=lambda child: len(child.cpu) / child.slices).go()
    for child in children.values():
        assert child.process.stdin is not None
        child.process.stdin.close()
        child.process.wait()


def main() -> None:
    """All contenders in turns; ratios by CPU seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument(
        "--vectors", help="unit rows (N, D) of a .npy file instead of generated ones"
    )
    parser.add_argument("--contender", choices=CONTENDERS)
    args = parser.parse_args()
    if args.contender:
        rows = np.load(args.vectors) if args.vectors else vectors(args.items, args.width)
        contend(args.contender, rows)
        return
    children = {name: start(args, name) for name in CONTENDERS}
    children |= {k: start(args, "faiss", OPENBLAS_CORETYPE=k) for k in KERNELS}
    in_turns(children)
    report(children, args.items, args.width)


def report(children: dict[str, Child], items: int, width: int) -> None:
    """Print what each took, and the ratios."""
    cpu = {name: child.seconds() for name, child in children.items() if name != "limit"}
    for name, seconds in cpu.items():
        print(f"{name}: {seconds:.1f} CPU s {json.dumps(children[name].result)}")
    rates = children["limit"].rates
    best = items**2 * width / max(rates) / 1e9
    faiss = min(cpu["faiss"], *(cpu[name] for name in KERNELS))
    ratios = {
        "gemm / faiss as it comes": cpu["gemm"] / cpu["faiss"],
        "gemm / faiss with its best kernel": cpu["gemm"] / faiss,
        "gemm / limit": cpu["gemm"] / best,
        "image+text / limit": cpu["image+text"] / best,
        "image+text / gemm": cpu["image+text"] / cpu["gemm"],
        "default / faiss default": cpu["default"] / cpu["faiss default"],
        "default / gemm": cpu["default"] / cpu["gemm"],
    }
    found = {"cpu": cpu, "limit": best, "gflops": [median(rates), max(rates)], "ratios": ratios}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
