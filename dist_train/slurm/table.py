"""What submit and status print."""

from dist_train.config.slurm import SlurmJob
from dist_train.slurm.status import Row
from dist_train.slurm.submit import Planned


def submitted(planned: list[Planned], dry_run: bool) -> str:
    """What was submitted, a line a stage."""
    rows: list[tuple[str, ...]] = [
        ("stage", "script" if dry_run else "job", "waits for", "asks for")
    ]
    for p in planned:
        done = p.waits_for == "done"
        job = str(p.script) if dry_run else p.job or "-"
        waits_for = "" if done else p.waits_for or "nothing"
        rows.append((p.stage.name, "done" if done else job, waits_for, _asked(p.asks)))
    return _in_columns(rows)


def _asked(asks: SlurmJob) -> str:
    words = [f"{asks.tasks} x"] if asks.tasks and asks.tasks > 1 else []
    words += [_many(asks.nodes or 1, "node"), _many(asks.processes or asks.gpus or 1, "process")]
    words += [_many(asks.gpus, "GPU")] if asks.gpus else []
    words += [_many(asks.cpus, "CPU")] if asks.cpus else []
    return " ".join([*words, *filter(None, (asks.mem, asks.time, asks.partition))])


def _many(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{plural if number > 1 else ''}"


def _in_columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def standing(rows: list[Row]) -> str:
    """How the stages stand, a line each."""
    return _in_columns([("stage", "state", "job", "why"), *rows])
