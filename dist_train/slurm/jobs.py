"""slurm/jobs.json: the Slurm job of each stage of a config."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.storage.files import read_json, write_json

FORMAT = 2


@dataclass
class Job:
    """The job of a stage."""

    result: str = ""
    """The file that exists once the stage is done, relative to OUT; empty if not known."""
    after: list[str] = field(default_factory=list)
    """Names of the stages that it waits for."""
    job: str = ""
    """Its number; empty if it was not submitted."""


def read_jobs(folder: Path) -> dict[str, Job]:
    """The jobs by the name of the stage, in the order of the stages; `folder` is OUT/slurm."""
    path = folder / "jobs.json"
    known = read_json(path)["stages"] if path.exists() else {}
    return {name: Job(**job) for name, job in known.items()}


def write_jobs(folder: Path, jobs: dict[str, Job]) -> None:
    """Write what `read_jobs` reads."""
    stages = {name: asdict(job) for name, job in jobs.items()}
    write_json(folder / "jobs.json", {"format": FORMAT, "stages": stages})
