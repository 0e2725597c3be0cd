"""An index build that is killed goes on where it was, to the files of an undisturbed one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_train.matching.index import index_shards
from shards.storage.errors import Unfinished
from tests.support.launching import ROOT, environment
from tests.support.planted import write_set

KIND = "HNSW24"  # slow to build, so that there is something to kill
BUILD = """
import sys
from pathlib import Path
from dist_train.config.options import IndexConfig
from dist_train.matching.index import build_index
build_index(Path(sys.argv[1]), Path(sys.argv[2]), IndexConfig(kind=sys.argv[3], recall_rows=40))
"""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A set of 20 shards' worth and the index that nobody disturbed."""
    folder = tmp_path_factory.mktemp("index-kill")
    rows = np.random.default_rng(0).standard_normal((20_000, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    write_set(folder / "emb", {"image": rows.astype(np.float16)}, 7000)
    assert start(folder, folder / "index").wait(300) == 0
    return folder


def start(folder: Path, out: Path) -> subprocess.Popen:
    arguments = [sys.executable, "-c", BUILD, str(folder / "emb"), str(out), KIND]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)


def shards_in(out: Path) -> set[Path]:
    return set(out.glob("shard-*.faiss"))


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.full)])
def test_a_killed_build_goes_on(undisturbed, tmp_path, kills):
    out, moments, before = tmp_path / "index", random.Random(kills), {}
    for number in range(kills):
        wanted = len(shards_in(out)) + 1 + moments.randrange(3)
        process, end = start(undisturbed, out), time.monotonic() + 120
        while process.poll() is None and len(shards_in(out)) < wanted and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.wait()
        if number == 0:
            with pytest.raises(Unfinished):
                index_shards(out)
            left = out / f".shard-00019.faiss.tmp-{os.uname().nodename}-{process.pid}"
            left.write_bytes(b"half a shard")  # as a kill while writing leaves it
        kept = {path: path.stat().st_mtime_ns for path in shards_in(out)}
        assert before.items() <= kept.items()
        before = kept
    assert before
    assert start(undisturbed, out).wait(300) == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in shards_in(out)}.items()
    assert not list(out.glob(".shard-*"))
    assert not (out / ".work").exists()
    for path in index_shards(undisturbed / "index"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert (out / "index.json").read_bytes() == (undisturbed / "index/index.json").read_bytes()
