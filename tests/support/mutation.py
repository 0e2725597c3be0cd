"""Do the tests notice? Small changes of what the code means, one at a time, against its tests.

    python -m tests.support.mutation FOLDER [--area heads] [--count 34] [--seed 0] [--wider]

FOLDER gets a copy of the checkout, which alone is changed, and results.jsonl; the same command goes
on where it stopped. A mutant is tried on the unit tests that run its line, then on all of its area;
with --wider a survivor is tried on the wider ones too. A kill counts when the test passes without.
"""

import ast
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import cyclopts
import pandas as pd
import pytest

AREAS, SWAPS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).values()
NEVER_CHANGED = ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr
LIBRARIES = "torch timm transformers accelerate faiss pyarrow.parquet sklearn lightgbm hypothesis"
"""Imported once: the tests of a mutant run in a fork, which need not wait for them."""
Change = tuple[str, int, int, str]
"""Kind, beginning, end, replacement."""


def script_changes(text: str) -> Iterator[Change]:
    for word in re.finditer(r"-eq|-lt|&&|\|\||-[nz]\b|[=!]=|USR1|afterok", text):
        yield "operator", *word.span(), SWAPS[word[0]]
    for line in re.finditer(r"^ *(#SBATCH|[a-z])(?!.*(\bdo|then|[({]|\bin)$).*$", text, re.M):
        yield "dropped", *line.span(), ":"


def python_changes(text: str) -> Iterator[Change]:
    """Operators, numbers, words, arguments, bounds, conditions, statements; nothing people read."""
    begins = [0, *(found.end() for found in re.finditer("\n", text))]

    def span(node: Any) -> tuple[int, int]:
        ends = (node.lineno - 1, node.col_offset), (node.end_lineno - 1, node.end_col_offset)
        return tuple(begins[n] + len(text[begins[n] :].encode()[:c].decode()) for n, c in ends)

    def changes(node: ast.AST) -> Iterator[Change]:
        match node:
            case (
                ast.Compare(left=a, comparators=[b]) | ast.BinOp(left=a, right=b)
                | ast.BoolOp(values=[a, b, *_]) | ast.AugAssign(target=a, value=b)
            ):  # fmt: skip
                for word in re.finditer(r"[<>=!+*/%&|-]+|is not|not in|\w+", text[: span(b)[0]]):
                    if word.start() >= span(a)[1] and word[0] in SWAPS:
                        yield "operator", *word.span(), SWAPS[word[0]]
            case ast.Constant(value=bool() | str() as value) if repr(value) in SWAPS:
                yield "word", *span(node), SWAPS[repr(value)]
            case ast.Constant(value=int() | float() as value):
                yield "number", *span(node), f"({value} + 1)"
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield "word", span(node)[1] - len(name), span(node)[1], SWAPS.get(name, name)
            case ast.Call(args=[a, b, *_]):
                (first, end), (other, last) = span(a), span(b)
                yield "arguments", first, last, text[other:last] + text[end:other] + text[first:end]
            case ast.Slice(lower=ast.AST() as bound) | ast.Slice(upper=ast.AST() as bound):
                yield "bound", span(bound)[0], span(bound)[0], "1 + "
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield "condition", *span(test), f"(not ({text[slice(*span(test))]}))"
            case ast.Expr(value=ast.Call()) | ast.Delete() | ast.Assign(targets=[ast.Attribute()]):
                yield "dropped", *span(node), "pass"

    def visit(node: ast.AST) -> Iterator[Change]:
        yield from changes(node)
        for child in ast.iter_child_nodes(node):
            is_message = isinstance(child, ast.Expr) and text[span(child)[0] :].startswith(
                ("log.", "pri")
            )
            if not is_message and not isinstance(child, NEVER_CHANGED):
                yield from visit(child)

    tree = ast.parse(text)
    for node in ast.walk(tree):
        for name in {"annotation", "returns", "decorator_list"}.intersection(node._fields):
            delattr(node, name)
    yield from (one for one in visit(tree) if text[one[1] : one[2]] != one[3])


def draw_mutants(area: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` mutants, as many of each kind."""
    every, kinds = [], Counter()
    for file in map(Path, files(AREAS[area][0])):
        text = file.read_text()
        for kind, start, end, after in (python_changes if file.suffix == ".py" else script_changes)(
            text
        ):
            line = text.count("\n", 0, start) + 1
            every.append({"area": area, "file": str(file), "line": line, "kind": kind,
                          "start": start, "before": text[start:end], "after": after})  # fmt: skip
    random.Random(f"{seed} {area}").shuffle(every)
    for one in every:
        one["rank"] = kinds[one["kind"]] = kinds[one["kind"]] + 1
    return sorted(every, key=lambda one: one["rank"])[:count]


def files(patterns: str, below: str = ".") -> list[str]:
    found = {one: [str(path) for path in Path(below).glob(one)] for one in patterns.split()}
    unmatched = [one for one, paths in found.items() if not paths]
    assert not unmatched, f"mutation.toml: nothing in {below} matches {unmatched}"
    return sorted({path for paths in found.values() for path in paths})


def run_tests(tests: list[str], seconds: int = 900, record: Path | None = None) -> tuple[str, str]:
    """survived, killed, timeout or error, and the test that failed.

    record: the file for which test ran which line.
    """
    output = Path("../output")
    if not (child := os.fork()):
        os.setpgrp()
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC * (stream == 1)), stream)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # those of the mutated tree are imported
        sys.path.insert(0, str(Path.cwd()))
        recorder = coverage.Coverage(record, include=["dist_train/*", "shards/*"])
        recorder.set_option("run:dynamic_context", "test_function")
        if record:
            recorder.start()
        limits = [f"--timeout={seconds // 5}", "--timeout-method=thread"]
        code = pytest.main(["-qx", "-m", "not full", *limits, *tests])
        if record:
            recorder.stop()
            recorder.save()
        sys.stdout.flush()
        os._exit(code)
    end = time.monotonic() + seconds
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", ""
    failed = re.search(
        r"^(?:FAILED|ERROR) ([\w/.]+(?:::\w+)?)", output.read_text(errors="replace"), re.M
    )
    ends = {0: "survived", 1: "killed", 2: "killed"}
    return ends.get(os.waitstatus_to_exitcode(done[1]), "error"), failed[1] if failed else ""


def tests_of(mutant: dict[str, Any], record: Path) -> list[str]:
    """The unit tests that run its line; all of the area where it lies in no function."""
    unit = files(AREAS[mutant["area"]][1], "tests")
    if not record.exists():
        run_tests(unit, 6000, record)
    data = coverage.CoverageData(str(record))
    data.read()
    contexts = data.contexts_by_lineno(str(Path(mutant["file"]).absolute()))
    names = [one.rpartition(".") for one in contexts.get(mutant["line"], ()) if one]
    if not all(module.startswith("tests.") for module, _, _ in names):
        return unit  # Hypothesis calls it in the name of no test
    return sorted({f"{module.replace('.', '/')}.py::{test}" for module, _, test in names}) or unit


def main(folder: Path, *, area: tuple[str, ...] = tuple(AREAS), count: int = 34, seed: int = 0,
         wider: bool = False) -> None:  # fmt: skip
    """Try `count` mutants of each area."""
    results, tree = folder.absolute() / "results.jsonl", folder.absolute() / "tree"
    copying = f"mkdir -p {tree} && git ls-files -z | xargs -0 cp -pt {tree} --parents"
    subprocess.run(f"{copying} && ln -sfn $(realpath .venv) {tree}/.venv", shell=True, check=True)
    os.chdir(tree)
    os.environ["PYTHONPATH"], os.environ["PYTHONDONTWRITEBYTECODE"] = str(tree), "1"
    sys.dont_write_bytecode = True
    for library in LIBRARIES.split():
        importlib.import_module(library)
    results.touch()
    known = {(r["file"], r["start"], r["after"]): r for r in map(json.loads, results.open())}
    passing: set[str] = set()
    for one in [one for name in area for one in draw_mutants(name, count, seed)]:
        key, area_tests = (one["file"], one["start"], one["after"]), AREAS[one["area"]][1:]
        last = known.get(key)
        if last and (last["outcome"] != "survived" or last["wider"] or not wider):
            continue
        all_tests = [test for patterns in area_tests for test in files(patterns, "tests")]
        tests = all_tests if wider else tests_of(one, results.with_name(one["area"]))
        file, original = Path(one["file"]), Path(one["file"]).read_text()
        rest = original[one["start"] :].removeprefix(one["before"])
        file.write_text(original[: one["start"]] + one["after"] + rest)
        outcome, by = run_tests(tests, 6000 if wider else 900)
        if outcome == "survived" and not wider:  # its line may run in a fixture that tests share
            outcome, by = run_tests(files(area_tests[0], "tests"))
        file.write_text(original)
        if by and by not in passing and run_tests([by])[0] != "survived":
            outcome = "unsound"  # the test fails without the mutant too
        passing |= {by} if outcome == "killed" else set()
        known[key] = one | {"outcome": outcome, "by": by, "wider": wider}
        results.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
    table = pd.DataFrame(known.values())
    print(pd.crosstab(table.area, table.outcome, margins=True))


if __name__ == "__main__":
    cyclopts.run(main)
