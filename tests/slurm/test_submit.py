"""`dist-train submit` and `status` on a running Slurm: the complete pipeline and their output."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from shards.storage.files import read_json
from tests.support.launching import ROOT, environment
from tests.support.slurm_cluster import HOW_TO_GET, Cluster, is_installed

pytestmark = pytest.mark.timeout(1500)
STAGES = ["pack", "image", "text", "embedding", "index", "join", "match", "evaluate", "report"]


def dist_train(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A verb, where Slurm's commands find the cluster."""
    command = [*cluster.on("ctl"), sys.executable, "-m", "dist_train", *map(str, arguments)]
    return subprocess.run(command, env=cluster.environment() | environment(), cwd=ROOT, text=True,
                          capture_output=True, timeout=300, check=False)  # fmt: skip


@pytest.fixture(scope="module")
def config(catalogue: Path, tiny_vit: Path, tiny_bert: Path, folder: Path) -> Path:
    """A tiny pipeline: trainings on two nodes with two processes each, arrays for pack and join."""
    training = {"batch_size": 24, "epochs": 2, "workers": 0, "precision": "fp32", "log_every": 1}
    options = {
        "catalogue": str(catalogue / "catalogue.csv"), "images": str(catalogue / "images"),
        "out": str(folder / "submitted"), "pack": {"size": 48, "shard_items": 100},
        "image": training | {"encoder": {"model": str(tiny_vit), "image_size": 32}},
        "text": training | {"encoder": {"model": str(tiny_bert)}},
        "embed": {"workers": 0, "precision": "fp32"},
        "slurm": {
            "processes": 1, "cpus": 2, "time": "30", "text": {"processes": 2},
            "image": {"nodes": 2}, "pack": {"tasks": 2}, "join": {"tasks": 2},
        },
    }  # fmt: skip
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def jobs_of(out: Path) -> dict[str, str]:
    """The number of every stage's job."""
    stages = read_json(out / "slurm/jobs.json")["stages"]
    return {name: stage["job"] for name, stage in stages.items()}


def test_the_submitted_pipeline_ends_with_the_matches_of_run(
    cluster: Cluster, config: Path, folder: Path
) -> None:
    out = folder / "submitted"
    first = dist_train(cluster, "submit", config)
    assert first.returncode == 0, first.stderr
    jobs = jobs_of(out)
    assert list(jobs) == STAGES
    assert [line.split()[:2] for line in first.stdout.splitlines()[1:]] == [
        *map(list, jobs.items())
    ]

    shown = dist_train(cluster, "status", out)
    assert shown.returncode == 3, shown.stdout + shown.stderr
    assert "waits" in shown.stdout

    again = dist_train(cluster, "submit", config)
    assert again.returncode == 0, again.stderr
    assert jobs_of(out) == jobs, "a queued job was doubled"

    cluster.wait_for(lambda: not cluster.call("squeue", "-h"), 900, "end of all jobs")
    shown = dist_train(cluster, "status", out)
    assert shown.returncode == 0, shown.stdout + shown.stderr + logs(out)
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:]] == [
        [s, "done"] for s in STAGES
    ]
    assert "going on" not in logs(out)

    done = dist_train(cluster, "submit", config)
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        [s, "done"] for s in STAGES
    ]
    assert not cluster.call("squeue", "-h")

    ran = dist_train(cluster, "run", config, "--out", folder / "ran")
    assert ran.returncode == 0, ran.stderr
    # Degrees are not compared: a training on another number of processes may find one pair more or
    # less at the score floor.
    for name, column in (("matches", "matches"), ("groups", "group_id")):
        ours, theirs = (
            pd.read_parquet(o / f"matches/{name}.parquet") for o in (out, folder / "ran")
        )
        assert ours.posting_id.tolist() == theirs.posting_id.tolist()
        assert ours[column].map(str).tolist() == theirs[column].map(str).tolist()
    ours, theirs = (read_json(o / "matches/metrics.json")["rows"] for o in (out, folder / "ran"))
    assert [row["name"] for row in ours] == [row["name"] for row in theirs]
    assert ours[-1]["f1"] == pytest.approx(theirs[-1]["f1"], abs=1e-9)


def begins(table: str) -> list[tuple[str, ...]]:
    """The first two columns of what submit and status print."""
    return [tuple(line.split()[:2]) for line in table.splitlines()[1:]]


def logs(out: Path) -> str:
    """What all jobs wrote."""
    return "\n".join(path.read_text() for path in sorted((out / "slurm/logs").iterdir()))


def test_a_failed_stage_takes_the_rest_along_and_is_named(
    cluster: Cluster, config: Path, folder: Path
) -> None:
    out = folder / "failed"
    broken = yaml.safe_load(config.read_text()) | {"out": str(out), "encoders": ["text"]}
    broken["slurm"]["setup"] = ["exit 7"]
    path = folder / "failed.yaml"
    path.write_text(yaml.safe_dump(broken))
    assert dist_train(cluster, "submit", path).returncode == 0
    before = jobs_of(out)
    cluster.wait_for(lambda: not cluster.call("squeue", "-h"), 120, "end of all jobs")
    shown = dist_train(cluster, "status", out)
    assert shown.returncode == 1
    rows = {line.split()[0]: line for line in shown.stdout.splitlines()[1:]}
    assert "failed" in rows["pack"]
    assert "exit code 7:0" in rows["pack"]
    assert "cancelled" in rows["text"]
    assert "pack failed" in shown.stderr
    # With a repaired config it goes on with new jobs.
    broken["slurm"]["setup"] = ["sleep 600"]
    path.write_text(yaml.safe_dump(broken))
    assert dist_train(cluster, "submit", path).returncode == 0
    after = jobs_of(out)
    assert not set(after.values()) & set(before.values())
    # What is cancelled stays so.
    cluster.wait_until(after["pack"], "RUNNING", seconds=60)
    cluster.call("scancel", after["pack"])
    cluster.wait_for(lambda: not cluster.call("squeue", "-h"), 120, "end of all jobs")
    shown = dist_train(cluster, "status", out)
    assert shown.returncode == 1
    assert "pack cancelled" in shown.stderr


def test_dry_run_asks_sbatch(cluster: Cluster, config: Path, folder: Path) -> None:
    fine = dist_train(cluster, "submit", config, "--dry-run", "--out", folder / "dry")
    assert fine.returncode == 0, fine.stderr
    assert "sbatch accepts all" in fine.stdout
    assert not (folder / "dry/slurm/jobs.json").exists()
    for option, value in (("nodes", 12), ("partition", "nowhere")):
        refused = dist_train(cluster, "submit", config, "--dry-run", "--out", folder / "dry",
                             f"--slurm.image.{option}", value)  # fmt: skip
        assert refused.returncode == 2
        assert "02-image.sbatch" in refused.stderr
        assert "03-text.sbatch" not in refused.stderr
    assert not cluster.call("squeue", "-h")


def test_a_cancelled_training_stays_so_and_an_array_requeues_its_own_task(
    cluster: Cluster, folder: Path
) -> None:
    """The shipped script around a stage that takes its time: no library is loaded for it."""
    stage = folder / "bin/python"
    stage.parent.mkdir()
    stage.write_text(STAND_IN)
    stage.chmod(0o755)
    script = [ROOT / "launch/slurm/join.sbatch", "--out"]
    common = ["--cpus-per-task=1", "--chdir", ROOT, "--output", folder / "%x-%a.log"]
    venv = {"VENV": str(folder), "GPUS": "1"}
    job = cluster.sbatch(
        "--array=0-1", "--job-name=own", *common, *script, folder / "own-%a", **venv
    )
    cluster.wait_for(lambda: (folder / "own-1.begun").exists(), 60, "task 1")
    cluster.call("scancel", "--signal=USR1", "--batch", f"{job}_1")
    cluster.wait_for(lambda: count(folder / "own-1.begun") == 2, 60, "task 1 again")
    (folder / "own-0.end").touch()
    (folder / "own-1.end").touch()
    cluster.wait_for(lambda: not cluster.call("squeue", "-h"), 60, "end of the array")
    assert (count(folder / "own-0.begun"), count(folder / "own-1.begun")) == (1, 2)
    job = cluster.sbatch("--job-name=gone", *common, *script, folder / "gone", **venv)
    cluster.wait_for(lambda: (folder / "gone.begun").exists(), 60, "the job")
    cluster.call("scancel", job)
    cluster.wait_for(lambda: not cluster.call("squeue", "-h"), 60, "end of the job")
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert count(folder / "gone.begun") == 1


STAND_IN = """#!/usr/bin/env bash
# Ends with 0 once OUT.end is there, and with 3 (stopped and resumable) on SIGTERM.
trap 'exit 3' TERM
out="${!#}"
echo begun >>"$out.begun"
until [[ -e $out.end ]]; do sleep 0.1; done
"""


def count(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


# Beside other tests its job was once "launch failed requeued held", and never by itself.
@pytest.mark.full
def test_the_plain_form_needs_no_root(tmp_path: Path) -> None:
    if not is_installed():
        pytest.skip(HOW_TO_GET)
    plain = Cluster(tmp_path / "slurm", 2, hosts=False)
    try:
        job = plain.sbatch(
            "--nodes=2",
            "--ntasks-per-node=1",
            "--output",
            tmp_path / "log",
            "--wrap",
            "srun --label env | grep -o '.: SLURMD_NODENAME=.*'",
        )
        plain.wait_until(job, "COMPLETED", seconds=60)
        shown = sorted((tmp_path / "log").read_text().splitlines())
        assert shown == ["0: SLURMD_NODENAME=node1", "1: SLURMD_NODENAME=node2"]
    finally:
        plain.stop()
    assert plain.daemons() == []
