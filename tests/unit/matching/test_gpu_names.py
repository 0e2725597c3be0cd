"""What is called of FAISS is there: in the wheel for CPUs, and, where it is for GPUs, in theirs.

No GPU and no CUDA is needed: the wheel for GPUs is read as text, not imported.
"""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import faiss
import pytest

from dist_train.matching import faiss_library
from tests.support.launching import ROOT

MATCHING = ROOT / "dist_train" / "matching"
GPU = {
    "get_num_gpus": [],
    "StandardGpuResources.__init__": ["self"],
    "StandardGpuResources.setTempMemory": ["self", "size"],
    "GpuClonerOptions.__init__": ["self"],
    "index_cpu_to_gpu": ["provider", "device", "index", "options"],
    "index_gpu_to_cpu": ["gpu_index"],
}
"""Names that only the wheel for GPUs has, and their arguments in the order that we give them."""


def used() -> dict[str, set[str]]:
    """Attributes of faiss that the matching takes, by file."""
    found: dict[str, set[str]] = {}
    for path in MATCHING.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)
                 and isinstance(node.value, ast.Name) and node.value.id == "faiss"}  # fmt: skip
        found |= {path.name: names} if names else {}
    return found


def test_every_name_is_in_the_wheel_for_cpus_or_listed_here():
    names = set.union(*used().values())
    assert {"IndexFlat", "read_index", "index_factory"} & names
    listed = {name.partition(".")[0] for name in GPU}
    assert {name for name in names if not hasattr(faiss, name)} <= listed


def test_gpu_names_stand_behind_two_functions():
    """One place to guard: without a driver a call of FAISS for a GPU ends the process."""
    listed = {name.partition(".")[0] for name in GPU}
    assert {file for file, names in used().items() if names & listed} == {"faiss_library.py"}
    if not faiss_library.gpus():
        index = faiss.IndexFlatIP(3)
        assert faiss_library.on_cpu(index) is index


def test_a_call_without_a_gpu_is_never_reached():
    """Outside their module `on_gpu` stands only concatenated a question whether there is one."""
    for path in MATCHING.glob("*.py"):
        tree = ast.parse(path.read_text())
        asked = {
            id(call)
            for node in ast.walk(tree)
            if isinstance(node, ast.If | ast.IfExp) and _asks(node.test)
            for call in ast.walk(node) if _calls(call, "on_gpu")
        }  # fmt: skip
        for node in ast.walk(tree):
            assert not _calls(node, "on_gpu") or id(node) in asked, f"{path}:{node.lineno}"


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == name


def _asks(test: ast.expr) -> bool:
    called = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
    return any(getattr(f, "id", getattr(f, "attr", "")) in ("gpus", "_on_gpu") for f in called)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_wheel_for_gpus_has_what_is_called(tmp_path):
    """Fetched as a file and read; its version is that of the one for CPUs."""
    words = [sys.executable, "-m", "pip", "download", f"faiss-gpu=={faiss.__version__}",
             "--no-deps", "--only-binary", ":all:", "--dest", str(tmp_path)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=800, check=False)
    if done.returncode:
        pytest.skip(f"cannot be fetched here: {done.stderr.splitlines()[-1:]}")
    check_wheel(next(tmp_path.glob("*.whl")))


def check_wheel(wheel: Path) -> None:
    """Every name of GPU stands in the wheel's wrapper, with its arguments in this order."""
    with zipfile.ZipFile(wheel) as files:
        tree = ast.parse(files.read("faiss/swigfaiss.py"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [a.arg for a in node.args.args]
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{f.name}": [a.arg for a in f.args.args]
                      for f in node.body if isinstance(f, ast.FunctionDef)}  # fmt: skip
    assert {name: found.get(name) for name in GPU} == GPU
