"""The mutants of a file: small changes of what it means, made in its text, so the rest stays."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

SWAPS = """< <= >, <= < >=, > >= <, >= > <=, == !=, != ==, + -, - +, * +, / *, // *, % //, & |, | &,
+= -=, -= +=, *= /=, and or, or and, not , if if·not, while while·not, is is·not, in not·in,
True False, False True, sum mean max, mean sum, max min, min max, SUM MAX, MAX SUM, any all,
all any, argmax argmin, argmin argmax, maximum minimum, minimum maximum, floor ceil, ceil floor,
zeros ones, "train" "val", "val" "test" "train", "test" "val", "image" "text", "text" "image",
"left" "right", "right" "left", "done" "failed", "sum" "mean", "min" "max", "max" "min",
ones zeros"""
TOKENS = {name: [a.replace("·", " ") for a in after] or [""]
          for name, *after in (one.split() for one in SWAPS.split(","))}  # fmt: skip
SCRIPT = {"-lt|-gt|-eq": "-ne", "==": "!=", "!=": "==", ">=": ">", "&&": "||", r"\|\|": "&&",
          r"\[\[ ": "[[ ! ", "-n ": "-z ", "-z ": "-n ", r" \+ ": " - ", r"\b[0-9]+\b": "7",
          "USR1": "TERM", "done": "failed", r"(?<!\S)[^#\s}].*": ":", "^#SBATCH": "#"}  # fmt: skip
SYMMETRIC = r"(np\.|torch\.)?(min|max|minimum|maximum|union1d|logaddexp|logical_and|logical_or)$"
Change = tuple[str, int, str, str]  # kind, place, what stands there, what shall


def mutants_of(file: Path) -> Iterator[dict[str, Any]]:
    """Each has all that is needed to make it, also when the lines of the file have moved."""
    text = file.read_text()
    for kind, at, before, after in (of_python if file.suffix == ".py" else of_script)(text):
        first = text.rfind("\n", 0, at) + 1
        line, number = text[first:].partition("\n")[0], text.count("\n", 0, at) + 1
        yield {"file": str(file), "line": number, "kind": kind, "before": before, "after": after,
               "text": line, "column": at - first}  # fmt: skip


def of_script(text: str) -> Iterator[Change]:
    """Line by line."""
    for line in re.finditer(r"^\s*(?!#[^S]|\s).*$", text, re.M):
        for pattern, after in SCRIPT.items():
            for found in re.compile(pattern, re.M).finditer(text, *line.span()):
                yield "script", found.start(), found[0], after


def of_python(text: str) -> Iterator[Change]:
    """Tokens, arguments, bounds and statements; not what people read, annotations and imports."""
    rows, found, quiet = text.splitlines(keepends=True), [], set()
    begins = list(accumulate(map(len, rows), initial=0))

    def span(node: Any) -> slice:
        ends = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        return slice(*(begins[n - 1] + len(rows[n - 1].encode()[:c].decode()) for n, c in ends))

    for node in ast.walk(ast.parse(text)):
        dropped = isinstance(node, ast.Delete | ast.AugAssign)
        match node:
            case (
                ast.AnnAssign(annotation=hint) | ast.arg(annotation=ast.AST() as hint)
                | ast.FunctionDef(returns=ast.AST() as hint) | ast.ClassDef(decorator_list=[hint])
            ):  # fmt: skip
                quiet.update(range(span(hint).start, span(hint).stop))
            case (
                ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Assert()
                | ast.Call(func=ast.Name(id="print" | "isinstance" | "getattr" | "hasattr"))
                | ast.Expr(value=ast.Constant() | ast.Call(func=ast.Attribute(ast.Name("log"))))
                | ast.Assign(targets=[ast.Name(id="__all__" | "log")])
            ):  # fmt: skip
                quiet.update(range(span(node).start, span(node).stop))
            case ast.Call(args=[a, b, *_]) if not re.match(SYMMETRIC, text[span(node.func)]):
                first, last, both = span(a), span(b), slice(span(a).start, span(b).stop)
                swapped = text[last] + text[first.stop : last.start] + text[first]
                found.append(("argument", first.start, text[both], swapped))
            case ast.Slice(lower=ast.AST() as bound) | ast.Slice(upper=ast.AST() as bound):
                found.append(("bound", span(bound).start, "", "1 + "))
            case (
                ast.Expr(value=ast.Call()) | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
            ):
                dropped = True
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                dropped = name in re.findall(r"\w+", text[span(value)])
        if dropped:
            found.append(("dropped", span(node).start, text[span(node)], "pass"))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        changes, (line, column) = TOKENS.get(token.string, []), token.start
        if token.type == tokenize.NUMBER:
            by = ("+ 1", "- 1", "* 2", "* 0")[: 4 if token.string.strip("0.") else 2]
            changes = [f"({token.string} {one})" for one in by]
        kind = tokenize.tok_name[token.type].lower()
        found += [(kind, begins[line - 1] + column, token.string, after) for after in changes]
    yield from (one for one in found if one[1] not in quiet)
