"""`accelerate launch` with the shipped configs, as they are, on a CPU; ZeRO in test_strategies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.launching import DEFAULT, MANY, ONE, ROOT, environment, free_port

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def verb(image_options: list[object], tmp_path: Path) -> list[object]:
    """A training of a few steps into tmp_path/run; a batch that 1, 2, 3 and 4 processes divide."""
    few = [0.2 if option == 0.8 else option for option in image_options]
    return ["train", "image", *few, "--out", tmp_path / "run"]


def launch(config: Path, *arguments: object) -> subprocess.Popen[str]:
    """accelerate launch, with nothing but the config and `arguments`."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *arguments]
    env = {name: value for name, value in environment().items() if name != "ACCELERATE_USE_CPU"}
    return subprocess.Popen(
        [str(word) for word in line], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all output."""
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    return process.returncode, output


def trained_by(run: Path) -> int:
    """How many processes, as one group, made the finished run: each wrote its part of the head."""
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    return len(list(max((run / "checkpoints").iterdir()).glob("head-*")))


@pytest.mark.parametrize(
    "world", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 3, 4))]
)
def test_the_default_config_with_any_number_of_processes(
    world: int, verb: list[object], tmp_path: Path
) -> None:  # fmt: skip
    port = ["--main_process_port", free_port()]
    arguments = ["--num_processes", world, *port, "-m", "dist_train", *verb]
    code, output = ended(launch(DEFAULT, *arguments))
    assert code == 0, output
    assert trained_by(tmp_path / "run") == world


def test_one_process(verb: list[object], tmp_path: Path) -> None:
    code, output = ended(launch(ONE, "-m", "dist_train", *verb))
    assert code == 0, output
    assert trained_by(tmp_path / "run") == 1


def test_two_machines(verb: list[object], tmp_path: Path) -> None:
    """Two launchers, as on two machines; one folder."""
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    together = ["--num_machines", 2, "--num_processes", 2, *where]
    machines = [
        launch(MANY, *together, "--machine_rank", rank, "-m", "dist_train", *verb)
        for rank in range(2)
    ]
    for code, output in map(ended, machines):
        assert code == 0, output
    assert trained_by(tmp_path / "run") == 2


@pytest.mark.parametrize(
    "alone",
    [[ONE], pytest.param([DEFAULT, "--cpu", "--num_machines", 1], marks=pytest.mark.full)],
    ids=["one_gpu.yaml", "--cpu"],
)
def test_a_process_that_is_alone_where_two_were_meant_is_refused(
    alone: list[object], verb: list[object], tmp_path: Path
) -> None:
    """accelerate starts one without a word; separate copies would train."""
    config, *arguments = alone
    code, output = ended(launch(Path(str(config)), *arguments, "--num_processes", 2, "-m",
                              "dist_train", *verb))  # fmt: skip
    assert code != 0
    assert "was to start several processes and has started only this one" in output
    assert not (tmp_path / "run").exists()


FSDP = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cpu.yaml", FSDP, "the launcher asks for FSDP"),
        ("deepspeed_zero2.yaml", {}, "take out what DeepSpeed is not to decide: scheduler (give"),
    ],
)
def test_what_the_launcher_may_not_decide_is_refused(
    name: str, settings: dict, words: str, verb: list[object], tmp_path: Path, monkeypatch
) -> None:
    """By every rank in one line, and nothing is trained."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    given = yaml.safe_load((ROOT / "launch/accelerate" / name).read_text()) | settings
    if "deepspeed_config" in given:
        told = json.loads((ROOT / given["deepspeed_config"]["deepspeed_config_file"]).read_text())
        (tmp_path / "ds.json").write_text(json.dumps(told | {"scheduler": SCHEDULER}))
        given["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "ds.json")
    config = tmp_path / "launch.yaml"
    config.write_text(yaml.safe_dump(given))
    port = ["--main_process_port", free_port()]
    code, output = ended(launch(config, "--num_processes", 2, *port, "-m", "dist_train", *verb))
    assert code != 0
    refusals = [line for line in output.splitlines() if line.startswith("dist-train [rank ")]
    assert refusals, output
    assert all(words in line for line in refusals), output
    assert not list(tmp_path.glob("run/checkpoints/*"))
