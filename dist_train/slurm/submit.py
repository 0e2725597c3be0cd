"""The pipeline as dependent Slurm jobs: a readable script for each stage, submitted in order."""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dist_train.config.options import Config
from dist_train.config.slurm import SlurmJob
from dist_train.slurm import commands
from dist_train.slurm.status import Job, in_columns, read_jobs, write_jobs
from dist_train.stage_graph import Stage, stage_graph, trainings_left
from shards.storage.errors import BadInput
from shards.storage.files import remove_abandoned, write_atomic
from shards.storage.lock import locked
from shards.storage.stops import stops_blocked

FOLDER = "slurm"
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Planned:
    """A stage with its script and resources; its job, once it has one."""

    stage: Stage
    script: Path
    resources: SlurmJob
    job: str = ""
    waits_for: str = ""
    """Names of the stages that are not done yet, or "done" if this one is."""


def submit(config: Config, dry_run: bool = False) -> list[Planned]:
    """Write the scripts below `config.out`/slurm and submit what is neither done nor queued.

    A dry run only writes the scripts and has sbatch check them if there is a Slurm. Raises BadInput
    if a stage was done with other options or would fail for its options, labels or encoder (a dry
    run builds none), if there is no Slurm (except for a dry run), or if sbatch refuses a script.
    """
    stages = stage_graph(config)
    for stage in stages:
        stage.check_same()
    missing = commands.missing()
    if missing and not dry_run:
        raise BadInput(f"{missing}; to write only the scripts: --dry-run")
    _check_ahead(config, stages, dry_run)
    # A dry run does not overwrite what queued jobs will read.
    folder = config.out / FOLDER / ("dry-run" if dry_run else "")
    planned = []
    with locked(config.out / FOLDER / ".lock"):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        launcher = config.slurm.accelerate or PROJECT / "accelerate_config.yaml"
        copies = {"stage.sh": PROJECT / "launch/slurm/stage.sh", "accelerate.yaml": launcher}
        for name, file in copies.items():
            if not file.is_file():
                raise BadInput(f"{file}: not found; submit needs the project's complete folder")
            write_atomic(folder / name, file.read_bytes())
        for number, stage in enumerate(stages, 1):
            script = folder / f"{number:02d}-{stage.name}.sbatch"
            if stage.options is not None:
                write_atomic(folder / f"{stage.name}.yaml", stage.options_text().encode())
            write_atomic(script, script_text(config, stage, folder).encode())
            resources = config.slurm.job(stage.section, stage.one_process)
            planned.append(Planned(stage, script, resources))
        if not dry_run:
            return _submit_scripts(planned, folder)
    scripts = [] if missing else [p.script for p in planned]
    refused = [f"{script}: {why}" for script in scripts if (why := commands.refusal(script))]
    if refused:
        raise BadInput("refused by sbatch --test-only: " + "; ".join(refused))
    return [
        replace(p, waits_for="done" if p.stage.result.exists() else ", ".join(p.stage.after))
        for p in planned
    ]


def _check_ahead(config: Config, stages: list[Stage], dry_run: bool) -> None:
    """Raise BadInput for what a job would fail for hours later; encoders not for a dry run."""
    from dist_train.planning import preflight

    processes = {}
    for modality in config.encoders:
        job = config.slurm.job(modality)
        processes[modality] = (job.nodes or 1) * (job.processes or job.gpus or 1)
    preflight.check_batches(config, processes)
    if config.slurm.accelerate is not None and config.slurm.accelerate.is_file():
        given = yaml.safe_load(config.slurm.accelerate.read_text()) or {}
        strategy = given.get("distributed_type", "MULTI_GPU")
        # YAML reads NO as false.
        if strategy not in ("MULTI_GPU", "DEEPSPEED", "MULTI_CPU", "NO", False):
            raise BadInput(
                f"{config.slurm.accelerate}: distributed_type {strategy}, which dist_train does "
                "not do; take MULTI_GPU or DEEPSPEED"
            )
    preflight.check_match_files(config)
    labels = preflight.labels_of_catalogue(config)
    preflight.check_labels(config, labels)
    if not dry_run:
        preflight.check_encoders(config, trainings_left(stages), labels.postings)


def script_text(config: Config, stage: Stage, folder: Path) -> str:
    """The sbatch script of a stage, to be written to `folder`."""
    slurm, job = config.slurm, config.slurm.job(stage.section, stage.one_process)
    tasks = job.tasks or 1
    sbatch = {
        "job-name": f"{config.out.name}-{stage.name}",
        "chdir": Path.cwd(),
        "output": folder / "logs" / f"{stage.name}-{'%A_%a' if tasks > 1 else '%j'}.out",
        "open-mode": "append",
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "nodes": job.nodes or 1,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus,
        "gres": f"gpu:{job.gpus}" if job.gpus else None,
        "mem": job.mem,
        "time": job.time,
        "array": f"0-{tasks - 1}" if tasks > 1 else None,
        "signal": f"B:USR1@{slurm.stop_before}",
    }
    options = [f"--{name}={shlex.quote(str(v))}" for name, v in sbatch.items() if v is not None]
    variables = {
        "GPUS": job.processes or job.gpus or 1,
        "MAX_REQUEUES": slurm.max_requeues,
        "ACCELERATE_CONFIG": folder / "accelerate.yaml",
        "VENV": None if slurm.container else sys.prefix,
        "CONTAINER": slurm.container or None,
        "SRUN_OPTIONS": " ".join(slurm.srun) or None,
    }
    arguments = [str(argument) for argument in stage.arguments]
    if stage.options is not None:
        arguments += ["--config", str(folder / f"{stage.name}.yaml")]
    command = ""
    for argument in arguments:  # each option on its own line
        command += (" \\\n    " if argument.startswith("--") else " ") + shlex.quote(argument)
    environment = Environment(
        loader=PackageLoader("dist_train.slurm", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("job.sbatch.j2").render(
        options=[*options, "--requeue", *job.sbatch],
        title=f"{config.out.name}: {stage.name}",
        setup=slurm.setup,
        variables=[(name, shlex.quote(str(v))) for name, v in variables.items() if v is not None],
        stage=shlex.quote(str(folder / "stage.sh")),
        command=command.strip(),
    )


def _submit_scripts(planned: list[Planned], folder: Path) -> list[Planned]:
    """Submit each stage in order, unless it is done or its earlier job is still in the queue."""
    known, done, renewed, result = read_jobs(folder), set[str](), set[str](), []
    jobs = {
        p.stage.name: replace(
            known.get(p.stage.name, Job()),
            result=str(p.stage.result.relative_to(folder.parent)),
            after=list(p.stage.after),
        )
        for p in planned
    }
    write_jobs(folder, jobs)
    for p in planned:
        name, after, job = p.stage.name, p.stage.after, jobs[p.stage.name]
        waits_for = [jobs[parent].job for parent in after if parent not in done]
        if p.stage.result.exists() and not waits_for:
            done.add(name)
            result.append(replace(p, waits_for="done"))
            continue
        if job.job and commands.job_state(job.job).state not in ("waits", "runs"):
            job.job = ""
        if job.job and renewed & set(after):  # it waits for a job that is gone
            commands.run("scancel", job.job)
            job.job = ""
        if not job.job:
            with stops_blocked():  # what is submitted is recorded, before the next is
                job.job = commands.submit(p.script, waits_for)
                renewed.add(name)
                write_jobs(folder, jobs)
        result.append(replace(p, job=job.job, waits_for=", ".join(waits_for)))
    return result


def format_planned(planned: list[Planned], dry_run: bool) -> str:
    """What was submitted, or written by a dry run, a line for each stage."""
    rows: list[tuple[str, ...]] = [
        ("stage", "script" if dry_run else "job", "waits for", "resources")
    ]
    for p in planned:
        job, done = p.resources, p.waits_for == "done"
        counts = {
            "node": job.nodes or 1,
            "process": job.processes or job.gpus or 1,
            "GPU": job.gpus,
            "CPU": job.cpus,
        }
        parts = [f"{job.tasks} x"] if job.tasks and job.tasks > 1 else []
        for noun, number in counts.items():
            plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
            parts += [f"{number} {noun}{plural}"] if number else []
        resources = " ".join([*parts, *filter(None, (job.mem, job.time, job.partition))])
        place = "done" if done else str(p.script) if dry_run else p.job or "-"
        rows.append((p.stage.name, place, "" if done else p.waits_for or "nothing", resources))
    return in_columns(rows)
