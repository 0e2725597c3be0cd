"""Names, comments, docstrings, messages and documents use the field's words, not a dialect.

Each rule is a pattern, what to write in its place, and something that it must find. Words that are
ordinary English in another sense are matched only in the sense that is not wanted, or not at
all.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Parts of a name, as its underscores and capitals divide it.
PARTS = {
    "told tell tells say says": "format_… or describe_…",
    "asks asking asked": "query or database rows; requested",
    "sketch sketches": "projection",
    "canary canaries": "planted pairs",
    "tile tiles": "block pair",
    "judge judges": "validator",
    "bench": "comparison",
    "twin twins": "near-duplicates",
    "looks": "photo signatures",
    "view views": "modality, or item vectors",
    "road roads house": "pipeline, layer",
    "life lives": "attempt",
    "meeting meetings": "barrier",
    "settle settles settled": "one exact verb",
    "everyone": "all ranks or all rows",
    "onto": "a name for what is added",
    "parted": "ZeRO-3",
    "whole": "complete",
    "mend mends mended": "fix",
    "wonder": "symptom",
}
# A name as it is.
NAMES = {
    r"(?!.*score_floor)(.*_)?floors?(_.*)?": ("baseline, score floor or k-th best", "title_floor"),
    r"look": ("validate or inspect", "look"),
    r"_?give_back\w*": ("trim_allocators", "give_back"),
    r"has_seen_enough": ("should_stop_early", "has_seen_enough"),
    r"\w*first_pass\w*|FirstPass\w*": ("coarse_pass", "first_pass"),
    r"\w*left_of\w*": ("candidates of", "left_of_tile"),
    r"how_not_what": ("no_effect_on_result", "HOW_NOT_WHAT"),
}
# Running text: comments, docstrings, messages, documents.
PHRASES = {
    r"\btold\b|\btells?\b": ("reported, named, shown", "is told"),
    r"\bask(ed|ing)\b": ("requested; query rows", "the asking rows"),
    r"\bsketch(es)?\b": ("projection", "a sketch"),
    r"\bcanar(y|ies)\b": ("planted pairs", "canaries"),
    r"\btiles?\b": ("block pair", "this tile"),
    r"\bjudges?\b": ("validator", "the judge"),
    r"\btwins?\b": ("near-duplicates", "two twins"),
    r"(?<!score.)\bfloors\b": ("baselines", "above the floors"),
    r"\broads?\b": ("pipeline", "the road"),
    r"\bthe house\b": ("layer", "the house"),
    r"\blife\b": ("attempt", "an older life"),
    r"\bmeetings?\b": ("barrier", "a meeting"),
    r"\bsettle[sd]?\b": ("one exact verb", "is settled"),
    r"\bparted\b": ("under ZeRO-3", "is parted"),
    r"\bitself[ _]only\b": ("self-match", "itself only"),
    r"\bof (its|their) own\b": ("separate, new, private", "a process of its own"),
    r"\bfirst pass\b": ("coarse pass", "the first pass"),
    r"\bleft of\b": ("candidates of; remaining", "left of a block"),
    r"\bno numbers?\b|\bnot-a-number\b": ("NaN or Inf", "is no number"),
    r"\bmend(s|ed|ing)?\b": ("fix", "mend it"),
    r"\bwonders?\b": ("symptom", "a wonder"),
    r"\ba attempt\b|\battempts on\b": ("an attempt; goes on", "a attempt"),
}
FRAGMENT = r"\s*Of\b", "a full sentence, or the thing itself first"

PYTHON = [
    *(p for p in sorted((ROOT / "dist_train").rglob("*.py")) if "synthetic" not in p.parts),
    *sorted((ROOT / "shards").rglob("*.py")),
    *sorted((ROOT / "launch").glob("*.py")),
]
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "log.md"),
    *(p for p in sorted((ROOT / "launch").rglob("*")) if p.suffix in (".sh", ".sbatch", ".yaml")),
    *sorted((ROOT / "dist_train").rglob("*.j2")),
]


def names_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that a module defines; what it uses of libraries is theirs to name."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


def faults_of_name(name: str) -> list[str]:
    """The rules that a name breaks."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    found = [f"{part} → {instead}" for words, instead in PARTS.items()
             for part in parts if part in words.split()]  # fmt: skip
    return found + [
        f"{name} → {instead}" for pattern, (instead, _) in NAMES.items()
        if re.fullmatch(pattern, name, re.IGNORECASE)
    ]  # fmt: skip


def faults_of_text(text: str) -> Iterator[tuple[int, str]]:
    """Line (from 0) and rule of each phrase in a text; a line break counts as a space."""
    flat = re.sub(r"\n[ \t#]*", lambda gap: "\n" + " " * (len(gap[0]) - 1), text)
    for pattern, (instead, _) in PHRASES.items():
        for found in re.finditer(pattern.replace(" ", r"\s+"), flat, re.IGNORECASE):
            words = " ".join(found[0].split())
            yield flat.count("\n", 0, found.start()), f"“{words}” → {instead}"


def comments_of(source: str) -> list[tuple[int, str]]:
    """First line and text of each comment; one of several lines is one text."""
    comments: list[tuple[int, str]] = []
    end = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start, text = comments.pop() if token.start[0] == end + 1 else (token.start[0], "")
            comments.append((start, f"{text}\n{token.string}" if text else token.string))
            end = token.start[0]
    return comments


def faults_of_python(path: Path) -> list[str]:
    """Every fault of a module, as `line: fault`."""
    source = path.read_text()
    tree = ast.parse(source)
    found = [(1, fault) for fault in faults_of_name(path.stem)]
    for line, name in names_of(tree):
        found += [(line, f"{name}: {fault}") for fault in faults_of_name(name)]
    texts = comments_of(source)
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))) if re.match(FRAGMENT[0], text):
                found.append((node.lineno, f"“{text.strip()[:30]}…” → {FRAGMENT[1]}"))
            case ast.Constant(value=str(text)):
                texts.append((node.lineno, text))
    for start, text in texts:
        found += [(start + line, fault) for line, fault in faults_of_text(text)]
    return [f"{line}: {fault}" for line, fault in sorted(set(found))]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_use_the_fields_words(path: Path) -> None:
    assert faults_of_python(path) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_the_fields_words(path: Path) -> None:
    found = faults_of_text(path.read_text())
    assert [f"{line + 1}: {fault}" for line, fault in found] == []


def test_every_rule_finds_its_example(tmp_path: Path) -> None:
    for words in PARTS:
        for word in words.split():
            assert faults_of_name(f"a_{word}"), word
            assert faults_of_name(f"The{word.title()}"), word
    for _, example in NAMES.values():
        assert faults_of_name(example), example
    for _, example in PHRASES.values():
        assert list(faults_of_text(f"It says\n    {example.replace(' ', chr(10))}.")), example
    module = tmp_path / "module.py"
    module.write_text('# one of\n# its own\nx = 1\n"""Of the whole."""\n')
    assert [fault.partition(":")[0] for fault in faults_of_python(module)] == ["1", "4"]


def test_wanted_words_pass() -> None:
    for name in ("score_floor", "max_score_floor", "overlooked", "taken"):
        assert not faults_of_name(name), name
    assert not list(faults_of_text("The whole catalogue, taken as it is; it overlooks nothing."))
