"""slurm/jobs.json: the Slurm job of each stage of a config."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from dist_train.stage_graph import Stage
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


class Jobs:
    """The jobs of a config by the name of the stage, in the order of the stages."""

    def __init__(self, folder: Path) -> None:
        """`folder` is OUT/slurm; it may hold no jobs.json yet."""
        self.folder, self._path = folder, folder / "jobs.json"
        known = read_json(self._path)["stages"] if self._path.exists() else {}
        self.stages: dict[str, Job] = {name: Job(**job) for name, job in known.items()}

    def set_stages(self, stages: list[Stage]) -> None:
        """Record the stages of a config; those that have a job keep it."""
        out = self.folder.parent
        self.stages = {
            stage.name: Job(
                str(stage.result.relative_to(out)), list(stage.after), self.number_of(stage.name)
            )
            for stage in stages
        }
        self._write()

    def number_of(self, name: str) -> str:
        """The job of a stage; empty if it has none."""
        return self.stages.get(name, Job()).job

    def set_number(self, name: str, job: str) -> None:
        """Record the job of a stage; to be called before the next is submitted."""
        self.stages[name].job = job
        self._write()

    def _write(self) -> None:
        stages = {name: asdict(job) for name, job in self.stages.items()}
        write_json(self._path, {"format": FORMAT, "stages": stages})
