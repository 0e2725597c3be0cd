"""The verbs over a complete pipeline or this machine: demo, run, plan, submit, status, doctor."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dist_train.config.options import Config
from dist_train.config.training import Device
from shards.storage.errors import Failed

Flat = Parameter(name="*")


def demo(*, out: Path = Path("demo"), items: int = 2000) -> None:
    """Generate a catalogue and run every stage on it: minutes on a laptop, without a network.

    Prints scores and writes OUT/matches/report.html.

    Args:
        out: Folder for the catalogue and all stages. The same command resumes where it stopped.
        items: Number of postings to generate.
    """
    from dist_train.synthetic.demo import demo_config

    run_stages(demo_config(out, items))


def run(*, config: Annotated[Config, Flat]) -> None:
    """Run every stage on this machine, from the catalogue to the report: run CONFIG.yaml.

    The same command resumes where it stopped; stages that are done are not repeated.
    """
    run_stages(config)


def run_stages(config: Config) -> None:
    """Run the pipeline; print its scores, and where the report is."""
    from dist_train import stage_graph
    from dist_train.evaluation.scores import score_table

    scores = stage_graph.run(config)
    if scores is not None:
        print(score_table(scores))
    print(f"report: {config.out / 'matches' / 'report.html'}")


def plan(*, config: Annotated[Config, Flat], processes: int = 0, json: bool = False) -> None:
    """Estimate time, memory and disk of each stage on this machine: plan CONFIG.yaml.

    Prints seconds, memory of one process and bytes on disk, from rates that it measures on a sample
    of the catalogue; nothing is written to OUT. A stage that needs more than is free is listed with
    the option that makes it fit; the exit code is then 1.

    Args:
        processes: Processes that accelerate launch will start on this machine. 0: one for each GPU,
            one if there is none.
        json: Print JSON instead of a table.
    """
    from dataclasses import asdict
    from json import dumps

    from dist_train.planning.plan import plan as plan_stages

    estimate = plan_stages(config, processes)
    print(dumps(asdict(estimate), indent=1, ensure_ascii=False) if json else estimate)
    if estimate.misfits:
        raise Failed(f"{len(estimate.misfits)} things do not fit, see above")


def submit(*, config: Annotated[Config, Flat], dry_run: bool = False) -> None:
    """Submit every stage as a Slurm job that waits for those before it: submit CONFIG.yaml.

    Stages that are done, or whose job is still in the queue, are not submitted again.

    Args:
        dry_run: Submit nothing: write the scripts to OUT/slurm/dry-run and, if sbatch is installed,
            check them with sbatch --test-only.
    """
    from dist_train.slurm import commands
    from dist_train.slurm import submit as slurm

    print(slurm.format_planned(slurm.submit(config, dry_run), dry_run))
    if dry_run:
        missing = commands.missing()
        print(f"not checked by sbatch: {missing}" if missing else "sbatch accepts all scripts")


def status(folder: Path, /) -> None:
    """Show which stages in a folder are done, running, waiting or failed, and why.

    The exit code is 0 if all are done, 1 if one has failed, else 3.

    Args:
        folder: The folder that run or submit writes to (OUT), or the folder of one stage.
    """
    from dist_train.slurm import status as slurm

    rows = slurm.status(folder)
    print(slurm.in_columns([("stage", "state", "job", "why"), *rows]))
    slurm.check(rows)


def doctor(*, out: Path = Path(), device: Device = "auto", json: bool = False) -> None:
    """Check this machine and report every problem with its fix.

    Checks the installed packages, GPU, memory, disk, limits, ports, clock, network and Slurm. The
    exit code is 1 if something would keep work from running.

    Args:
        out: Folder that you will write to; space and speed of its disk are checked.
        device: Device that you will use. cuda: a missing or broken GPU is a fault.
        json: Print JSON instead of lines.
    """
    from dataclasses import asdict
    from json import dumps

    from dist_train.doctor.doctor import examine

    findings = examine(device, out)
    faults = sum(finding.level == "fault" for finding in findings)
    if json:
        rows = [asdict(finding) for finding in findings]
        print(dumps({"fine": not faults, "findings": rows}, indent=1, ensure_ascii=False))
    else:
        print(*findings, sep="\n")
    if faults:
        raise Failed(f"{faults} faults, see above")
