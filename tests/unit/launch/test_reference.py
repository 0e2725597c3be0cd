"""The reference in docs/ is what the code says."""

import re
import shlex
from pathlib import Path

import pytest

from dist_train.cli import app
from dist_train.command import CONFIG_FIRST
from dist_train.decisions.threshold import Threshold
from dist_train.embedding.embed import COLUMNS
from dist_train.evaluation.f1_curve import SavedCurve
from dist_train.evaluation.metrics import GroupSizeScore
from dist_train.evaluation.scores import Difference, MatcherScore, Scores
from dist_train.matching.pairs import SCORES, Audit, Proof
from dist_train.slurm.status import Job
from docs.generate_reference import reference
from shards.pack.items import NOISE_SCHEMA, OWN

DOCS = Path(__file__).parents[3] / "docs"


def test_the_committed_options_are_those_of_the_code() -> None:
    command = "python -m docs.generate_reference > docs/reference/options.md"
    assert (DOCS / "reference" / "options.md").read_text() == reference(), f"run {command}"


@pytest.mark.parametrize(
    "columns", [OWN, COLUMNS, SCORES, NOISE_SCHEMA.names], ids=["o", "e", "s", "n"]
)
def test_every_column_of_a_table_is_described(columns: tuple[str, ...]) -> None:
    described = re.findall(r"^\| (`.*?) \|", (DOCS / "reference" / "files.md").read_text(), re.M)
    assert set(columns) <= {name for cell in described for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize(
    ("section", "records"),
    [
        ("Pairs", (Proof, Audit)),
        ("Matches", (Threshold, SavedCurve, Scores, MatcherScore, Difference, GroupSizeScore)),
        ("OUT of run", (Job,)),
    ],
)
def test_every_key_of_a_json_file_is_described(section: str, records: tuple[type, ...]) -> None:
    text = (DOCS / "reference" / "files.md").read_text()
    text = text[text.index(f"\n## {section}") :].partition("\n## ")[2].partition("\n## ")[0]
    keys = {key for record in records for key in record.__annotations__} - {"format"}
    assert keys <= set(re.findall(r"`(\w+)`", text))


def test_every_link_leads_to_a_file() -> None:
    pages = [DOCS.parent / "README.md", *DOCS.rglob("*.md")]
    broken = [
        f"{page.relative_to(DOCS.parent)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken


def test_every_path_that_is_named_exists() -> None:
    root = DOCS.parent
    named = r"`((?:dist_train|shards|launch|benchmarks|tests|docs)/[\w./-]+\.\w+)`"
    modules = r"python -m ((?:benchmarks|tests|docs)\.[a-z][\w.]*)"
    missing = set()
    for page in [root / "README.md", *DOCS.rglob("*.md")]:
        paths = re.findall(named, page.read_text())
        paths += [f"{name.replace('.', '/')}.py" for name in re.findall(modules, page.read_text())]
        missing |= {f"{page.name}: {path}" for path in paths if not (root / path).exists()}
    assert not missing


def test_every_command_of_the_documents_is_one() -> None:
    """Indented lines that begin with dist-train: verbs and options are known and well formed."""
    pages, parsed = [DOCS.parent / "README.md", *DOCS.rglob("*.md")], 0
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^    dist-train (.*)$", text, re.M):
            words = shlex.split(line.split("   ")[0].split(" #")[0])
            if words[0] in CONFIG_FIRST or "…" in words:
                continue  # the file they name is the reader's
            app.parse_args(words, exit_on_error=False, print_error=False)
            parsed += 1
    assert parsed > 20
