"""The join beside FAISS and beside the machine's limit: python -m tests.benchmarks.joining

N items of D columns with planted groups of four, t = 0.5, one thread; every contender in a process
of its own, in one run, CPU seconds of the whole search (no reading, no start). Kernel variables are
changed only in those processes. The limit is N^2 D at the best float32 product of the machine,
measured before, between and after. The last line is JSON: figures and ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np

THRESHOLD, BOUND_THRESHOLD = 0.5, 0.6
KERNELS = ("Zen", "Haswell", "SkylakeX")
FAISS_ROWS = 8_192
"""Asking rows that FAISS is timed on; its cost is the same for each."""


def vectors(items: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit rows float16 (N, D) in groups of four of cosine about 0.77, in random order."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.standard_normal((items // 4, width), np.float32), 4, axis=0)
    rows += np.float32(0.55) * rng.standard_normal((len(rows), width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[rng.permutation(len(rows))].astype(np.float16)


def limit(items: int, width: int) -> dict[str, float]:
    """CPU seconds of N^2 D at the best of NumPy's and torch's float32 products."""
    import torch

    torch.set_num_threads(1)
    best = 0.0
    for size in (1024, 2048, 4096):
        a, out = np.random.default_rng(0).random((size, width), np.float32), None
        out = np.empty((size, size), np.float32)
        mine, theirs = torch.from_numpy(a), torch.empty(size, size)
        for work in (lambda a=a, out=out: np.matmul(a, a.T, out=out),
                     lambda m=mine, t=theirs: torch.mm(m, m.T, out=t)):  # fmt: skip
            work()
            for _ in range(6):
                begin = time.process_time()
                work()
                best = max(best, 2 * size**2 * width / (time.process_time() - begin))
    return {"cpu": items**2 * width / best, "gflops": best / 1e9}


def ours(items: int, width: int, parts: int, cut: bool) -> dict[str, float]:
    """The engine gemm through to scored pairs; `parts` 2: image and text of half the width."""
    import torch

    torch.set_num_threads(1)
    from dist_train.embedding.store import Rows
    from dist_train.matching.blocks import block_size, blocks_of
    from dist_train.matching.engines import GemmEngine
    from dist_train.matching.join import TileFloors, Wanted, scored
    from dist_train.matching.kernels import kernels_for
    from dist_train.matching.sampling import sample_rows
    from dist_train.matching.sketches import Choice, Sketch, choose_sketch
    from dist_train.matching.views import ViewPart, Views
    from dist_train.runtime import bf16_pays

    names, here = ("image", "text")[:parts], np.ones(items, bool)
    halves = np.split(vectors(items, width).astype(np.float32), parts, axis=1)
    units = [half / np.linalg.norm(half, axis=1, keepdims=True) for half in halves]
    views = Views({
        name: ViewPart(Rows([unit.astype(np.float16)]), here, 1 / parts)
        for name, unit in zip(names, units, strict=True)
    })  # fmt: skip
    threshold = THRESHOLD if parts == 1 else BOUND_THRESHOLD
    wall, begin = time.perf_counter(), time.process_time()
    kernels = kernels_for(torch.device("cpu"), bf16_pays(torch.device("cpu")))
    ends = [width // parts * (n + 1) for n in range(parts)]
    choices = choose_sketch(sample_rows(views, names), kernels, threshold, 0.0, ends)
    best: Choice = choices[0] if cut else next(c for c in choices if c.sketch.columns is None)
    sketch: Sketch = best.sketch
    engine = GemmEngine(views, blocks_of(views, block_size(items)), {names: sketch}, held=99)
    floors, pairs = TileFloors(Wanted(threshold), None), 0
    for tile in engine.tiles:
        for asking, found in engine.candidates(tile, floors):
            table = scored(views, engine, asking, found)
            pairs += int((table.score >= np.float32(threshold)).sum())
    spent = time.process_time() - begin
    return {"cpu": spent, "wall": time.perf_counter() - wall, "pairs": pairs, "how": str(best)}


def peer(items: int, width: int) -> dict[str, float]:
    """faiss.IndexFlat.range_search as the wheel comes, for some of the rows, told for all."""
    import faiss

    faiss.omp_set_num_threads(1)
    rows = vectors(items, width).astype(np.float32)
    index = faiss.IndexFlatIP(width)
    index.add(rows)
    asking = rows[: min(FAISS_ROWS, items)]
    wall, begin = time.perf_counter(), time.process_time()
    limits, _, _ = index.range_search(asking, float(np.nextafter(np.float32(THRESHOLD), 0)))
    spent, share = time.process_time() - begin, items / len(asking)
    return {"cpu": share * spent, "wall": share * (time.perf_counter() - wall),
            "pairs": int(limits[-1] - len(asking)), "extrapolated": share}  # fmt: skip


def child(name: str, args: argparse.Namespace, **variables: str) -> dict[str, float] | None:
    """Run a contender in a process of its own; None when the processor lacks its kernel."""
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"} | variables
    env["OMP_NUM_THREADS"] = env["OPENBLAS_NUM_THREADS"] = "1"
    words = ["--items", str(args.items), "--width", str(args.width), "--contender", name]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.joining", *words],
        env=env, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {' '.join(variables.values())}: {json.dumps(found)}", flush=True)
    return found


CONTENDERS = {
    "limit": limit,
    "gemm": lambda n, d: ours(n, d, 1, True),
    "gemm, all columns": lambda n, d: ours(n, d, 1, False),
    "image+text": lambda n, d: ours(n, d, 2, True),
    "image+text, all columns": lambda n, d: ours(n, d, 2, False),
    "faiss": peer,
}


def main() -> None:
    """Every contender once, the limit three times; ratios by CPU seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--contender", choices=CONTENDERS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(CONTENDERS[args.contender](args.items, args.width)))
        return
    limits, found = [child("limit", args)], {}
    for name in ("faiss", "gemm", "gemm, all columns"):
        found[name] = child(name, args)
    limits.append(child("limit", args))
    for name in ("image+text", "image+text, all columns"):
        found[name] = child(name, args)
    kernels = {k: child("faiss", args, OPENBLAS_CORETYPE=k) for k in KERNELS}
    limits.append(child("limit", args))
    best_limit = min(one["cpu"] for one in limits if one)
    best_faiss = min(one["cpu"] for one in [found["faiss"], *kernels.values()] if one)
    gemm = found["gemm"]["cpu"]
    ratios = {
        "gemm / faiss as it comes": gemm / found["faiss"]["cpu"],
        "gemm / faiss with its best kernel": gemm / best_faiss,
        "gemm / limit": gemm / best_limit,
        "image+text with the bound / limit": found["image+text"]["cpu"] / best_limit,
        "image+text with the bound / without": found["image+text"]["cpu"]
        / found["image+text, all columns"]["cpu"],
    }  # fmt: skip
    print(json.dumps({"found": found, "kernels": kernels, "limits": limits, "ratios": ratios}))


if __name__ == "__main__":
    main()
