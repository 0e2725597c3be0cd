"""The mutants of a file: small changes of what it means, made in its text, so the rest stays."""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

TOKENS, SCRIPT = tomllib.loads(Path(__file__).with_name("changes.toml").read_text()).values()
Mutant = dict[str, Any]
Change = tuple[str, int, str, str, list[str]]
"""Kind, place, what stands there, what shall, the lines of its statement (none: in no function)."""


def mutants_of(file: Path) -> list[Mutant]:
    """Each is all that is needed to make it, also when the file's lines have moved."""
    text, found = file.read_text(), []
    for kind, at, before, after, lines in (of_python if file.suffix == ".py" else of_script)(text):
        first = text.rfind("\n", 0, at) + 1
        line = text[first:].partition("\n")[0]
        found.append({"file": str(file), "line": text.count("\n", 0, at) + 1, "kind": kind,
                      "before": before, "after": after, "text": line, "column": at - first,
                      "statement": lines})  # fmt: skip
    return found


def of_script(text: str) -> Iterator[Change]:
    """Line by line."""
    for line in re.finditer(r"^\s*(?!#[^S]|\s).*$", text, re.M):
        for pattern, after in SCRIPT.items():
            for found in re.compile(pattern, re.M).finditer(text, *line.span()):
                yield "script", found.start(), found[0], after, []


def of_python(text: str) -> Iterator[Change]:
    """Tokens, arguments, slices and statements; not what people read, annotations and imports."""
    rows, tree = text.splitlines(keepends=True), ast.parse(text)
    begins, quiet, statement = list(accumulate(map(len, rows), initial=0)), set(), {}
    changes: list[tuple[str, int, str, str]] = []

    def span(node: ast.AST) -> slice:
        first, last = rows[node.lineno - 1].encode(), rows[node.end_lineno - 1].encode()
        start = begins[node.lineno - 1] + len(first[: node.col_offset].decode())
        return slice(start, begins[node.end_lineno - 1] + len(last[: node.end_col_offset].decode()))

    def add(kind: str, node: ast.AST, after: str) -> None:
        changes.append((kind, span(node).start, text[span(node)], after))

    for node in ast.walk(tree):  # outer ones first
        if isinstance(node, ast.stmt):
            head = getattr(node, "body", [node])[0].lineno  # a compound statement ends there
            numbers = range(node.lineno, head if head > node.lineno else node.end_lineno + 1)
            inside = isinstance(statement.get(node.lineno), list)
            of = [rows[n - 1].strip() for n in numbers] if inside else ()
            statement.update(dict.fromkeys(numbers, of))
        match node:
            case ast.FunctionDef(body=[first, *_]):
                statement.update(dict.fromkeys(range(first.lineno, node.end_lineno + 1), []))
            case ast.AnnAssign(annotation=told) | ast.arg(annotation=ast.AST() as told):
                quiet.update(range(*span(told).indices(len(text))))
        match node:
            case (
                ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Assert()
                | ast.Call(func=ast.Name(id="print" | "say" | "isinstance" | "getattr" | "hasattr"))
                | ast.Expr(value=ast.Constant() | ast.Call(func=ast.Attribute(ast.Name("log"))))
                | ast.Assign(targets=[ast.Name(id="__all__" | "log")])
            ):  # fmt: skip
                quiet.update(range(*span(node).indices(len(text))))
            case ast.Call(args=[a, b, *_]):
                between = text[span(a).stop : span(b).start]
                both = slice(span(a).start, span(b).stop)
                swapped = text[span(b)] + between + text[span(a)]
                changes.append(("argument", both.start, text[both], swapped))
            case ast.Slice(lower=ast.AST() as bound) | ast.Slice(upper=ast.AST() as bound):
                add("slice", bound, f"({text[span(bound)]}) + 1")
            case ast.Expr(value=ast.Call()) | ast.Delete() | ast.AugAssign():
                add("dropped", node, "pass")
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if name in re.findall(r"\w+", text[span(value)]):
                    add("dropped", node, "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                add("dropped", node, "pass")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        place, known = begins[token.start[0] - 1] + token.start[1], TOKENS.get(token.string, [])
        if token.type == tokenize.NUMBER:
            known = [f"({token.string} {by})" for by in ("+ 1", "- 1", "* 2", "* 0")]
            known = known if token.string.strip("0.") else known[:2]
        kind = tokenize.tok_name[token.type].lower()
        changes += [(kind, place, token.string, after) for after in known]
    for kind, at, before, after in changes:
        if at not in quiet:
            number = sum(begin <= at for begin in begins)
            yield kind, at, before, after, list(statement.get(number, ()))
