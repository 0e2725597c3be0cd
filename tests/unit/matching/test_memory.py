"""What a worker of the join holds does not grow with the items, and stays within --memory."""

import json
import subprocess
import sys

import pytest

from dist_train.config.options import bytes_of
from dist_train.matching.blocks import join_bounds
from shards.storage.errors import BadInput
from tests.support.launching import ROOT, environment

WORKER = """
import json, sys
from pathlib import Path
import numpy as np
from dist_train.config.options import JoinConfig, bytes_of
from dist_train.embedding.store import Rows
from dist_train.matching import build_pairs as stage_join
from dist_train.matching.build_pairs import set_up
from dist_train.matching.join import join
from dist_train.matching.kernels import kernels_for
from dist_train.distributed.memory import peak_bytes
from dist_train.matching.vectors import ModalityVectors, ItemVectors
from dist_train.distributed.runtime import Runtime

# One kernel: which is the fastest is measured, and each has blocks of its own size.
stage_join.kernels_for = lambda *words: kernels_for(*words)[:1]
out, items, width, memory = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
block_pairs = sys.argv[5]
files = sorted(out.glob("image-*.npy"))
rows = Rows([np.load(path, mmap_mode="r") for path in files])
item_vectors = ItemVectors({"image": ModalityVectors(rows, np.ones(items, bool), 1.0)})
config = JoinConfig(engine="gemm", memory=memory, neighbours=5, pairs_per_item=5, device="cpu")
runtime = Runtime("cpu")
engine, limits, bounds = set_up(item_vectors, out / "index", out / "pairs", config, runtime)
before = peak_bytes()
some = engine.block_pairs[:: max(1, len(engine.block_pairs) // int(block_pairs))]
engine.block_pairs[:] = some
join(engine, limits, out / "pairs", runtime)
print(json.dumps({"peak": peak_bytes(), "before": before, "bound": bounds.bytes,
                  "block": bounds.block}))
"""
ROWS = """
import sys
import numpy as np
out, items, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number, start in enumerate(range(0, items, 50_000)):
    rows = np.random.default_rng(number).standard_normal((min(50_000, items - start), width), "f4")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(f"{out}/image-{number:05d}.npy", rows.astype(np.float16))
"""


def worked(folder, items: int, width: int, memory: str, block_pairs: int, timeout: float) -> dict:
    """What one worker held at most over some of the block pairs, in a separate process."""
    folder.mkdir()
    # What is freed goes back: which pieces the allocator keeps is chance, some 20 MB of it.
    variables = environment() | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    shape = [str(folder), str(items), str(width)]
    for words in ([ROWS, *shape], [WORKER, *shape, memory, str(block_pairs)]):
        done = subprocess.run(
            [sys.executable, "-c", *words], cwd=ROOT, env=variables, text=True,
            capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def least_memory(width: int) -> str:
    """The least that is enough for blocks of such rows, to the megabyte."""
    for megabytes in range(500, 4000):
        try:
            join_bounds(10**6, 4 * width, 4 * width, width, megabytes * 10**6)
        except BadInput:
            continue
        return f"{megabytes + 1}MB"
    raise AssertionError("no memory is enough")


@pytest.mark.timeout(600)
def test_a_worker_holds_no_more_for_four_times_the_items(tmp_path):
    memory = least_memory(32)
    # So many that both are cut into blocks of one size.
    few = worked(tmp_path / "few", 70_000, 32, memory, 20, 250)
    many = worked(tmp_path / "many", 280_000, 32, memory, 20, 250)
    assert few["block"] == many["block"]
    assert few["bound"] == many["bound"] <= bytes_of(memory)
    assert many["peak"] <= many["bound"]
    # Some flags an item and a longer list of block pairs: 36 bytes an item; a row takes 64.
    assert many["peak"] - few["peak"] < 48 * 210_000


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_a_million_items_in_two_gigabytes(tmp_path):
    found = worked(tmp_path / "million", 1_000_000, 256, "2GB", 12, 2500)
    assert found["bound"] <= 2_000_000_000
    assert found["peak"] <= found["bound"]
