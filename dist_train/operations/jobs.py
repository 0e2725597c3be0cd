"""slurm/jobs.json: which Slurm job is to do which stage of a road."""

from pathlib import Path
from typing import Any

from dist_train.operations.road import Step
from shards.files import read_json, write_json


class Jobs:
    """The jobs of a road, by the name of the step, in its order."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the road's slurm/; nothing is known where it holds no jobs.json."""
        self.folder, self._path = folder, folder / "jobs.json"
        self.steps: dict[str, dict[str, Any]] = (
            read_json(self._path)["steps"] if self._path.exists() else {}
        )

    def know(self, steps: list[Step]) -> None:
        """Take in the steps of a road; a job of theirs that is known stays so."""
        out = self.folder.parent
        self.steps = {
            step.name: {
                "made": str(step.made.relative_to(out)), "after": list(step.after),
                "job": self.of(step.name),
            }
            for step in steps
        }  # fmt: skip
        self._write()

    def of(self, name: str) -> str:
        """The job of a step; empty when it has none."""
        return self.steps.get(name, {}).get("job", "")

    def note(self, name: str, job: str) -> None:
        """The step is to be done by `job`; on disk before the next is submitted."""
        self.steps[name]["job"] = job
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"format": 1, "steps": self.steps})
