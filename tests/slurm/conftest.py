"""One cluster for the tests of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm_cluster import HOW_TO_GET, Cluster, can_have_hosts, is_installed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, as separate hosts where this user may make them."""
    if not is_installed():
        pytest.skip(HOW_TO_GET)
    started = Cluster(tmp_path_factory.mktemp("slurm"), 3, can_have_hosts())
    yield started
    started.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stages of a file go."""
    return tmp_path_factory.mktemp("stages")
