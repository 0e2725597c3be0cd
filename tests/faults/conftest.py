"""A small catalogue for packs that are disturbed, and the set that an undisturbed one makes."""

from pathlib import Path

import pytest

from shards.pack.pack import pack
from tests.support.packing import OPTIONS, tree


@pytest.fixture(scope="session")
def few(catalogue: Path) -> Path:
    """The first postings of the generated catalogue, beside its photos."""
    lines = (catalogue / "catalogue.csv").read_text().splitlines(keepends=True)
    (catalogue / "few.csv").write_text("".join(lines[:61]))
    return catalogue / "few.csv"


@pytest.fixture(scope="session")
def undisturbed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "s"
    pack(few, few.parent / "images", out, OPTIONS)
    return tree(out)
