"""How the stages below a folder stand: what is done, runs, waits, failed, and why."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.slurm import commands
from dist_train.slurm.jobs import Jobs
from shards.storage import stage_files
from shards.storage.errors import BadInput, Failed, Stopped
from shards.storage.files import read_json

BAD = ("failed", "cancelled")


class Row(NamedTuple):
    """One stage."""

    name: str
    state: str
    """done, runs, waits, stopped, failed, cancelled or not begun."""
    job: str
    why: str


def status(folder: Path) -> list[Row]:
    """The stages of a config, of what lies below `folder`, or the one that `folder` is.

    Raises BadInput when there is nothing of ours.
    """
    known = Jobs(folder / "slurm").steps
    if (folder / stage_files.STAGE).exists():
        return [_row(folder.resolve().name, folder, {})]
    found = {path.parent.name for path in folder.glob(f"*/{stage_files.STAGE}")}
    begun = [name for name in found if not _is_of(name, known)]
    if not known and not begun:
        raise BadInput(f"{folder}: no stage has begun there, and nothing was submitted")
    rows = [_row(name, folder / Path(step["made"]).parent, step) for name, step in known.items()]
    return rows + [_row(name, folder / name, {}) for name in sorted(begun, key=_age(folder))]


def check(rows: list[Row]) -> None:
    """End well only when all is done: raises Failed for what failed, Stopped while some is left."""
    bad = [row for row in rows if row.state in BAD]
    if bad:
        first = next((row for row in bad if row.state == "failed"), bad[0])
        raise Failed(f"{first.name} {first.state}: {first.why}; submit or start it again to go on")
    left = [row.name for row in rows if row.state != "done"]
    if left:
        raise Stopped(f"{len(rows) - len(left)} of {len(rows)} stages are done, not {left[0]}")


def _is_of(name: str, known: dict[str, dict[str, Any]]) -> bool:
    return any(Path(step["made"]).parent.name == name for step in known.values())


def _age(folder: Path) -> Any:
    return lambda name: (folder / name / stage_files.STAGE).stat().st_mtime_ns


def _row(name: str, folder: Path, step: dict[str, Any]) -> Row:
    path = folder / stage_files.STATUS
    said = read_json(path) if path.exists() else {}
    made = folder / Path(step.get("made", stage_files.MANIFEST)).name
    own = made.name == stage_files.MANIFEST  # evaluate and report write into another's folder
    job = step.get("job") or (said.get("job", "") if own else "")
    if made.exists():
        return Row(name, "done", job, "")
    seen = commands.seen(job) if job and not commands.missing() else commands.Seen("")
    if seen.state == "waits":
        behind = f"for {', '.join(step.get('after', []))}" if seen.why == "Dependency" else seen.why
        return Row(name, "waits", job, behind)
    if seen.state == "runs":
        return Row(name, "runs", job, ", ".join(filter(None, [seen.why, _progress(folder)])))
    return _at_rest(name, job, seen, said if own else {})


def _at_rest(name: str, job: str, seen: commands.Seen, said: dict[str, Any]) -> Row:
    """A stage that is not done and has no job that runs or waits: by its own word, then Slurm's."""
    log = f"; log: slurm/logs/{name}-{job}*.out" if job else ""
    reason, told = said.get("reason", ""), said.get("status", "")
    if told == "failed":
        return Row(name, "failed", job, (reason or seen.why) + log)
    if told == "preempted" and seen.state in ("", "done"):
        return Row(name, "stopped", job, reason + log)
    if seen.state in BAD:
        waited = "what it waited for did not end well" if "Dependency" in seen.why else seen.why
        return Row(name, seen.state, job, waited + log)
    if told == "running" and not job:
        return Row(name, "runs", "", f"on {said['host']} since {said['time']}, by its own word")
    if job:
        return Row(name, "failed", job, f"its job ended without a result ({told or 'no'} status)"
                   + log)  # fmt: skip
    return Row(name, "not begun", "", "")


def _progress(folder: Path) -> str:
    """The last step that a training has written down."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        with suppress(ValueError):  # the last one may be cut short
            return f"step {json.loads(line)['step']}"
    return ""
