"""The tables that submit and status print."""

from dist_train.slurm.submit import Planned


def format_planned(planned: list[Planned], dry_run: bool) -> str:
    """What was submitted, or written by a dry run, a line for each stage."""
    rows: list[tuple[str, ...]] = [
        ("stage", "script" if dry_run else "job", "waits for", "resources")
    ]
    for p in planned:
        job, done = p.resources, p.waits_for == "done"
        counts = {
            "node": job.nodes or 1,
            "process": job.processes or job.gpus or 1,
            "GPU": job.gpus,
            "CPU": job.cpus,
        }
        parts = [f"{job.tasks} x"] if job.tasks and job.tasks > 1 else []
        for noun, number in counts.items():
            plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
            parts += [f"{number} {noun}{plural}"] if number else []
        resources = " ".join([*parts, *filter(None, (job.mem, job.time, job.partition))])
        place = "done" if done else str(p.script) if dry_run else p.job or "-"
        rows.append((p.stage.name, place, "" if done else p.waits_for or "nothing", resources))
    return in_columns(rows)


def in_columns(rows: list[tuple[str, ...]]) -> str:
    """The rows as lines, every column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
