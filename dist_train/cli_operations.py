"""The verbs around the stages: doctor, submit, status. Parsing and a call, as in cli.py."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dist_train.config.options import Config, Device
from shards.storage.errors import Failed

Flat = Parameter(name="*")


def doctor(*, out: Path = Path(), device: Device = "auto", json: bool = False) -> None:
    """Look at this machine: what it has, what is wrong, and how to mend it.

    Parameters
    ----------
    out
        Where the stages are to be written.
    device
        cuda: a machine without a GPU that answers is at fault.
    json
        As JSON instead of lines.
    """
    from dist_train.doctor.doctor import examine
    from dist_train.doctor.finding import as_json

    findings = examine(device, out)
    print(as_json(findings) if json else "\n".join(map(str, findings)))
    faults = sum(finding.level == "fault" for finding in findings)
    if faults:
        raise Failed(f"{faults} faults, see above")


def submit(*, config: Annotated[Config, Flat], dry_run: bool = False) -> None:
    """Take a catalogue through every stage as dependent Slurm jobs: dist-train submit CONFIG.yaml.

    Stages that are done are not submitted again, nor those whose job is still in the queue.

    Parameters
    ----------
    dry_run
        Only write the scripts, below OUT/slurm/dry-run; sbatch checks them where there is one.
    """
    from dist_train.slurm import commands
    from dist_train.slurm import submit as operation
    from dist_train.slurm.table import submitted

    print(submitted(operation.submit(config, dry_run), dry_run))
    if dry_run:
        print(
            f"not tested by sbatch: {commands.missing()}"
            if commands.missing()
            else "sbatch takes all"
        )


def status(folder: Path, /) -> None:
    """Tell what runs, waits and failed below a folder, and why.

    Exit code 0: all is done; 1: some stage failed; 3: some stage is not done yet.

    Parameters
    ----------
    folder
        OUT of a run or a submit, or one stage's folder.
    """
    from dist_train.slurm import status as operation
    from dist_train.slurm.table import standing

    rows = operation.status(folder)
    print(standing(rows))
    operation.check(rows)
