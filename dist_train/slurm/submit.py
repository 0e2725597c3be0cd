"""The whole pipeline as dependent Slurm jobs: one readable script a stage, submitted in order."""

import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dist_train.config.options import Config
from dist_train.config.slurm import SlurmJob
from dist_train.slurm import commands
from dist_train.slurm.jobs import Jobs
from dist_train.stage_graph import Stage, stage_graph
from shards.storage.errors import BadInput
from shards.storage.files import write_atomic
from shards.storage.lock import locked

FOLDER = "slurm"
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Planned:
    """A stage with its script; its job, once it has one."""

    stage: Stage
    script: Path
    asks: SlurmJob
    job: str = ""
    waits_for: str = ""


def submit(config: Config, dry_run: bool = False) -> list[Planned]:
    """Write the scripts below `config.out`/slurm and submit what is neither done nor queued.

    Raises BadInput when a stage was done with other options, when there is no Slurm here (but for
    a dry run), or when sbatch refuses a script.
    """
    stages = stage_graph(config)
    for stage in stages:
        stage.check_same()
    if not dry_run and (missing := commands.missing()):
        raise BadInput(f"{missing}; the scripts alone: --dry-run")
    # A dry run leaves alone what queued jobs will read.
    folder = config.out / FOLDER / ("dry-run" if dry_run else "")
    with locked(config.out / FOLDER / ".lock"):
        planned = write_scripts(config, stages, folder)
        return _tried(planned) if dry_run else _submitted(planned, folder)


def write_scripts(config: Config, stages: list[Stage], folder: Path) -> list[Planned]:
    """One script a stage, and beside them what they start: stage.sh and the launcher's config."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    launcher = config.slurm.accelerate or PROJECT / "accelerate_config.yaml"
    for file, name in ((PROJECT / "launch/slurm/stage.sh", "stage.sh"),
                       (launcher, "accelerate.yaml")):  # fmt: skip
        if not file.is_file():
            raise BadInput(f"{file}: not found; submit needs it, and the project's folder as it is")
        write_atomic(folder / name, file.read_bytes())
    planned = []
    for number, stage in enumerate(stages, 1):
        script = folder / f"{number:02d}-{stage.name}.sbatch"
        if stage.options is not None:
            write_atomic(folder / f"{stage.name}.yaml", stage.options_text().encode())
        write_atomic(script, script_text(config, stage, folder).encode())
        planned.append(Planned(stage, script, config.slurm.job(stage.section, stage.one_process)))
    return planned


def script_text(config: Config, stage: Stage, folder: Path) -> str:
    """The sbatch script of a stage, to lie in `folder`."""
    asks = config.slurm.job(stage.section, stage.one_process)
    words = [*stage.words]
    if stage.options is not None:
        words += ["--config", str(folder / f"{stage.name}.yaml")]
    return _template().render(
        options=_options(config, stage, asks, folder), title=f"{config.out.name}: {stage.name}",
        setup=config.slurm.setup, variables=_variables(config, asks, folder),
        stage=shlex.quote(str(folder / "stage.sh")), words=_broken(words),
    )  # fmt: skip


def _options(config: Config, stage: Stage, asks: SlurmJob, folder: Path) -> list[str]:
    """What the script asks Slurm for."""
    tasks = asks.tasks or 1
    log = folder / "logs" / f"{stage.name}-{'%A_%a' if tasks > 1 else '%j'}.out"
    given = {
        "job-name": f"{config.out.name}-{stage.name}", "chdir": str(Path.cwd()),
        "output": str(log), "open-mode": "append", "partition": asks.partition,
        "account": asks.account, "qos": asks.qos, "nodes": asks.nodes or 1, "ntasks-per-node": 1,
        "cpus-per-task": asks.cpus, "gres": f"gpu:{asks.gpus}" if asks.gpus else None,
        "mem": asks.mem, "time": asks.time, "array": f"0-{tasks - 1}" if tasks > 1 else None,
        "signal": f"B:USR1@{config.slurm.stop_before}",
    }  # fmt: skip
    told = [f"--{k}={shlex.quote(str(v))}" for k, v in given.items() if v is not None]
    return [*told, "--requeue", *asks.sbatch]


def _variables(config: Config, asks: SlurmJob, folder: Path) -> list[tuple[str, str]]:
    slurm_config = config.slurm
    given = {
        "GPUS": asks.processes or asks.gpus or 1, "MAX_REQUEUES": slurm_config.max_requeues,
        "ACCELERATE_CONFIG": folder / "accelerate.yaml",
        "VENV": None if slurm_config.container else sys.prefix,
        "CONTAINER": slurm_config.container or None,
        "SRUN_OPTIONS": " ".join(slurm_config.srun) or None,
    }  # fmt: skip
    return [(name, shlex.quote(str(v))) for name, v in given.items() if v is not None]


def _broken(words: list[str]) -> str:
    """The words, an option a line."""
    text = ""
    for word in words:
        text += (" \\\n    " if word.startswith("--") else " ") + shlex.quote(word)
    return text.strip()


@cache
def _template() -> Template:
    loader = PackageLoader("dist_train.slurm", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True,
                              keep_trailing_newline=True)  # fmt: skip
    return environment.get_template("job.sbatch.j2")


def _tried(planned: list[Planned]) -> list[Planned]:
    """The scripts, each accepted by `sbatch --test-only` where there is a Slurm."""
    if not commands.missing():
        told = [f"{p.script}: {why}" for p in planned if (why := commands.refusal(p.script))]
        if told:
            raise BadInput("refused by sbatch --test-only: " + "; ".join(told))
    return [_with(p, "", "done" if p.stage.result.exists() else ", ".join(p.stage.after))
            for p in planned]  # fmt: skip


def _submitted(planned: list[Planned], folder: Path) -> list[Planned]:
    """Every stage in order: done, still in the queue from before, or submitted now."""
    jobs, found, renewed = Jobs(folder), [], set[str]()
    jobs.know([p.stage for p in planned])
    for p in planned:
        known, parents = jobs.of(p.stage.name), set(p.stage.after)
        behind = [jobs.of(name) for name in p.stage.after if not _is_done(name, found)]
        if p.stage.result.exists() and not behind:
            found.append(_with(p, "", "done"))
            continue
        if known and not commands.seen(known).is_alive:
            known = ""
        if known and parents & renewed:  # it waits for a job that is gone
            commands.cancel(known)
            known = ""
        if not known:
            known = commands.submit(p.script, behind)
            renewed.add(p.stage.name)
            jobs.note(p.stage.name, known)
        found.append(_with(p, known, ", ".join(behind)))
    return found


def _is_done(name: str, found: list[Planned]) -> bool:
    return any(p.stage.name == name and p.waits_for == "done" for p in found)


def _with(planned: Planned, job: str, waits_for: str) -> Planned:
    return Planned(planned.stage, planned.script, planned.asks, job, waits_for)
