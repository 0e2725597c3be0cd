"""metrics.jsonl and TensorBoard of a run, written by rank 0; a resumed run's curves do not fork."""

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from shards.files import write_atomic


class Metrics:
    """Scalars by step, to `run/metrics.jsonl` and `run/tensorboard`."""

    def __init__(self, run: Path, step: int) -> None:
        """Go on at `step`: rows of later steps, of a life that was cut off, are dropped."""
        self._path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, group: str, values: dict[str, float]) -> None:
        """Scalars `group/name` at `step`.

        Of a skipped step some are no number: JSON has no word for these, and other readers would
        refuse the whole file, so they are left out.
        """
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        named = {f"{group}/{name}": value for name, value in known.items()}
        self._file.write(json.dumps({"step": step} | named) + "\n")
        self._file.flush()
        for name, value in named.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a last line that a kill cut short is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def scores_at(run: Path, step: int) -> dict[str, float]:
    """The validation scores that a run has already written for `step`; empty when none."""
    for row in read_metrics(run):
        if row["step"] == step and "val/f1" in row:
            return {name[4:]: value for name, value in row.items() if name.startswith("val/")}
    return {}
