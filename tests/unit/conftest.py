"""Two shard sets on a server, for the tests of what is read from URLs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read import remote
from shards.read.cache import FOLDER
from tests.support.serving import Serving, serve


@pytest.fixture(scope="session")
def sets(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sets a/ and b/: the same names of files, not one tar in common."""
    folder = tmp_path_factory.mktemp("sets")
    for name, seed in (("a", 0), ("b", 1)):
        options = PackOptions(size=48, shard_items=40, seed=seed)
        pack(catalogue / "catalogue.csv", catalogue / "images", folder / name, options)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's copies; second tries come at once."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def server(sets: Path, cache: Path) -> Iterator[Serving]:
    """The sets on a server."""
    with serve(sets) as serving:
        yield serving
