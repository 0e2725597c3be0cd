"""slurm/jobs.json: which Slurm job is to do which stage of a config."""

from pathlib import Path
from typing import Any

from dist_train.stage_graph import Stage
from shards.storage.files import read_json, write_json


class Jobs:
    """The jobs of a config, by the name of the stage, in its order."""

    def __init__(self, folder: Path) -> None:
        """`folder` is OUT/slurm; nothing is known where it holds no jobs.json."""
        self.folder, self._path = folder, folder / "jobs.json"
        self.steps: dict[str, dict[str, Any]] = (
            read_json(self._path)["steps"] if self._path.exists() else {}
        )

    def know(self, stages: list[Stage]) -> None:
        """Take in the stages of a config; a job of theirs that is known stays so."""
        out = self.folder.parent
        self.steps = {
            stage.name: {
                "made": str(stage.result.relative_to(out)),
                "after": list(stage.after),
                "job": self.of(stage.name),
            }
            for stage in stages
        }
        self._write()

    def of(self, name: str) -> str:
        """The job of a stage; empty when it has none."""
        return self.steps.get(name, {}).get("job", "")

    def note(self, name: str, job: str) -> None:
        """The stage is to be done by `job`; on disk before the next is submitted."""
        self.steps[name]["job"] = job
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"format": 1, "steps": self.steps})
