"""State of the stages below a folder: done, running, waiting or failed, and why.

slurm/jobs.json there, which submit writes, has the Slurm job of each stage.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from dist_train.slurm import commands
from dist_train.slurm.commands import JobState
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt, Failed, Stopped
from shards.storage.files import read_json, write_json

BAD = ("failed", "cancelled")


@dataclass
class Job:
    """The job of a stage."""

    result: str = ""
    """The file that exists once the stage is done, relative to OUT."""
    after: list[str] = field(default_factory=list)
    """Names of the stages that it waits for."""
    job: str = ""
    """Its number; empty if it was not submitted."""


def read_jobs(folder: Path) -> dict[str, Job]:
    """The jobs by the name of the stage, in the order of the stages; `folder` is OUT/slurm."""
    path = folder / "jobs.json"
    try:
        known = read_json(path)["stages"] if path.exists() else {}
        return {name: Job(**job) for name, job in known.items()}
    except (KeyError, TypeError, AttributeError):
        raise Corrupt(f"{path}: not as submit wrote it; remove it and submit again") from None


def write_jobs(folder: Path, jobs: dict[str, Job]) -> None:
    """Write what `read_jobs` reads."""
    stages = {name: asdict(job) for name, job in jobs.items()}
    write_json(folder / "jobs.json", {"format": 2, "stages": stages})


class Row(NamedTuple):
    """One stage."""

    name: str
    state: str
    """done, runs, waits, stopped, failed, cancelled or not begun."""
    job: str
    reason: str


def status(folder: Path) -> list[Row]:
    """The stages of a config, of what lies below `folder`, or the one that `folder` is.

    Raises BadInput if nothing has begun there and nothing was submitted.
    """
    submitted = read_jobs(folder / "slurm")
    if (folder / stage_files.STAGE).exists():
        return [_row(folder.resolve().name, folder / stage_files.MANIFEST, Job())]
    folders = {Path(job.result).parent.name for job in submitted.values()}
    begun = folder.glob(f"*/{stage_files.STAGE}")
    others = [path for path in begun if path.parent.name not in folders]
    if not submitted and not others:
        raise BadInput(f"{folder}: no stage has begun there, and nothing was submitted")
    rows = [_row(name, folder / job.result, job) for name, job in submitted.items()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns):
        rows.append(_row(path.parent.name, path.with_name(stage_files.MANIFEST), Job()))
    return rows


def check(rows: list[Row]) -> None:
    """Return if all are done; raise Failed for what failed, else Stopped."""
    bad = [row for row in rows if row.state in BAD]
    if bad:
        first = next((row for row in bad if row.state == "failed"), bad[0])
        message = f"{first.name} {first.state}: {first.reason}; submit or start it again to go on"
        raise Failed(message)
    left = [row.name for row in rows if row.state != "done"]
    if left:
        raise Stopped(f"{len(rows) - len(left)} of {len(rows)} stages are done, not {left[0]}")


def _row(name: str, result: Path, job: Job) -> Row:
    """The state of the stage whose end is the file `result`, by its status.json and by Slurm."""
    # evaluate and report write into the folder of match, whose status is not theirs.
    is_stage = result.name == stage_files.MANIFEST
    own = stage_files.read_status(result.parent) if is_stage else {}
    number = job.job or own.get("job", "")
    if result.exists():
        return Row(name, "done", number, "")
    slurm = JobState("")
    if number and not commands.missing():
        slurm = commands.job_state(number)
    if slurm.state == "waits":
        waits = f"for {', '.join(job.after)}" if slurm.reason == "Dependency" else slurm.reason
        return Row(name, "waits", number, waits)
    if slurm.state == "runs":
        metrics = result.with_name("metrics.jsonl")
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        facts = [slurm.reason]
        for line in lines[-2:]:  # the last one may be cut short
            with suppress(ValueError):
                facts[1:] = [f"step {json.loads(line)['step']}"]
        return Row(name, "runs", number, ", ".join(filter(None, facts)))

    # Not done, and no job of it runs or waits: its own status counts before Slurm's.
    log = f"; log: slurm/logs/{name}-{number}*.out" if number else ""
    reason, state = own.get("reason", ""), own.get("status", "")
    if state == "failed":
        return Row(name, "failed", number, (reason or slurm.reason) + log)
    if state == "preempted" and slurm.state in ("", "done"):
        return Row(name, "stopped", number, reason + log)
    if slurm.state in BAD:
        dependency = "Dependency" in slurm.reason
        cause = "what it waited for did not succeed" if dependency else slurm.reason
        return Row(name, slurm.state, number, cause + log)
    if state == "running" and not number:
        since = f"on {own['host']} since {own['time']}, by its own status"
        return Row(name, "runs", "", since)
    if number:
        ended = f"its job ended without a result ({state or 'no'} status)"
        return Row(name, "failed", number, ended + log)
    return Row(name, "not begun", "", "")


def in_columns(rows: list[tuple[str, ...]]) -> str:
    """The rows as lines, every column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
