"""The whole road as dependent Slurm jobs: one readable script a stage, submitted in order."""

import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from dist_train.cluster import SlurmJob
from dist_train.config import Config
from dist_train.operations import slurm
from dist_train.operations.jobs import Jobs
from dist_train.operations.road import Step, road, write_options
from shards.errors import BadInput
from shards.files import write_atomic
from shards.lock import locked

FOLDER = "slurm"
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Planned:
    """A step with its script; its job, once it has one."""

    step: Step
    script: Path
    asks: SlurmJob
    job: str = ""
    waits_for: str = ""


def submit(config: Config, dry_run: bool = False) -> list[Planned]:
    """Write the scripts below `config.out`/slurm and submit what is neither done nor queued.

    Raises BadInput when a stage was done with other options, when there is no Slurm here (but for
    a dry run), or when sbatch refuses a script.
    """
    steps = road(config)
    for step in steps:
        step.check_same()
    if not dry_run and (missing := slurm.missing()):
        raise BadInput(f"{missing}; the scripts alone: --dry-run")
    # A dry run leaves alone what queued jobs will read.
    folder = config.out / FOLDER / ("dry-run" if dry_run else "")
    with locked(config.out / FOLDER / ".lock"):
        planned = write_scripts(config, steps, folder)
        return _tried(planned) if dry_run else _submitted(planned, folder)


def write_scripts(config: Config, steps: list[Step], folder: Path) -> list[Planned]:
    """One script a step, and beside them what they start: stage.sh and the launcher's config."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    launcher = config.slurm.accelerate or PROJECT / "accelerate_config.yaml"
    for file, name in ((PROJECT / "launch/slurm/stage.sh", "stage.sh"),
                       (launcher, "accelerate.yaml")):  # fmt: skip
        if not file.is_file():
            raise BadInput(f"{file}: not found; submit needs it, and the project's folder as it is")
        write_atomic(folder / name, file.read_bytes())
    planned = []
    for number, step in enumerate(steps, 1):
        script = folder / f"{number:02d}-{step.name}.sbatch"
        if step.options is not None:
            write_options(step, folder / f"{step.name}.yaml")
        write_atomic(script, script_text(config, step, folder).encode())
        planned.append(Planned(step, script, config.slurm.job(step.stage, step.alone)))
    return planned


def script_text(config: Config, step: Step, folder: Path) -> str:
    """The sbatch script of a step, to lie in `folder`."""
    asks = config.slurm.job(step.stage, step.alone)
    words = [*step.words]
    if step.options is not None:
        words += ["--config", str(folder / f"{step.name}.yaml")]
    return _template().render(
        options=_options(config, step, asks, folder), title=f"{config.out.name}: {step.name}",
        setup=config.slurm.setup, variables=_variables(config, asks, folder),
        stage=shlex.quote(str(folder / "stage.sh")), words=_broken(words),
    )  # fmt: skip


def _options(config: Config, step: Step, asks: SlurmJob, folder: Path) -> list[str]:
    """What the script asks Slurm for."""
    tasks = asks.tasks or 1
    log = folder / "logs" / f"{step.name}-{'%A_%a' if tasks > 1 else '%j'}.out"
    given = {
        "job-name": f"{config.out.name}-{step.name}", "chdir": str(Path.cwd()),
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
    loader = PackageLoader("dist_train.operations", ".")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True,
                              keep_trailing_newline=True)  # fmt: skip
    return environment.get_template("job.sbatch.j2")


def _tried(planned: list[Planned]) -> list[Planned]:
    """The scripts, each accepted by `sbatch --test-only` where there is a Slurm."""
    if not slurm.missing():
        told = [f"{p.script}: {why}" for p in planned if (why := slurm.refusal(p.script))]
        if told:
            raise BadInput("refused by sbatch --test-only: " + "; ".join(told))
    return [_with(p, "", "done" if p.step.made.exists() else ", ".join(p.step.after))
            for p in planned]  # fmt: skip


def _submitted(planned: list[Planned], folder: Path) -> list[Planned]:
    """Every step in order: done, still in the queue from before, or submitted now."""
    jobs, found, renewed = Jobs(folder), [], set[str]()
    jobs.know([p.step for p in planned])
    for p in planned:
        known, parents = jobs.of(p.step.name), set(p.step.after)
        behind = [jobs.of(name) for name in p.step.after if not _is_done(name, found)]
        if p.step.made.exists() and not behind:
            found.append(_with(p, "", "done"))
            continue
        if known and not slurm.seen(known).is_alive:
            known = ""
        if known and parents & renewed:  # it waits for a job that is gone
            slurm.cancel(known)
            known = ""
        if not known:
            known = slurm.submit(p.script, behind)
            renewed.add(p.step.name)
            jobs.note(p.step.name, known)
        found.append(_with(p, known, ", ".join(behind)))
    return found


def _is_done(name: str, found: list[Planned]) -> bool:
    return any(p.step.name == name and p.waits_for == "done" for p in found)


def _with(planned: Planned, job: str, waits_for: str) -> Planned:
    return Planned(planned.step, planned.script, planned.asks, job, waits_for)
