"""The planner beside what happened: python -m tests.benchmarks.planning --items 20000 100000

For each N a set of random unit rows in groups of four (float16, D columns) is written to disk. One
process plans it, knowing N, D and the options alone; a fresh one indexes it and matches it, one
thread each. Compared are seconds of processor time and the most memory that was held (VmHWM) of
each stage, and bytes and pairs. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

PART = 50_000


def write_set(out: Path, items: int, width: int) -> None:
    """An embedding set, a part at a time: a thousandth of the items is val, with labels."""
    from dist_train.embedding.store import part_path
    from dist_train.stage import EMBEDDING
    from shards import stage_files
    from shards.files import write_parquet

    stage_files.begin(out, EMBEDDING, {"by": "hand"}, {})
    files, group = [out / "items.parquet"], np.random.default_rng(0).permutation(items) // 4
    for number, start in enumerate(range(0, items, PART)):
        some = group[start : start + PART]
        rows = np.stack([np.random.default_rng(g).standard_normal(width, np.float32) for g in some])
        rng = np.random.default_rng([1, number])
        rows += np.float32(0.55) * rng.standard_normal(rows.shape, np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        files.append(part_path(out, "image", number))
        np.save(files[-1], rows.astype(np.float16))
    val = group < max(2, items // 4000)
    write_parquet(files[0], pd.DataFrame({
        "row": np.arange(items), "posting_id": [f"p{n:09d}" for n in range(items)],
        "label_group": np.where(val, np.char.add("g", group.astype(str)), ""),
        "split": np.where(val, "val", "unlabelled"), "title": "a title of some usual length, red",
        "has_image": True, "has_text": False, "status": "embedded", "sha256": "f" * 64,
        "phash": "0" * 16, "photo_group": -1,
    }))  # fmt: skip
    stage_files.finish(out, {"items": items, "postings": items}, files)


def planned(args: argparse.Namespace, items: int) -> dict[str, float]:
    """What the planner says."""
    from dist_train.matching.cost import plan

    found = plan(items, args.width, "float16", 1, "cpu", index=options(args)[0],
                 match=options(args)[1])  # fmt: skip
    stages = {name: vars(getattr(found, name)) for name in ("index", "join")}
    return {"tiles": found.tiles, "pairs": found.pairs, "text": str(found)} | stages


def happened(stage: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One stage, really."""
    from dist_train.matching.build_pairs import build_pairs
    from dist_train.matching.index import build_index
    from dist_train.runtime import Runtime, peak_bytes

    index, matching = options(args)
    Runtime("cpu")  # the program's start is not planned
    wall, cpu = time.perf_counter(), time.process_time()
    if stage == "index":
        build_index(folder / "emb", folder / "index", index)
        out = folder / "index"
    else:
        build_pairs(folder / "emb", folder / "index", folder / "pairs", matching)
        out = folder / "pairs"
    spent = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - cpu}
    manifest = json.loads((out / "manifest.json").read_text())
    return spent | {
        "memory_bytes": peak_bytes(),
        "disk_bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "pairs": manifest["counts"].get("pairs", 0),
    }


def options(args: argparse.Namespace):
    """The options of both stages."""
    from dist_train.config import IndexConfig, JoinConfig

    return IndexConfig(memory=args.memory), JoinConfig(
        memory=args.memory, neighbours=args.neighbours, pairs_per_item=args.pairs_per_item,
        device="cpu",
    )  # fmt: skip


def child(args: argparse.Namespace, task: str, items: int, folder: Path) -> dict:
    """A task in a process of its own."""
    words = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.planning", "--task", task,
             "--items", str(items), "--width", str(args.width), "--memory", args.memory,
             "--neighbours", str(args.neighbours), "--pairs-per-item", str(args.pairs_per_item),
             "--folder", str(folder)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def do(args: argparse.Namespace) -> dict:
    """The task of a child."""
    import torch

    torch.set_num_threads(1)
    if args.task == "set":
        write_set(args.folder / "emb", args.items[0], args.width)
        return {}
    if args.task == "plan":
        return planned(args, args.items[0])
    return happened(args.task, args, args.folder)


def compare(args: argparse.Namespace, items: int) -> list[dict]:
    """Predicted over measured, of both stages of one set."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, rows = Path(name), []
        child(args, "set", items, folder)
        said = child(args, "plan", items, folder)
        print(said["text"], flush=True)
        for stage in ("index", "join"):
            real = child(args, stage, items, folder)
            for what in ("processor_seconds", "memory_bytes", "disk_bytes"):
                row = {"items": items, "stage": stage, "what": what, "planned": said[stage][what],
                       "measured": real[what], "ratio": said[stage][what] / real[what]}  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
        rows.append({"items": items, "stage": "join", "what": "pairs", "planned": said["pairs"],
                     "measured": real["pairs"],
                     "ratio": said["pairs"] / real["pairs"]})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Every N, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, nargs="+", default=[20_000, 60_000, 180_000, 500_000])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--neighbours", type=int, default=5)
    parser.add_argument("--pairs-per-item", type=float, default=20.0)
    parser.add_argument("--task", choices=["set", "plan", "index", "join"])
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(do(args)))
        return
    rows = [row for items in args.items for row in compare(args, items)]
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
