"""Verbs killed again and again at random changes of the disk, until a last attempt is let go on.

Started as `-m tests.faults.killed_stages PLAN CHAINS`. PLAN is a JSON file: by the name of a stage
its command, in which `{out}` stands for the folder that it writes, and the folder of which that is
a copy at first, if any. Each attempt is a fork, so that libraries are imported once. The last line
printed lists for each chain the stage, the points of the kills, and what differs from an
undisturbed run: nothing, if all is well.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dist_train.cli import main

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}
TIMED = {"stage.json", "status.json", "manifest.json", "metrics.jsonl"}
"""Files that hold the time, or times; only their names are compared."""
LONGEST = 4
"""Kills of a chain at most."""
CHANGED = multiprocessing.Value("q", 0, lock=False)
"""Changes of the disk by the last attempt."""


class Death:
    """SIGKILL at the `point`-th change of the disk: an fsync, or as a name is made or removed."""

    def __init__(self, point: int) -> None:
        self.left = point
        CHANGED.value = 0
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self._count()
            fsync(descriptor)

        os.fsync = counted

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES:
            self._count()

    def _count(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        CHANGED.value += 1


def attempt(words: list[str], point: int = -1) -> int:
    """Run a verb in a forked process that dies at `point`, if it is not below 0; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        Death(point)
        sys.argv = ["dist-train", *words]
        main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def contents(out: Path) -> dict[str, bytes]:
    """Every file by its path; folders end in a slash. TensorBoard's are one for each attempt.

    The folder's name is left out of what the files hold: it is the title of a report.
    """
    return {
        f"{path.relative_to(out)}{'/' if path.is_dir() else ''}": b""
        if path.is_dir() or path.name in TIMED
        else path.read_bytes().replace(out.name.encode(), b"")
        for path in out.rglob("*")
        if "tensorboard" not in path.relative_to(out).parts
    }


def chain(
    words: list[str], out: Path, changes: int, undisturbed: dict[str, bytes], draw: random.Random
) -> Any:
    """Kill the verb at random points until it gets through; the points, and what differs.

    An undisturbed run makes so many `changes` of the disk.
    """
    command, points = [word.replace("{out}", str(out)) for word in words], []
    for _ in range(draw.randint(2, LONGEST)):
        point = draw.randrange(changes)
        ended = attempt(command, point)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, (command, points, point, ended)
        points.append(point)
    assert attempt(command) == 0, (command, points)
    found = contents(out)
    names = sorted(found.keys() | undisturbed.keys())
    return points, [name for name in names if found.get(name) != undisturbed.get(name)]


def run(plan: Path, chains: int) -> None:
    """Chains of kills for each stage of the plan."""
    outcomes = []
    for stage, (words, begun) in json.loads(plan.read_text()).items():
        outs = [Path(begun or plan).with_name(f"{stage}-{number}") for number in range(chains + 1)]
        for out in outs if begun else []:
            shutil.copytree(begun, out)
        assert attempt([word.replace("{out}", str(outs[0])) for word in words]) == 0
        undisturbed, changes, draw = contents(outs[0]), CHANGED.value, random.Random(stage)
        outcomes += [(stage, *chain(words, out, changes, undisturbed, draw)) for out in outs[1:]]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads would not be in the forks
    for stage in ("training.loop", "embedding.embed", "matching.build_pairs", "decisions.match"):
        import_module(f"dist_train.{stage}")
    for stage in ("decisions.score", "report.html"):
        import_module(f"dist_train.{stage}")
    run(Path(sys.argv[1]), int(sys.argv[2]))
