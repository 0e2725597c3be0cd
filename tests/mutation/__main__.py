"""Do the tests notice? Mutants of the code, one at a time, against the tests that run their lines.

    python -m tests.mutation FOLDER [--area heads] [--count 300] [--narrow-only] [--retry-survivors]

FOLDER gets results.jsonl, a row a trial (started again, it goes on), and which tests run which
line, recorded when first asked for. A kill counts only if its test passes without the mutant.
"""

import ast
import contextlib
import importlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
import tomllib
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import coverage
import cyclopts
import pandas as pd
import psutil
import pytest

from tests.mutation.mutants import Mutant, mutants_of

AREAS = tomllib.loads(Path(__file__).with_name("areas.toml").read_text())
LIBRARIES = "torch torchvision pyarrow.parquet timm transformers accelerate scipy sklearn"
COVERAGE = "[run]\nsource = dist_train, shards\ndata_file = {0}/lines\nparallel = true\n"
COVERAGE += "dynamic_context = test_function\ncontext = ${{PYTEST_CURRENT_TEST-}}\nsigterm = true\n"
COPY = (
    "rm -rf {0}; mkdir -p {0}; git ls-files -coz --exclude-standard | xargs -0 cp -pt {0} --parents"
)
COPY += "; ln -s $(realpath .venv) {0}; python -m compileall -q {0}"


def main(folder: Path, *, area: tuple[str, ...] = tuple(AREAS), count: int = 300, seed: int = 0,
         jobs: int = 1, budget: float = 300, narrow_only: bool = False,
         retry_survivors: bool = False, worker: int | None = None) -> None:  # fmt: skip
    """Try `count` mutants, as many of each area, on tests of at most `budget` seconds a tier."""
    results, workers = folder.absolute() / "results.jsonl", []
    if worker is None:
        for number in range(jobs):  # each in a copy of the checkout
            tree = f"{folder.absolute()}/tree-{number}"
            subprocess.run(COPY.format(tree), shell=True, check=True)
            words = [sys.executable, "-m", "tests.mutation", folder.absolute(), *sys.argv[2:]]
            env = os.environ | {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1"}
            workers.append(subprocess.Popen([*words, f"--worker={number}"], cwd=tree, env=env))
        codes = [one.wait() for one in workers]
        rows = pd.DataFrame(last_rows(results).values())
        print(pd.crosstab(rows.area, rows.outcome, margins=True))
        sys.exit(max(codes))
    for library in LIBRARIES.split():
        importlib.import_module(library)
    known, trusted = last_rows(results), set()
    if retry_survivors:
        chosen = [
            row for row in known.values() if row["outcome"] == "survived" and row["area"] in area
        ]
        known = {}
    else:
        chosen = [one for name in area for one in drawn(name, seed, count // len(area))]
    for tier in ("narrow", "wider")[: 1 if narrow_only else 2]:
        for mutant in sorted(chosen, key=lambda one: one["rank"])[worker::jobs]:
            last = known.get(key(mutant), {"outcome": "survived", "tier": ""})
            if last["outcome"] == "survived" and last["tier"] not in (tier, "wider"):
                files = {file for glob in AREAS[mutant["area"]][tier] for file in Path().glob(glob)}
                tests = tests_of(mutant, sorted(files), folder, budget)
                known[key(mutant)] = row = mutant | {"tier": tier} | tried(mutant, tests, trusted)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def key(row: Mutant) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("file", "text", "column", "before", "after"))


def last_rows(results: Path) -> dict[tuple[Any, ...], Mutant]:
    """The newest row of each mutant."""
    rows = results.read_text().splitlines() if results.exists() else ()
    return {key(row): row for row in map(json.loads, rows)}


def drawn(area: str, seed: int, count: int) -> list[Mutant]:
    """`count` mutants of an area, as many of each kind; those that are no Python are passed over."""
    files = sorted({file for glob in AREAS[area]["code"] for file in Path().glob(glob)})
    every = [one for file in files for one in mutants_of(file)]
    random.Random(f"{seed} {area}").shuffle(every)
    kinds: Counter[str] = Counter()
    for one in every:
        kinds[one["kind"]] += 1
        one |= {"area": area, "rank": kinds[one["kind"]]}
    every.sort(key=lambda one: one["rank"])
    return list(itertools.islice(filter(mutated, every), count))


def mutated(mutant: Mutant) -> str | None:
    """The text of its file with the mutant; None when that is gone, or is no Python."""
    text = Path(mutant["file"]).read_text()
    places = [found.start() for found in re.finditer(re.escape(mutant["text"]), text)]
    if not places:
        return None
    at = (
        min(places, key=lambda at: abs(text.count("\n", 0, at) + 1 - mutant["line"]))
        + mutant["column"]
    )
    text = text[:at] + mutant["after"] + text[at + len(mutant["before"]) :]
    with contextlib.suppress(SyntaxError):
        return text if mutant["kind"] == "script" or ast.parse(text) else None
    return None


def tests_of(mutant: Mutant, files: list[Path], folder: Path, budget: float) -> dict[str, float]:
    """Those that run the mutant's lines, with their seconds: quick files and quick tests first."""
    chosen, tests, total = [], {}, 0.0
    for file in files:
        seconds, by_line = recorded(file, folder)
        hit = {
            t for line in mutant["statement"] for t in by_line.get(f"{mutant['file']}|{line}", ())
        }
        if not mutant["statement"]:  # it is in no function, so whatever uses its file
            hit = {t for line, of in by_line.items() if line.startswith(mutant["file"]) for t in of}
        if mutant["kind"] == "script":
            hit = {""}
        names = [t for t in seconds if seconds[t] < 1e9 and (t in hit or "" in hit)]
        chosen.append(sorted((seconds[t], f"{file}::{t}") for t in names))
    for own in sorted(chosen, key=lambda own: sum(s for s, _ in own)):
        for seconds, test in own:
            total += seconds
            if total < budget or not tests:
                tests[test] = seconds
    return tests


def recorded(file: Path, folder: Path) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Seconds by test of a file, and which of them run a line of the code ("" where all may)."""
    kept = folder / f"{file.stem}-{zlib.crc32(file.read_bytes()):x}.json"
    if not kept.exists():
        subprocess.run("rm -rf recorded; mkdir recorded", shell=True, check=True)
        work = Path("recorded").absolute()
        (work / "rc").write_text(COVERAGE.format(work))
        words = f"-m pytest -q -m 'not full' --junitxml={work}/xml {file} >{work}/log"
        env = os.environ | {"COVERAGE_PROCESS_START": f"{work}/rc"}
        subprocess.run(f"{sys.executable} {words}", shell=True, env=env)
        seconds: Counter[str] = Counter()
        for case in ElementTree.parse(work / "xml").iter("testcase"):
            bad = {"failure", "error"} & {part.tag for part in case}
            name = case.attrib["name"].partition("[")[0]
            seconds[name] += 1e9 if bad else float(case.attrib["time"])
        cover = coverage.Coverage(config_file=f"{work}/rc")
        cover.combine()
        lines = defaultdict(set)
        for path in cover.get_data().measured_files():
            text, name = Path(path).read_text().splitlines(), Path(path).relative_to(Path.cwd())
            for number, contexts in cover.get_data().contexts_by_lineno(path).items():
                for (
                    context
                ) in contexts:  # MODULE.TEST; of a process, FILE::TEST[PARAMETERS] (PHASE)
                    test = re.sub(r"(\[.*)? \(call\).*", "", context).split("::")[-1].split(".")[-1]
                    lines[f"{name}|{text[number - 1].strip()}"].add(test if test in seconds else "")
        kept.write_text(json.dumps([seconds, {line: sorted(lines[line]) for line in lines}]))
    return tuple(json.loads(kept.read_text()))


def tried(mutant: Mutant, tests: dict[str, float], trusted: set[str]) -> dict[str, Any]:
    """What `tests` make of a mutant; one that fails without it as well is passed over."""
    file, text, began = Path(mutant["file"]), mutated(mutant), time.monotonic()
    whole, times, outcome, killer = file.read_bytes(), file.stat(), "survived", None
    while tests and text and outcome == "survived":
        file.write_text(text)
        try:
            result, killer = run(tests)
        finally:
            file.write_bytes(whole)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if result == "survived":
            break
        if (
            killer in tests
            and killer not in trusted
            and run({killer: tests[killer]})[0] == "killed"
        ):
            tests = {name: tests[name] for name in tests if name != killer}
        else:
            outcome = result
            trusted.add(killer)
    seconds = round(time.monotonic() - began, 1)
    return {
        "outcome": outcome if text else "gone",
        "by": killer,
        "seconds": seconds,
        "tests": len(tests),
    }


def run(tests: dict[str, float]) -> tuple[str, str | None]:
    """survived, killed (by which test) or timeout, in a fork: it has the libraries, not our code."""
    os.environ["MUTATION_RUN"] = mark = f"{os.getpid()}-{time.monotonic_ns()}"
    end, code = time.monotonic() + 60 + 3 * sum(tests.values()), None
    if (child := os.fork()) == 0:
        os.setsid()
        log = os.open("pytest.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        words = ["-qx", "--tb=short", "-m", "not full", "-p", "no:cacheprovider"]
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
    return "survived" if code in (0, 5) else "killed", found and found[1]


if __name__ == "__main__":
    cyclopts.run(main)
