"""The files that start things: they load, mean what they say and name nobody's machine."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.launching import LAUNCHERS, STARTED

ROOT = Path(__file__).parents[3]
CONFIGS = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "launch/accelerate").glob("*.yaml"))]
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), *sorted((ROOT / "launch").rglob("*.sbatch"))]
TEXTS = [*CONFIGS, *SCRIPTS, ROOT / "pyproject.toml", ROOT / "constraints.txt"]
TEXTS += [ROOT / "launch/weights.txt", ROOT / "launch/weights.py"]
TEXTS += [ROOT / "benchmarks/peers.txt"]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def copy(tmp_path):
    """A project folder with a .venv that setup.sh takes for finished."""
    lists = ["constraints.txt", "launch/weights.txt", "benchmarks/peers.txt"]
    for name in ["pyproject.toml", "launch/setup.sh", *lists]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "launch/weights.py").touch()
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    for name in ("pip", "python"):
        (binaries / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"${{0%/bin/*}}/calls"\n')
        (binaries / name).chmod(0o755)
    return tmp_path


def setup(folder: Path) -> list[str]:
    """Run setup.sh from elsewhere; the calls of pip and python that it made."""
    command = ["bash", str(folder / "launch/setup.sh")]
    subprocess.run(command, check=True, cwd="/", capture_output=True, timeout=60)
    calls = folder / ".venv/calls"
    made = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return made


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    named = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in named}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_every_config(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == (2 if path.stem == "many_nodes" else 1)
    assert config.num_processes != -1, "accelerate would refuse to start without --num_processes"
    assert config.rdzv_backend == "static"


def test_default_config_takes_all_gpus_in_bf16():
    config = load_config_from_file(str(ROOT / "accelerate_config.yaml"))
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert (config.num_processes, config.gpu_ids) == ("gpu", None)
    assert config.mixed_precision == "bf16"


def test_torchrun_knows_the_word_gpu(monkeypatch):
    from torch.distributed import run

    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 3)
    assert run.determine_local_world_size("gpu") == 3


def test_cpu_config_starts_several_processes():
    config = load_config_from_file(str(ROOT / "launch/accelerate/cpu.yaml"))
    # With MULTI_CPU or use_cpu the launcher starts one process only.
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert (config.num_processes, config.mixed_precision) == (2, "no")
    assert not config.use_cpu


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_configs_name_their_stage(stage):
    config = load_config_from_file(str(ROOT / f"launch/accelerate/deepspeed_zero{stage}.yaml"))
    assert config.distributed_type == DistributedType.DEEPSPEED
    asked = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
    assert asked["zero_optimization"]["stage"] == stage
    # What the training sets itself, and accelerate refuses to have named twice.
    for name in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert asked[name] == "auto"
    assert config.mixed_precision is None
    assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
    assert not config.use_cpu, "accelerate then drops DeepSpeed without a word"


def test_every_config_is_started_by_a_test():
    started = {path.name for path in STARTED} | set(LAUNCHERS)
    assert {path.name for path in CONFIGS} == started


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_every_script(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)


def test_slurm_script_reads_the_node_number_on_the_node():
    text = (ROOT / "launch/slurm/stage.sh").read_text()
    on_the_node = text.split("bash -c '")[1].split("' launched")[0]
    assert '--machine_rank "$SLURM_NODEID"' in on_the_node
    assert 'trap "" USR1 TERM' in on_the_node
    assert on_the_node.count("SLURM_NODEID") == text.count("SLURM_NODEID")


def test_constraints_pin_every_direct_dependency(project):
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        pin = pins()[canonicalize_name(requirement.name)]
        assert pin.startswith("=="), requirement
        assert requirement.specifier.contains(pin.removeprefix("==")), requirement


def test_faiss_wheels_stay_apart(project):
    extras = project["optional-dependencies"]
    assert [Requirement(r).name for r in extras["cpu"]] == ["faiss-cpu"]
    assert [Requirement(r).name for r in extras["gpu"]] == ["faiss-gpu"]
    assert not any("faiss" in r for r in project["dependencies"] + extras["test"])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_file_names_a_host_or_a_folder_of_this_machine(path):
    text = path.read_text()
    assert not re.search(r"https?://|index-url|find-links|\b\w+\.(org|com|io)\b", text)
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.}$\"])/(home|root|work|opt|mnt|Users)/", text)


def test_setup_runs_once_until_a_list_changes(copy):
    assert any("-c constraints.txt" in call for call in setup(copy))
    assert setup(copy) == []
    with (copy / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert setup(copy) != []
    assert setup(copy) == []


def test_setup_of_a_moved_project_runs_again(copy):
    setup(copy)
    moved = copy.rename(copy.with_name("moved"))
    assert setup(moved) != []


def test_setup_leaves_exactly_one_faiss(copy):
    """The stand-in for pip says that the other wheel is there: then both have to go first."""
    calls = setup(copy)
    removed = calls.index("pip uninstall -q -y faiss-cpu faiss-gpu")
    installs = [i for i, call in enumerate(calls) if re.search(r"-e \.\[(cpu|gpu)\]$", call)]
    assert len(installs) == 1
    assert removed < installs[0]
