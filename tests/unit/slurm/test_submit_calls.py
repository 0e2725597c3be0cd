"""What submit and status tell and ask of Slurm, by programs that write it down."""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dist_train.config.options import Config, EmbedConfig, JoinConfig, MatchConfig
from dist_train.config.training import (
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
    result_options,
)
from dist_train.distributed import stage
from dist_train.slurm import commands
from dist_train.slurm.submit import submit
from shards.storage import stage_files
from shards.storage.errors import BadInput, Failed
from shards.storage.lock import locked
from shards.storage.stops import stops_interrupt
from tests.support.catalogues import labelled_text
from tests.support.recorded_programs import Programs, call_verb

OUT = Path("runs/pipeline")
PIPELINE = Config(
    catalogue=Path("c.csv"), out=OUT,
    image=ImageTraining(encoder=ImageEncoderOptions(model="vit", image_size=32)),
    text=TextTraining(encoder=TextEncoderOptions(model="bert")),
)  # fmt: skip
WEIGHTS = {"weights": {"image": 0.5, "text": 0.5}}
STAGES = ["pack", "image", "text", "embedding", "index", "join", "match", "evaluate", "report"]
SBATCH = """
if [[ $1 == --test-only ]]; then
    [[ ! -e $here/refuse || ${!#} != *$(<"$here/refuse")* ]] || { echo 'not
        here' >&2; exit 1; }
    exit 0
fi
if [[ -e $here/refuse && ${!#} == *$(<"$here/refuse")* ]]; then echo 'no such
    partition' >&2; exit 1; fi
if [[ -e $here/interrupt ]]; then rm "$here/interrupt"; kill -INT $PPID; sleep 0.2; fi
count=$(($(cat "$here/count" 2>/dev/null || echo 0) + 1))
echo "$count" >"$here/count"
echo "$count${CLUSTER:-}"
"""
SCONTROL = """
case $1 in
ping) [[ ! -e $here/down ]] ;;
--oneliner)
    if [[ -e $here/busy ]]; then echo 'Unable to contact
        slurm controller' >&2; exit 1; fi
    cat "$here/job-${!#}" 2>/dev/null || { echo 'Invalid job id specified' >&2; exit 1; } ;;
esac
"""
JOB = ("JobId={job} JobName=x Restarts={restarts} JobState={state} Reason={reason} "
       "ExitCode={code} StartTime=2026-01-01T00:00:00 NodeList=node[1-2] \n")  # fmt: skip


class Scheduler(Programs):
    """A Slurm that answers what a test says, and writes down what it is asked."""

    def has(self, job: str, state: str, reason: str = "None", code: str = "0:0",
            restarts: int = 0) -> None:  # fmt: skip
        """It knows a job."""
        text = JOB.format(job=job, state=state, reason=reason, code=code, restarts=restarts)
        (self.bin / f"job-{job}").write_text(text)

    def submitted(self) -> dict[str, tuple[str, ...]]:
        """Name of the stage to the options it was submitted with, in order."""
        calls = [words[1:] for words in self.calls("sbatch") if "--test-only" not in words]
        assert all(words[0] == "--parsable" for words in calls)
        return {Path(words[-1]).stem[3:]: tuple(words[1:-1]) for words in calls}


pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")


@pytest.fixture
def scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_vit: Path, tiny_bert: Path
) -> Scheduler:
    """Before all others on PATH; a catalogue and two models lie in the folder worked in."""
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text(labelled_text())
    Path("vit").symlink_to(tiny_vit)
    Path("bert").symlink_to(tiny_bert)
    found = Scheduler(tmp_path / "bin")
    found.add("sbatch", SBATCH)
    found.add("scontrol", SCONTROL)
    found.add("scancel")
    found.add("sacct", 'cat "$here/accounts" 2>/dev/null')
    monkeypatch.setenv("PATH", found.path)
    return found


def jobs() -> dict[str, str]:
    """The job of every stage, as written on disk."""
    steps = json.loads((OUT / "slurm/jobs.json").read_text())["stages"]
    return {name: step["job"] for name, step in steps.items()}


def after(*numbers: int) -> tuple[str, ...]:
    """The options of a job that begins when these have ended well, and goes when they have not."""
    return "--kill-on-invalid-dep=yes", "--dependency=afterok:" + ":".join(map(str, numbers))


def finish(name: str, kind: str, options: object = None, **more: object) -> None:
    """A stage of the pipeline that is done, of nothing."""
    stage_files.begin(OUT / name, kind, (result_options(options) if options else {}) | more, {})
    stage_files.finish(OUT / name, {}, [])


# ── submit


def test_a_job_that_is_submitted_as_a_signal_comes_is_not_submitted_again(
    scheduler: Scheduler,
) -> None:
    """Interrupted as every verb is, in a process whose other threads receive signals too."""
    (scheduler.bin / "interrupt").touch()
    with pytest.raises(KeyboardInterrupt), stops_interrupt():
        submit(PIPELINE)
    assert jobs()["pack"] == "1"
    scheduler.has("1", "PENDING")
    scheduler.forget()
    submit(PIPELINE)
    assert list(scheduler.submitted()) == STAGES[1:]


def test_every_job_waits_for_the_good_end_of_what_it_reads(scheduler: Scheduler) -> None:
    """afterok, not afterany: a stage must not begin on what has failed."""
    planned = submit(PIPELINE)
    wanted = {
        "pack": (), "image": after(1), "text": after(1), "embedding": after(2, 3),
        "index": after(4), "join": after(5), "match": after(6), "evaluate": after(7),
        "report": after(7, 8),
    }  # fmt: skip
    assert scheduler.submitted() == wanted
    assert list(scheduler.submitted()) == STAGES
    assert jobs() == {name: str(number) for number, name in enumerate(STAGES, 1)}
    assert [p.job for p in planned] == list(jobs().values())
    assert [p.waits_for for p in planned] == [
        "", "1", "1", "2, 3", "4", "5", "6", "7", "7, 8"
    ]  # fmt: skip
    steps = json.loads((OUT / "slurm/jobs.json").read_text())["stages"]
    assert steps["embedding"]["result"] == "embedding/manifest.json"
    assert steps["embedding"]["after"] == ["image", "text"]
    scripts = [Path(words[-1]).name for words in scheduler.calls("sbatch")]
    assert scripts[0] == "01-pack.sbatch"
    assert scripts[-1] == "09-report.sbatch"
    assert not scheduler.calls("scancel")


def test_other_encoders_are_compared_by_jobs_of_their_own(scheduler: Scheduler) -> None:
    submit(replace(PIPELINE, encoders=("image",), compare=("random",)))
    wanted = {
        "pack": (), "image": after(1), "embedding": after(2), "random-image": after(1),
        "random-embedding": after(4), "index": after(3), "join": after(6),
        "match": after(7), "evaluate": after(8, 5), "report": after(8, 9),
    }  # fmt: skip
    assert scheduler.submitted() == wanted


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_a_job_that_is_alive_is_not_doubled(scheduler: Scheduler, state: str) -> None:
    submit(PIPELINE)
    for number in range(1, 10):
        scheduler.has(str(number), state)
    before = jobs()
    scheduler.forget()
    assert [p.job for p in submit(PIPELINE)] == list(before.values())
    assert scheduler.submitted() == {}
    assert not scheduler.calls("scancel")
    assert jobs() == before


@pytest.mark.parametrize("is_alive", [True, False])
def test_what_waits_for_a_renewed_job_is_renewed(scheduler: Scheduler, is_alive: bool) -> None:
    """Its old dependency would be on a job that is gone; the others keep theirs."""
    submit(PIPELINE)
    scheduler.has("1", "RUNNING")
    scheduler.has("2", "FAILED", "NonZeroExitCode", "1:0")
    scheduler.has("3", "PENDING", "Dependency")
    for number in range(4, 10):
        reason = "Dependency" if is_alive else "DependencyNeverSatisfied"
        scheduler.has(str(number), "PENDING" if is_alive else "CANCELLED", reason)
    scheduler.forget()
    submit(PIPELINE)
    assert scheduler.submitted() == {
        "image": after(1), "embedding": after(10, 3), "index": after(11), "join": after(12),
        "match": after(13), "evaluate": after(14), "report": after(14, 15),
    }  # fmt: skip
    gone = [words[1:] for words in scheduler.calls("scancel")]
    assert gone == ([["4"], ["5"], ["6"], ["7"], ["8"], ["9"]] if is_alive else [])
    assert list(jobs().values()) == ["1", "10", "3", "11", "12", "13", "14", "15", "16"]
    if is_alive:  # an old one must be gone before the new one, which writes the same folder
        told = scheduler.calls("scancel", "sbatch")
        at = told.index(["scancel", "4"])
        assert told[at + 1][-1].endswith("04-embedding.sbatch")


def test_what_is_done_is_not_submitted_and_not_waited_for(scheduler: Scheduler) -> None:
    finish("shards", "shard set", PIPELINE.pack)
    finish("image", stage.RUN, PIPELINE.image, modality="image")
    planned = submit(PIPELINE)
    assert [(p.waits_for, p.job) for p in planned[:2]] == [("done", ""), ("done", "")]
    assert scheduler.submitted() == {
        "text": (), "embedding": after(1), "index": after(2), "join": after(3),
        "match": after(4), "evaluate": after(5), "report": after(5, 6),
    }  # fmt: skip
    assert jobs()["pack"] == jobs()["image"] == ""


def test_what_is_done_is_submitted_again_behind_what_is_not(scheduler: Scheduler) -> None:
    """metrics.json of matches that are made anew is not what the report is to show."""
    (OUT / "matches").mkdir(parents=True)
    (OUT / "matches" / "metrics.json").write_text("{}")
    submit(PIPELINE)
    assert scheduler.submitted()["evaluate"] == after(7)


def test_a_job_is_on_disk_before_the_next_is_submitted(scheduler: Scheduler) -> None:
    (scheduler.bin / "refuse").write_text("03-text")
    with pytest.raises(BadInput, match=r"03-text\.sbatch: refused by sbatch \(no such partition\)"):
        submit(PIPELINE)
    assert {name: job for name, job in jobs().items() if job} == {"pack": "1", "image": "2"}
    (scheduler.bin / "refuse").unlink()
    scheduler.has("1", "PENDING")
    scheduler.has("2", "PENDING", "Dependency")
    scheduler.forget()
    submit(PIPELINE)
    assert list(scheduler.submitted()) == STAGES[2:]
    assert scheduler.submitted()["text"] == after(1)


def test_a_job_of_a_cluster_among_several_is_its_number(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER", ";west")
    submit(PIPELINE)
    assert jobs()["embedding"] == "4"
    assert scheduler.submitted()["embedding"] == after(2, 3)


def test_two_submits_wait_for_each_other(scheduler: Scheduler) -> None:
    with locked(OUT / "slurm" / ".lock"):
        other = threading.Thread(target=submit, args=(PIPELINE,), daemon=True)
        other.start()
        time.sleep(0.3)
        assert scheduler.submitted() == {}
        assert not (OUT / "slurm" / "jobs.json").exists()
    other.join(60)
    assert list(scheduler.submitted()) == STAGES


def test_a_dry_run_only_has_the_scripts_tested(scheduler: Scheduler) -> None:
    planned = submit(PIPELINE, dry_run=True)
    assert [words[1:2] for words in scheduler.calls("sbatch")] == [["--test-only"]] * 9
    assert [words[2] for words in scheduler.calls("sbatch")] == [str(p.script) for p in planned]
    assert {p.script.parent for p in planned} == {OUT / "slurm" / "dry-run"}
    assert not scheduler.calls("scancel")
    assert not list(OUT.rglob("jobs.json"))
    assert [p.waits_for for p in planned[3:5]] == ["image, text", "embedding"]
    (scheduler.bin / "refuse").write_text("image")
    with pytest.raises(BadInput, match=r"sbatch --test-only: .*02-image\.sbatch: not here$"):
        submit(PIPELINE, dry_run=True)


def test_a_controller_that_is_down_gets_nothing(scheduler: Scheduler) -> None:
    (scheduler.bin / "down").touch()
    with pytest.raises(BadInput, match=r"scontrol ping\); to write only the scripts: --dry-run"):
        submit(PIPELINE)
    assert not scheduler.calls("sbatch")
    assert not OUT.exists()
    submit(PIPELINE, dry_run=True)
    assert not scheduler.calls("sbatch")


def test_other_options_than_what_is_done_are_refused_before_anything(scheduler: Scheduler) -> None:
    finish("embedding", stage.EMBEDDING, PIPELINE.embed)
    with pytest.raises(BadInput, match="dtype 'float16' there, 'float32' requested"):
        submit(replace(PIPELINE, embed=EmbedConfig(dtype="float32")))
    assert not scheduler.calls("sbatch")
    assert not (OUT / "slurm").exists()


# ── how a job stands


@pytest.mark.parametrize(
    ("accounts", "found"),
    [
        ("COMPLETED|0:0|None\n", ("done", "")),
        ("FAILED|1:0|NonZeroExitCode\n", ("failed", "FAILED NonZeroExitCode exit code 1:0")),
        ("CANCELLED by 1000|0:15|None\n", ("cancelled", "by scancel")),
        ("RUNNING|0:0|None\n", ("runs", "")),
        ("COMPLETED|0:0|None\nTIMEOUT|0:0|TimeLimit\n",
         ("failed", "1 of 2 tasks: TIMEOUT TimeLimit exit code 0:0")),
        ("", ("", "")),
    ],
)  # fmt: skip
def test_a_job_that_the_controller_forgot_is_asked_of_the_accounts(
    scheduler: Scheduler, accounts: str, found: tuple[str, str]
) -> None:
    (scheduler.bin / "accounts").write_text(accounts)
    assert tuple(commands.job_state("31")) == found
    assert scheduler.calls() == [
        ["scontrol", "--oneliner", "show", "job", "31"],
        ["sacct", "-n", "-P", "-X", "-j", "31", "-o", "State,ExitCode,Reason"],
    ]


def test_a_controller_that_does_not_answer_is_no_lost_job(scheduler: Scheduler) -> None:
    (scheduler.bin / "busy").touch()
    said = r"scontrol show job 31: Unable to contact slurm controller; is Slurm's controller up\?"
    with pytest.raises(Failed, match=said):
        commands.job_state("31")
    assert not scheduler.calls("sacct")


def test_a_job_is_forgotten_where_there_are_no_accounts(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scheduler.bin / "sacct").unlink()
    (scheduler.bin / "cat").symlink_to(shutil.which("cat") or "")
    (scheduler.bin / "bash").symlink_to(shutil.which("bash") or "")
    (scheduler.bin / "env").symlink_to(shutil.which("env") or "")
    monkeypatch.setenv("PATH", str(scheduler.bin))
    assert tuple(commands.job_state("31")) == ("", "")


def test_a_command_that_is_missing_or_hangs_is_named(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.add("scancel", "exec sleep 30")
    monkeypatch.setattr(commands, "PATIENCE", 0.2)
    with pytest.raises(Failed, match=r"scancel 7: no answer within 0.2 s"):
        commands.run("scancel", "7")
    (scheduler.bin / "scancel").unlink()
    monkeypatch.setenv("PATH", str(scheduler.bin))
    with pytest.raises(BadInput, match="scancel: not on this machine"):
        commands.run("scancel", "7")


STATES = {
    "waits": ["PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
              "RESV_DEL_HOLD"],
    "runs": ["RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING",
             "SIGNALING", "STAGE_OUT"],
    "done": ["COMPLETED"], "cancelled": ["CANCELLED"],
    "failed": ["FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
               "OUT_OF_MEMORY", "REVOKED"],
}  # fmt: skip
"""Of the section JOB STATE CODES of squeue(1), Slurm 22.05."""


@pytest.mark.parametrize(
    ("wanted", "state"), [(ours, state) for ours, states in STATES.items() for state in states]
)
def test_every_state_of_slurm(wanted: str, state: str) -> None:
    text = JOB.format(job=1, state=state, reason="None", code="0:0", restarts=0)
    assert commands.parse_scontrol(text).state == wanted


def test_of_tasks_the_worst_counts_once_none_is_left() -> None:
    def of(*states: str) -> str:
        jobs = (JOB.format(job=1, state=s, reason="None", code="0:0", restarts=0) for s in states)
        return commands.parse_scontrol("".join(jobs)).state

    assert of("PENDING", "RUNNING", "FAILED") == "runs"
    assert of("COMPLETED", "PENDING", "FAILED") == "waits"
    assert of("COMPLETED", "CANCELLED", "FAILED") == "failed"
    assert of("COMPLETED", "CANCELLED") == "cancelled"
    assert of("COMPLETED", "COMPLETED") == "done"
    assert of() == ""


# ── status


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The verb status on a folder: its exit code, a row a stage, what it says of errors."""

    def run(folder: Path) -> tuple[int, dict[str, list[str]], str]:
        code, out, err = call_verb(monkeypatch, capfd, "status", folder)
        lines = out.splitlines()
        # Columns of equal width: a name, the state of two words at most, the job, and why.
        at = [lines[0].index(name) for name in ("stage", "state", "job", "why")] if lines else []
        cells = [[line[a:b].strip() for a, b in zip(at, [*at[1:], None], strict=True)]
                 for line in lines[1:]]  # fmt: skip
        return code, {row[0]: row[1:] for row in cells}, err

    return run


def submitted_pipeline(**states: tuple[str, ...]) -> None:
    """jobs.json of a pipeline of these stages, each with its job number and what it waits for."""
    steps = {
        name: {"result": f"{name}/manifest.json", "job": job, "after": list(behind)}
        for name, (job, *behind) in states.items()
    }
    (OUT / "slurm").mkdir(parents=True)
    (OUT / "slurm/jobs.json").write_text(json.dumps({"format": 2, "stages": steps}))


def test_status_ends_well_only_when_all_is_done(scheduler: Scheduler, told) -> None:
    """3 while one waits, runs, has stopped or has not begun; 1 when one failed or was cancelled."""
    submitted_pipeline(shards=("1",), image=("2", "shards"))
    finish("shards", "shard set")
    scheduler.has("2", "PENDING", "Dependency")
    code, rows, err = told(OUT)
    assert rows == {"shards": ["done", "1", ""], "image": ["waits", "2", "for shards"]}
    assert code == 3
    assert "1 of 2 stages are done, not image" in err
    scheduler.has("2", "PENDING", "Priority")
    assert told(OUT)[:2] == (3, rows | {"image": ["waits", "2", "Priority"]})
    scheduler.has("2", "RUNNING", restarts=1)
    since = "node[1-2] since 2026-01-01T00:00:00, restart 1"
    assert told(OUT)[:2] == (3, rows | {"image": ["runs", "2", since]})
    finish("image", stage.RUN)
    code, rows, err = told(OUT)
    assert (code, err) == (0, "")
    assert [row[0] for row in rows.values()] == ["done", "done"]


def test_status_of_stages_that_have_not_begun(scheduler: Scheduler, told) -> None:
    submitted_pipeline(shards=("",), image=("", "shards"))
    code, rows, err = told(OUT)
    assert code == 3
    assert rows == {"shards": ["not begun", "", ""], "image": ["not begun", "", ""]}
    assert "0 of 2 stages are done, not shards" in err


def test_a_running_stage_tells_its_last_step(scheduler: Scheduler, told) -> None:
    submitted_pipeline(image=("2",))
    scheduler.has("2", "RUNNING")
    stage_files.begin(OUT / "image", stage.RUN, {}, {})
    (OUT / "image/metrics.jsonl").write_text('{"step": 1}\n{"step": 20}\n{"step": 2')
    assert told(OUT)[1]["image"][2] == "node[1-2] since 2026-01-01T00:00:00, step 20"


@pytest.mark.parametrize(
    ("own", "slurms", "code", "state", "why"),
    [
        (None, "COMPLETED", 1, "failed", "its job ended without a result (no status)"),
        ("running", "COMPLETED", 1, "failed", "its job ended without a result (running status)"),
        ("preempted", "COMPLETED", 3, "stopped", "a reason"),
        ("preempted", None, 3, "stopped", "a reason"),
        ("preempted", "FAILED", 1, "failed", "FAILED exit code 3:0"),
        ("preempted", "CANCELLED", 1, "cancelled", "by scancel"),
        ("failed", "FAILED", 1, "failed", "a reason"),
        ("failed", "COMPLETED", 1, "failed", "a reason"),
        (None, "CANCELLED DependencyNeverSatisfied", 1, "cancelled",
         "what it waited for did not succeed"),
        ("running", "PENDING", 3, "waits", ""),
        ("failed", "PENDING", 3, "waits", ""),
        (None, "TIMEOUT", 1, "failed", "TIMEOUT exit code 3:0"),
    ],
)  # fmt: skip
def test_a_stage_by_its_own_word_and_slurms(
    scheduler: Scheduler, told, own: str | None, slurms: str | None, code: int, state: str, why: str
) -> None:
    submitted_pipeline(image=("2",))
    if own:
        stage_files.begin(OUT / "image", stage.RUN, {}, {})
        stage_files.write_status(OUT / "image", own, "a reason")
    if slurms:
        name, _, reason = slurms.partition(" ")
        scheduler.has("2", name, reason or "None", "3:0")
    found, rows, err = told(OUT)
    assert (found, rows["image"][0]) == (code, state)
    logs = "; log: slurm/logs/image-2*.out" if state in ("failed", "cancelled", "stopped") else ""
    assert rows["image"][2] == (f"{why}{logs}" if state != "waits" else "None")
    if code == 1:
        assert f"image {state}: {why}" in err
        assert "start it again to go on" in err


def test_status_names_what_failed_before_what_was_cancelled_for_it(
    scheduler: Scheduler, told
) -> None:
    submitted_pipeline(text=("3",), image=("2",))
    scheduler.has("3", "CANCELLED", "DependencyNeverSatisfied")
    scheduler.has("2", "FAILED", "NonZeroExitCode", "1:0")
    code, _, err = told(OUT)
    assert code == 1
    assert "image failed" in err


def test_what_is_done_is_done_whatever_slurm_says(scheduler: Scheduler, told) -> None:
    submitted_pipeline(image=("2",))
    scheduler.has("2", "FAILED")
    finish("image", stage.RUN)
    assert told(OUT)[0] == 0
    assert not scheduler.calls()


def test_evaluate_and_report_are_done_by_what_they_write(scheduler: Scheduler, told) -> None:
    """They have no folder of their own: the status there is that of the matches."""
    submit(PIPELINE)
    stage_files.begin(OUT / "matches", stage.MATCHES, {}, {})
    stage_files.write_status(OUT / "matches", "failed", "no room")
    for number in range(1, 10):
        scheduler.has(str(number), "COMPLETED")
    rows = told(OUT)[1]
    assert rows["match"][2].startswith("no room")
    assert rows["evaluate"][2].startswith("its job ended without a result (no status)")
    for name in ("metrics.json", "report.html"):
        (OUT / "matches" / name).touch()
    rows = told(OUT)[1]
    assert [rows[name][0] for name in ("match", "evaluate", "report")] == ["failed", "done", "done"]


def test_status_of_one_stage_and_of_others_beside_the_pipeline(scheduler: Scheduler, told) -> None:
    submitted_pipeline(image=("2",))
    finish("image", stage.RUN)
    finish("by-hand", stage.RUN)
    time.sleep(0.01)
    stage_files.begin(OUT / "alone", stage.RUN, {}, {})
    code, rows, _ = told(OUT)
    assert code == 3
    assert [(name, row[0]) for name, row in rows.items()] == [
        ("image", "done"), ("by-hand", "done"), ("alone", "runs"),
    ]  # fmt: skip
    assert told(OUT / "image")[0] == 0
    code, rows, _ = told(OUT / "alone")
    assert (code, list(rows)) == (3, ["alone"])
    assert rows["alone"][2].startswith("on ")
    # Under Slurm the stage itself says whose it is.
    stage_files.write_status(OUT / "alone", "running", by={"job": "77"})
    scheduler.has("77", "TIMEOUT")
    assert told(OUT / "alone")[1]["alone"][:2] == ["failed", "77"]


def finish_pairs(floor: float, options: JoinConfig) -> None:
    """Pairs that are done, of nothing, down to a score floor."""
    stage_files.begin(OUT / "pairs", stage.PAIRS, result_options(options), {})
    (OUT / "pairs" / "proof.json").write_text(json.dumps({"score_floor": floor, "weights": {}}))
    stage_files.finish(OUT / "pairs", {}, [OUT / "pairs" / "proof.json"])


def options_in(name: str) -> dict[str, object]:
    """What a job of the dry run reads."""
    return yaml.safe_load((OUT / "slurm" / "dry-run" / f"{name}.yaml").read_text())


def test_a_threshold_from_a_file_is_read_when_the_jobs_are_made(scheduler: Scheduler) -> None:
    """Later the file may be gone, or another: the jobs are given the number."""
    given = replace(PIPELINE, match=MatchConfig(threshold_from=Path("t.json")))
    with pytest.raises(BadInput, match=r"t\.json"):
        submit(given, dry_run=True)
    Path("t.json").write_text(json.dumps({"threshold": 0.7} | WEIGHTS))
    submit(given, dry_run=True)
    match = options_in("match")
    assert (match["threshold"], match.get("threshold_from")) == (0.7, None)
    finish("matches", stage.MATCHES, MatchConfig(threshold=0.7))
    submit(given, dry_run=True)
    Path("t.json").write_text(json.dumps({"threshold": 0.5} | WEIGHTS))
    with pytest.raises(BadInput, match=r"threshold 0\.7 there, 0\.5 requested"):
        submit(given, dry_run=True)


@pytest.mark.parametrize(
    ("limit", "threshold", "wanted"),
    [(None, None, None), (None, 0.7, 0.7), (0.6, 0.7, 0.6), (0.8, 0.7, 0.7), (0.6, None, 0.6)],
)
def test_the_join_keeps_all_pairs_from_a_given_threshold_on(
    scheduler: Scheduler, limit: float | None, threshold: float | None, wanted: float | None
) -> None:
    given = replace(
        PIPELINE, join=JoinConfig(max_score_floor=limit), match=MatchConfig(threshold=threshold)
    )
    submit(given, dry_run=True)
    assert options_in("join").get("max_score_floor") == wanted


def test_finished_pairs_serve_every_threshold_that_they_reach(scheduler: Scheduler) -> None:
    finish_pairs(0.45, JoinConfig(max_score_floor=0.6))
    for threshold in (0.5, 0.45, 0.9, None):
        submit(replace(PIPELINE, match=MatchConfig(threshold=threshold)), dry_run=True)
        assert options_in("join")["max_score_floor"] == 0.6
    with pytest.raises(
        BadInput, match=r"pairs: was begun .*max_score_floor 0\.6 there, 0\.4 requested"
    ):
        submit(replace(PIPELINE, match=MatchConfig(threshold=0.4)), dry_run=True)
