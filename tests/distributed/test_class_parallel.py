"""The sharded margin softmax on 1, 2 and 3 gloo ranks against one process in float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, environment

pytestmark = pytest.mark.timeout(200)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_and_gradients_equal_the_unsharded_reference(world: int, tmp_path: Path) -> None:
    worker = ROOT / "tests" / "distributed" / "class_parallel_worker.py"
    ranks = []
    for rank in range(world):
        env = environment() | {
            "RANK": str(rank), "WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        ranks.append(subprocess.Popen([sys.executable, str(worker), str(tmp_path)], env=env))
    assert [process.wait(timeout=150) for process in ranks] == [0] * world
    cases = json.loads((tmp_path / "cases.json").read_text())
    assert len(cases) >= 40
    worst = max(cases, key=lambda case: case["error"])
    assert worst["error"] < 1e-10, worst
