"""The plan beside what then happens: python -m benchmarks.planning --items 2000

A generated catalogue is planned by `dist-train plan`, then every stage is run as a command of its
own, and planned over measured is printed: seconds by the clock, and the memory of the stage's
first process. The marks are a factor of 1.5 for the seconds and 15 % for the memory. On a machine
that does other work too the seconds to compare with are those of the processors, beside them: with
--workers 0 a stage is one process. The last line is JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import yaml

from dist_train.config.options import Config, EmbedConfig, JoinConfig
from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.stage_graph import Stage, stage_graph
from dist_train.synthetic.catalogue import generate
from shards.photos.options import PackOptions

NAMES = {"image": "train image", "text": "train text"}
CHILD = """
import atexit, runpy
atexit.register(lambda: print(open("/proc/self/status").read()))
runpy.run_module("dist_train", run_name="__main__", alter_sys=True)
"""
MODELS = "$DIST_TRAIN_WEIGHTS"


def config_of(args: argparse.Namespace, folder: Path) -> Config:
    """Small encoders over a generated catalogue, with as many workers as memory allows."""
    generate(folder / "catalogue", args.items, workers=2)
    common = {"epochs": args.epochs, "batch_size": args.batch_size, "workers": args.workers}
    head = HeadOptions(margin=0.3)
    image = ImageEncoderOptions(model=f"{MODELS}/mobilenetv2_100", image_size=args.image_size)
    text = TextEncoderOptions(model=f"{MODELS}/all-minilm-l6-v2", max_length=32)
    return Config(
        catalogue=folder / "catalogue" / "catalogue.csv", images=folder / "catalogue" / "images",
        out=folder / "out", pack=PackOptions(size=192, workers=args.workers or 1),
        image=ImageTraining(encoder=image, head=head, **common),
        text=TextTraining(encoder=text, head=head, **common),
        embed=EmbedConfig(workers=args.workers),
        join=JoinConfig(pairs_per_item=args.pairs_per_item),
    )  # fmt: skip


def run(words: list[str], out: Path) -> dict[str, float]:
    """Run a verb into `out`: seconds by the clock, of processors, bytes of the largest process."""
    begin = time.perf_counter()
    with out.open("w") as file:
        streams = [(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number in (1, 2)]
        words = [sys.executable, "-W", "ignore", "-c", CHILD, *words]
        child = os.posix_spawn(sys.executable, words, os.environ, file_actions=streams)
        _, status, used = os.wait4(child, 0)
    if status:
        sys.exit(f"{' '.join(words)} ended with {status}:\n{out.read_text()[-2000:]}")
    seconds, text = time.perf_counter() - begin, out.read_text()
    # Not used.ru_maxrss: it may be that of this process, which started it.
    peak = int(text[text.rindex("VmHWM:") :].split()[1])
    return {
        "seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime,
        "memory_bytes": 1024 * peak,
    }  # fmt: skip


def run_stage(step: Stage, folder: Path) -> dict[str, float]:
    """Run one stage with its options."""
    options = folder / f"{step.name}.yaml"
    options.write_text(step.options_text())
    words = [str(word) for word in step.arguments]
    words = words[: words.index("--task")] if "--task" in words else words
    return run([*words, "--config", str(options)], folder / f"{step.name}.log")


def main() -> None:
    """Plan, then run, then compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pairs-per-item", type=float, default=100.0)
    parser.add_argument("--folder", type=Path, help="where it is done, and kept")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="planning-"))
    config = config_of(args, folder)
    given = json.dumps(asdict(config), default=str)
    given = json.loads(
        given, object_hook=lambda one: {k: v for k, v in one.items() if v is not None}
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    took = run(["plan", str(folder / "config.yaml"), "--json"], folder / "plan.log")
    text = (folder / "plan.log").read_text()
    planned, _ = json.JSONDecoder().raw_decode(text[text.index('{\n "device"') :])
    print(f"plan took {took['seconds']:.1f} s, of which processors {took['processor_seconds']:.1f}")
    steps = {
        NAMES.get(step.name, step.section): step for step in stage_graph(config) if step.options
    }
    stages = {one["stage"]: one for one in planned["stages"]}
    rows = []
    for name, step in steps.items():
        real, estimate = run_stage(step, folder), stages[name]
        rows.append({"stage": name} | {
            f"planned_{key}": estimate[key] for key in ("seconds", "memory_bytes")
        } | real)  # fmt: skip
        seconds, memory = estimate["seconds"], estimate["memory_bytes"]
        print(
            f"{name:12} planned {seconds:.1f} s and {memory / 1e9:.3f} GB; over measured: "
            f"{seconds / real['seconds']:.2f} of the clock's {real['seconds']:.1f} s, "
            f"{seconds / real['processor_seconds']:.2f} of the processors' "
            f"{real['processor_seconds']:.1f} s, {memory / real['memory_bytes']:.2f} of "
            f"{real['memory_bytes'] / 1e9:.3f} GB", flush=True,
        )  # fmt: skip
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
