"""The scripts that submit writes, what it submits again, and how status reads what it finds."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_train.config.options import Config, JoinConfig
from dist_train.config.slurm import SlurmConfig, SlurmJob
from dist_train.config.training import ImageTraining
from dist_train.distributed import stage
from dist_train.slurm import commands
from dist_train.slurm.status import check, status
from dist_train.slurm.submit import script_text, submit
from dist_train.stage_graph import stage_graph
from shards.storage import stage_files
from shards.storage.errors import BadInput, Failed, Stopped
from tests.support.catalogues import labelled_text

GOLDEN = Path(__file__).parent / "golden_sbatch"
"""To be looked at and written again (DIST_TRAIN_GOLDEN=write) when the scripts are to change."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a catalogue, worked in."""
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text(labelled_text())
    return tmp_path


PLAIN = Config(catalogue=Path("c.csv"), out=Path("runs/plain"))
FULL = replace(
    PLAIN, out=Path("runs/full"), images=Path("my photos"), columns={"posting_id": "sku"},
    compare=("untrained",), join=JoinConfig(engine="gemm"),
    slurm=SlurmConfig(
        partition="gpu", account="shop", qos="long", nodes=2, gpus=8, cpus=64, mem="400G",
        time="2-00:00:00", sbatch=("--exclude=node7", "--mail-type=FAIL"),
        setup=("module load cuda/12.4", "export HF_HUB_OFFLINE=1"),
        container="apptainer exec --nv image.sif", srun=("--mpi=none", "--cpu-bind=none"),
        max_requeues=5, stop_before=300, image=SlurmJob(nodes=4, sbatch=("--exclusive",)),
        pack=SlurmJob(partition="cpu", tasks=16, cpus=4), join=SlurmJob(tasks=32, cpus=8),
    ),
)  # fmt: skip


def scripts(config: Config) -> dict[str, str]:
    """The text of every script, without what is this machine's."""
    config.catalogue.write_text(config.catalogue.read_text().replace("posting_id", "sku"))
    config = replace(config, columns={"posting_id": "sku"})
    texts = {s.name: script_text(config, s, config.out / "slurm") for s in stage_graph(config)}
    own = {str(Path.cwd()): "{folder}", sys.prefix: "{venv}"}
    for name, text in texts.items():
        for ours, placeholder in own.items():
            text = text.replace(ours, placeholder)
        texts[name] = text
    return texts


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_scripts_are_as_they_were_looked_at(here: Path, config: Config) -> None:
    folder = GOLDEN / config.out.name
    texts = scripts(config)
    if os.environ.get("DIST_TRAIN_GOLDEN") == "write":
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / f"{name}.sbatch").write_text(text)
    assert {path.stem for path in folder.iterdir()} == texts.keys()
    for name, text in texts.items():
        assert text == (folder / f"{name}.sbatch").read_text(), name


def test_what_each_stage_waits_for(here: Path) -> None:
    after = {s.name: s.after for s in stage_graph(replace(PLAIN, compare=("random",)))}
    assert after == {
        "pack": (), "image": ("pack",), "text": ("pack",), "embedding": ("image", "text"),
        "random-image": ("pack",), "random-text": ("pack",),
        "random-embedding": ("random-image", "random-text"), "index": ("embedding",),
        "join": ("index",), "match": ("join",), "evaluate": ("match", "random-embedding"),
        "report": ("match", "evaluate"),
    }  # fmt: skip


def test_without_test_products_nothing_is_scored(here: Path) -> None:
    for rows in ("posting_id,title\n1,a\n2,b\n", "posting_id,title,label_group\n1,a,g\n2,b,g\n"):
        Path("c.csv").write_text(rows)  # g is a product to train on
        last = stage_graph(PLAIN)[-1]
        assert (last.name, last.after) == ("report", ("match",))


def test_the_options_of_a_stage_are_those_of_the_config(here: Path) -> None:
    """Read back by the verb itself, they are the same options."""
    from cyclopts import App, Parameter
    from cyclopts.config import Dict

    given = replace(PLAIN, image=ImageTraining(lr=3e-5, epochs=0.5, order="window"))
    stage = next(stage for stage in stage_graph(given) if stage.name == "image")
    app, read = App(), []

    @app.default
    def verb(*, options: ImageTraining = ImageTraining()) -> None:
        read.append(options)

    verb.__annotations__["options"] = __import__("typing").Annotated[
        ImageTraining, Parameter(name="*")
    ]
    app.config = (Dict(yaml.safe_load(stage.options_text())),)
    app([], result_action="return_value")
    assert read == [given.image]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"nodes": 0}, "nodes: 0, must be at least 1"),
        ({"sbatch": ("exclude",)}, "no option of sbatch"),
        ({"image": SlurmJob(tasks=2)}, "only for pack and join"),
        ({"tasks": 2}, "only for pack and join"),
        ({"container": "apptainer exec 'my image'"}, "quotes.*do not work"),
    ],
)
def test_what_cannot_be_asked_for(given: dict, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        SlurmConfig(**given)


def test_what_a_stage_asks_for() -> None:
    config = SlurmConfig(nodes=4, gpus=8, partition="a", sbatch=("-x",), text=SlurmJob(gpus=2),
                         evaluate=SlurmJob(partition="b"), join=SlurmJob(tasks=9))  # fmt: skip
    assert config.job("image") == SlurmJob(nodes=4, gpus=8, partition="a", sbatch=("-x",))
    assert config.job("text").gpus == 2
    assert config.job("image", one_process=True).nodes == config.job("join").nodes == 1
    assert config.job("image", one_process=True).gpus == config.job("join").gpus == 1
    evaluate = config.job("evaluate")
    assert (evaluate.nodes, evaluate.gpus, evaluate.partition) == (1, 0, "b")


def finish(folder: Path, kind: str, options: dict) -> None:
    """A stage that is done, of nothing."""
    assert not stage_files.begin(folder, kind, options, {})
    stage_files.finish(folder, {}, [])


def test_done_with_other_options_is_refused(here: Path) -> None:
    from dist_train.config.training import result_options

    finish(Path("runs/plain/image"), stage.RUN, result_options(PLAIN.image) | {"modality": "image"})
    submit(PLAIN, dry_run=True)
    changed = replace(PLAIN, image=ImageTraining(batch_size=128))
    with pytest.raises(BadInput, match=r"batch_size 64 there, 128 requested"):
        submit(changed, dry_run=True)


def test_a_machine_without_slurm_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(BadInput, match="--dry-run"):
        submit(PLAIN)
    assert not Path("runs/plain").exists()
    planned = submit(PLAIN, dry_run=True)
    assert all(p.script.is_file() for p in planned)
    assert (planned[0].script.parent / "stage.sh").is_file()


# ── status


def test_status_of_a_local_road(here: Path) -> None:
    out = Path("pipeline")
    with pytest.raises(BadInput, match="no stage has begun"):
        status(out)
    finish(out / "shards", "shard set", {})
    assert not stage_files.begin(out / "image", stage.RUN, {}, {})
    rows = status(out)
    assert [(row.name, row.state) for row in rows] == [("shards", "done"), ("image", "runs")]
    with pytest.raises(Stopped, match="1 of 2 stages are done, not image"):
        check(rows)
    stage_files.write_status(out / "image", "failed", "rank 0: no room")
    with pytest.raises(Failed, match=r"image failed: rank 0: no room"):
        check(status(out))
    stage_files.write_status(out / "image", "preempted", "stopped after step 4")
    assert status(out / "image")[0].state == "stopped"
    check(status(out / "shards"))


JOB = ("JobId=4 JobName=x Restarts={restarts} JobState={state} Reason={reason} ExitCode={code} "
       "StartTime=2026-01-01T00:00:00 NodeList=node[1-2] ")  # fmt: skip


@pytest.mark.parametrize(
    ("tasks", "state", "why"),
    [
        ([("PENDING", "Dependency", "0:0", 0)], "waits", "Dependency"),
        ([("RUNNING", "None", "0:0", 2)], "runs", "node[1-2] since 2026-01-01T00:00:00, restart 2"),
        ([("COMPLETED", "None", "0:0", 0)], "done", ""),
        ([("CANCELLED", "DependencyNeverSatisfied", "0:0", 0)], "cancelled",
         "DependencyNeverSatisfied"),
        ([("OUT_OF_MEMORY", "OutOfMemory", "0:125", 0)], "failed",
         "OUT_OF_MEMORY OutOfMemory exit code 0:125"),
        ([("COMPLETED", "None", "0:0", 0), ("FAILED", "NonZeroExitCode", "1:0", 0)], "failed",
         "1 of 2 tasks: FAILED NonZeroExitCode exit code 1:0"),
        ([("FAILED", "None", "1:0", 0), ("PENDING", "Resources", "0:0", 0)], "waits",
         "1 of 2 tasks: Resources"),
    ],
    ids=["dependency", "running", "done", "never", "memory", "array-failed", "array-waits"],
)  # fmt: skip
def test_how_a_job_stands(tasks: list, state: str, why: str) -> None:
    names = ("state", "reason", "code", "restarts")
    text = "\n".join(JOB.format(**dict(zip(names, task, strict=True))) for task in tasks)
    assert commands.parse_scontrol(text) == commands.JobState(state, why)


# ── attempts


def test_of_two_attempts_only_the_newest_may_write(tmp_path: Path, monkeypatch) -> None:
    old = stage.new_attempt()
    stage_files.begin(tmp_path, stage.RUN, {}, {})
    stage_files.write_status(tmp_path, "running", by=old)
    assert stage.newer_attempt(tmp_path, old) == ""
    new = stage.new_attempt()
    assert stage.newer_attempt(tmp_path, new, begun=False) == "", (
        "without Slurm the later one goes on"
    )
    stage_files.write_status(tmp_path, "running", by=new)
    assert "stops and writes nothing more" in stage.newer_attempt(tmp_path, old)
    (tmp_path / "status.json").unlink()
    assert "by a job that starts now" in stage.newer_attempt(tmp_path, new)


def test_a_late_attempt_of_the_same_job_does_not_take_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DIST_TRAIN_JOB", "17_3")
    attempts = []
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("DIST_TRAIN_RESTART", restart)
        attempts.append(stage.new_attempt())
    stage_files.begin(tmp_path, stage.RUN, {}, {})
    stage_files.write_status(tmp_path, "running", by=attempts[1])
    assert "Slurm job 17_3 restart 1" in stage.newer_attempt(tmp_path, attempts[0], begun=False)
    assert stage.newer_attempt(tmp_path, attempts[2], begun=False) == ""
    assert json.loads((tmp_path / "status.json").read_text())["restart"] == 1
