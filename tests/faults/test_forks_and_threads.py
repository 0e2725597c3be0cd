"""FAISS beside other libraries: its kernel, its threads, and processes made after its import."""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.support.launching import ROOT, environment

PROBE = """
import json, os
import torch
from dist_train.matching.faiss_library import CHOICE, faiss, gpus
from dist_train.matching.kernels import use_threads
from threadpoolctl import threadpool_info
use_threads()
blas = [lib for lib in threadpool_info() if lib["user_api"] == "blas"]
print(json.dumps({
    "numpy": [b["architecture"] for b in blas if "numpy" in b["filepath"]],
    "faiss": [b["architecture"] for b in blas if "faiss" in b["filepath"]],
    "left": os.environ.get(CHOICE), "threads": faiss.omp_get_max_threads(), "gpus": gpus(),
    "blas": [b["num_threads"] for b in blas], "torch": torch.get_num_threads(),
}))
"""
SPAWN = """
import multiprocessing
import numpy as np
from dist_train.matching.faiss_library import faiss

def search(_):
    index = faiss.IndexFlatIP(64)
    index.add(np.ones((5000, 64), np.float32))
    return float(index.search(np.ones((200, 64), np.float32), 3)[0].sum())

if __name__ == "__main__":
    mine = search(0)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(search, range(2), chunksize=1) == [mine, mine]
    print("same")
"""


def probe(**variables: str) -> dict:
    env = {k: v for k, v in environment().items() if k != "OPENBLAS_CORETYPE"} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, cwd=ROOT, text=True, capture_output=True,
        check=True, timeout=120,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_faiss_multiplies_with_the_kernel_that_numpy_found():
    found = probe()
    if not found["faiss"]:
        pytest.skip("this FAISS does not include OpenBLAS")
    wide = {"Cooperlake": "SkylakeX", "SapphireRapids": "SkylakeX"}
    assert found["faiss"] == [wide.get(name, name) for name in found["numpy"]]
    assert found["left"] is None  # nothing leaks to the processes that are started later


def test_a_kernel_of_the_users_choice_stays():
    found = probe(OPENBLAS_CORETYPE="Nehalem")
    assert found["left"] == "Nehalem"


@pytest.mark.parametrize(("given", "ranks", "threads"), [("1", "1", 1), (None, "2", None)])
def test_threads_are_shared_among_the_ranks_of_a_machine(monkeypatch, given, ranks, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    env = {k: v for k, v in environment().items() if k != "OMP_NUM_THREADS"}
    env |= {"LOCAL_WORLD_SIZE": ranks} | ({"OMP_NUM_THREADS": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, cwd=ROOT, text=True, capture_output=True,
        check=True, timeout=120,
    )  # fmt: skip
    wanted = threads or max(1, len(os.sched_getaffinity(0)) // int(ranks))
    found = json.loads(done.stdout)
    assert found["blas"]
    assert {found["threads"], found["torch"], *found["blas"]} == {wanted}


def test_spawned_processes_search_after_the_import(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWN)
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, cwd=tmp_path, text=True, capture_output=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr


def test_the_matching_starts_no_process_and_never_forks():
    """Its workers are ranks that somebody else starts: nothing to be forked after the import."""
    starts = {"fork", "forkpty", "Process", "Pool", "ProcessPoolExecutor", "DataLoader"}
    for path in (ROOT / "dist_train" / "matching").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", None))
            assert name not in starts, f"{path}:{node.lineno} {name}"


def test_no_module_forks_after_faiss_is_imported():
    """The loaders of embed and train fork; they do not import faiss, and the matching does not."""
    code = "import sys, dist_train.embedding.embed, dist_train.training.validation; "
    code += "print('faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, text=True,
                          capture_output=True, check=True, timeout=200)  # fmt: skip
    assert done.stdout.strip() == "False"
