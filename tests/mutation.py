"""Do the tests notice? Mutants of the code, one at a time, against the tests that run their lines.

    python -m tests.mutation FOLDER [--area heads] [--count 300] [--narrow-only] [--retry-survivors]

FOLDER gets results.jsonl, a row a trial (started again, it goes on), and which tests run which
line, recorded when first asked for. A kill counts only if its test passes without the mutant.
"""

import ast
import contextlib
import importlib
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import cyclopts
import pandas as pd
import psutil
import pytest

from tests.mutants import mutants_of

# Code, tests that come first, wider ones. Left out is code that is about to go.
AREAS = {
    "heads": (
        "dist_train/heads/*.py", "unit/test_head*",
        "unit/test_training* distributed/test_[ch][le]* distributed/test_training.py"),
    "training": (
        "dist_train/training/*.py", "unit/test_training*",
        "distributed/test_training* distributed/test_[ce]* distributed/test_st* end_to_end/test_g*"
        " faults/test_training* faults/test_stops* faults/test_two*"),
    "order": (
        "shards/order.py shards/product_order.py",
        "unit/test_shards*order.py unit/test_training_d*",
        "distributed/test_s[cm]* faults/test_order*"),
    "decisions": (
        "dist_train/decisions/*.py", "unit/test_decisions*",
        "unit/test_report* distributed/test_matches* end_to_end/test_[gr]*"),
    "evaluation": (
        "dist_train/evaluation/*.py", "unit/test_evaluation*",
        "unit/test_decisions* unit/test_training_v* unit/test_report* end_to_end/test_[gr]*"),
    "embedding": (
        "dist_train/embedding/*.py", "unit/test_embedding*",
        "unit/test_cli_s* unit/test_matching_h* faults/test_unreadable* faults/test_stops*"
        " distributed/test_matches* end_to_end/test_[gir]*"),
    "matching": (
        "dist_train/matching/[!cst]*.py dist_train/matching/sampling.py", "unit/test_matching*",
        "unit/test_decisions_m* distributed/test_[ijm]* faults/test_index* end_to_end/test_g*"),
    "stage files": (
        "shards/stage_files.py shards/lock.py shards/files.py dist_train/stage.py",
        "unit/test_stage* unit/test_shards_files* unit/test_runtime* unit/test_cli_s*",
        "unit/test_shards_[prv]* unit/test_embedding* unit/test_training_l* faults/test_pack*"
        " faults/test_two* faults/test_stops*"),
    "slurm": (
        "launch/slurm/* dist_train/operations/s[lut]*.py",
        "unit/test_operations_s* unit/test_launch*", "slurm/test_*"),
}  # fmt: skip
LIBRARIES = "torch torchvision pyarrow.parquet timm transformers accelerate scipy sklearn"
COVERAGE = """[run]
source = dist_train, shards
parallel = true
sigterm = true
dynamic_context = test_function
context = ${PYTEST_CURRENT_TEST-}
[json]
show_contexts = true"""
RECORD = """rm -f .coverage* lines.json
export COVERAGE_RCFILE=$PWD/.lines COVERAGE_FILE=$PWD/.coverage
COVERAGE_PROCESS_START=$PWD/.lines python -m pytest -q -m 'not full' {} >pytest.log 2>&1
python -m coverage combine -q && python -m coverage json -qo lines.json"""
COPY = """rm -rf {0}; mkdir -p {0}; ln -s $(realpath .venv) {0}
git ls-files -coz --exclude-standard | xargs -0 cp -pt {0} --parents; python -m compileall -q {0}"""


def main(folder: Path, *, area: tuple[str, ...] = tuple(AREAS), count: int = 300, seed: int = 0,
         jobs: int = 1, narrow_only: bool = False, retry_survivors: bool = False,
         worker: int | None = None) -> None:  # fmt: skip
    """Try `count` mutants, as many of each area."""
    folder, results = folder.absolute(), folder.absolute() / "results.jsonl"
    if worker is None:
        sys.exit(start_workers(folder, jobs) or print(table(last_rows(results))))
    for library in LIBRARIES.split():
        importlib.import_module(library)
    last, trusted = last_rows(results), set()
    if retry_survivors:
        chosen = [m for m in last.values() if m["outcome"] == "survived" and m["area"] in area]
        last = {}
    else:
        chosen = [one for name in area for one in drawn(name, seed, count // len(area))]
    for tier in (1,) if narrow_only else (1, 2):
        for mutant in sorted(chosen, key=lambda one: one["rank"])[worker::jobs]:
            row = last.get(key(mutant), {"outcome": "survived", "tier": 0})
            if row["outcome"] == "survived" and row["tier"] < tier:
                last[key(mutant)] = row = mutant | tried(mutant, tier, folder, trusted)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def start_workers(folder: Path, jobs: int) -> bool:
    """This command again, each in a copy of the checkout; whether one failed."""
    started = []
    for number in range(jobs):
        tree = f"{folder}/tree-{number}"
        subprocess.run(COPY.format(tree), shell=True, check=True)
        words = ["-m", "tests.mutation", str(folder), *sys.argv[2:], f"--worker={number}"]
        env = os.environ | {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1"}
        started.append(subprocess.Popen([sys.executable, *words], cwd=tree, env=env))
    return any([one.wait() for one in started])


def table(rows: dict[Any, dict[str, Any]]) -> pd.DataFrame:
    told = pd.DataFrame(rows.values())
    killed = told.outcome + told.tier.map({1: " by narrow", 2: " by wider"})
    outcome = told.outcome.where(told.outcome == "survived", killed)
    return pd.crosstab(told.area, outcome, margins=True)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("file", "text", "column", "before", "after"))


def last_rows(results: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The newest row of each mutant."""
    rows = results.read_text().splitlines() if results.exists() else ()
    return {key(row): row for row in map(json.loads, rows)}


def drawn(area: str, seed: int, count: int) -> list[dict[str, Any]]:
    """`count` mutants of an area, as many of each kind."""
    files = sorted({file for name in AREAS[area][0].split() for file in Path().glob(name)})
    every, kinds = [one for file in files for one in mutants_of(file)], Counter()
    random.Random(f"{seed} {area}").shuffle(every)
    for one in every:
        kinds[one["kind"]] += 1
        one |= {"area": area, "rank": kinds[one["kind"]]}
    return list(islice(filter(mutated, sorted(every, key=lambda one: one["rank"])), count))


def mutated(mutant: dict[str, Any]) -> str | None:
    """The text of its file with the mutant; None when that is gone, or is no Python."""
    text, line = Path(mutant["file"]).read_text(), re.escape(mutant["text"])
    places = [found.start() for found in re.finditer(line, text)]
    far = [abs(text.count("\n", 0, at) + 1 - mutant["line"]) for at in places]
    with contextlib.suppress(ValueError, SyntaxError):
        at = places[far.index(min(far))] + mutant["column"]
        text = text[:at] + mutant["after"] + text[at + len(mutant["before"]) :]
        return text if mutant["kind"] == "script" or ast.parse(text) else None
    return None


def tried(mutant: dict[str, Any], tier: int, folder: Path, trusted: set[str]) -> dict[str, Any]:
    """What a tier of tests makes of it; a test that fails without it as well is left out."""
    file, text, began = Path(mutant["file"]), mutated(mutant), time.monotonic()
    tests, limit = tests_of(mutant, tier, folder)
    whole, times, outcome, killer = file.read_text(), file.stat(), "survived", None
    while tests and text:
        file.write_text(text)
        try:
            outcome, killer = run(tests, limit)
        finally:
            file.write_text(whole)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if killer is None or killer in trusted or run([killer], limit)[0] == "survived":
            trusted.add(killer)
            break
        tests.append(f"--deselect={killer}")
    outcome, seconds = outcome if text else "gone", round(time.monotonic() - began)
    return {"tier": tier, "outcome": outcome, "by": killer, "seconds": seconds, "tests": tests[:9]}


def tests_of(mutant: dict[str, Any], tier: int, folder: Path) -> tuple[list[str], float]:
    """Those that run the line, of quick files first, and the seconds that they may take."""
    chosen = []
    for file in {
        f for name in AREAS[mutant["area"]][tier].split() for f in Path("tests").glob(name)
    }:
        seconds, by_line = recorded(file, folder)
        users = {t for line, of in by_line.items() if line.startswith(mutant["file"]) for t in of}
        names = by_line.get(f"{mutant['file']}|{mutant['text'].strip()}", sorted(users))
        if "" in names or mutant["kind"] == "script":
            chosen.append((seconds, [str(file)]))
        elif names:
            chosen.append((seconds, [f"{file}::{name}" for name in names]))
    tests = [test for _, names in sorted(chosen) for test in names]
    return tests, 60 + 3 * sum(seconds for seconds, _ in chosen)


def recorded(file: Path, folder: Path) -> tuple[float, dict[str, list[str]]]:
    """Seconds of a test file; by line of the code which of its tests run it ("": any may)."""
    kept = folder / f"{file.stem}-{zlib.crc32(file.read_bytes()):x}.json"
    if not kept.exists():
        Path(".lines").write_text(COVERAGE)
        began, tests = time.monotonic(), set(re.findall(r"def (test_\w+)", file.read_text()))
        done = subprocess.run(RECORD.format(file), shell=True, start_new_session=True)
        files = json.loads(Path("lines.json").read_text())["files"] if not done.returncode else {}
        lines: dict[str, set[str]] = {}
        for path, told in ((path, told) for path, told in files.items() if told["executed_lines"]):
            text = Path(path).read_text().splitlines()
            missed = {str(number): [] for number in told["missing_lines"]}
            for number, contexts in (missed | told["contexts"]).items():
                # MODULE.TEST; of what a test started, FILE::TEST[PARAMETERS] (call).
                names = {re.sub(r"\[.*|\s.*|.*[:.]", "", one.strip("|")) for one in contexts}
                names = {name if name in tests else "" for name in names}
                lines.setdefault(f"{path}|{text[int(number) - 1].strip()}", set()).update(names)
        told = {line: sorted(names) for line, names in lines.items()}
        kept.write_text(json.dumps([time.monotonic() - began, told]))
    return tuple(json.loads(kept.read_text()))


def run(tests: list[str], limit: float) -> tuple[str, str | None]:
    """survived, killed and by which test, or timeout; in a fork that has the libraries."""
    os.environ["MUTATION_RUN"] = mark = f"{os.getpid()}-{time.monotonic_ns()}"
    end, code = time.monotonic() + limit, None
    if (child := os.fork()) == 0:
        os.setsid()
        os.dup2(os.open("pytest.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
        os.dup2(1, 2)
        words = ["-qx", "--tb=short", "-m", "not full", "-p", "no:cacheprovider", "--timeout=120"]
        os._exit(pytest.main([*words, *tests]))
    while code is None and time.monotonic() < end:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
    for process in psutil.process_iter():  # and what it has started, in whatever session
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("MUTATION_RUN") == mark or os.getsid(process.pid) == child:
                process.kill()
    if code is None:
        os.waitpid(child, 0)
        return "timeout", None
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::\w+)", Path("pytest.log").read_text(), re.M)
    return ("survived", None) if code in (0, 5) else ("killed", found and found[1])


if __name__ == "__main__":
    cyclopts.run(main)
