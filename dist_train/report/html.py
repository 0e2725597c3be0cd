"""One HTML file a person opens from disk: what was matched, how well, and which pairs."""

from pathlib import Path

import jinja2

from dist_train.evaluation.metrics import GroupSizeScore
from dist_train.report import charts
from dist_train.report.gather import Photos, ReportData, gather
from shards.storage.files import write_atomic


def write_report(matches: Path, shard_set: Photos | None = None) -> Path:
    """Write MATCHES/report.html and return its path. Errors as in `gather`."""
    target = matches / "report.html"
    write_atomic(target, render(gather(matches, shard_set)).encode())
    return target


def render(data: ReportData) -> str:
    """The page, with everything it needs inside. Text of the catalogue is always escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dist_train", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": lambda n: f"{n:,}", "fixed": _fixed, "band": _band}
    threshold = data.threshold["threshold"]
    rows = data.metrics["rows"] if data.metrics else []
    baselines = [row for row in rows if row["kind"] == "baseline"]
    return environment.get_template("page.html.j2").render(
        data=data,
        box=charts,
        curve=charts.curve_chart(data.curve, threshold) if data.curve else None,
        histogram=charts.histogram_chart(data.histogram, threshold) if data.histogram else None,
        ours=next((row for row in rows if row["kind"] == "ours"), None),
        baseline=max(baselines, key=lambda row: row["f1"], default=None),
    )


def _fixed(value: float | None, digits: int = 3) -> str:
    """A number for the page; a dash for None and NaN."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _band(row: GroupSizeScore) -> str:
    """A range of group sizes; the last one may have no end."""
    start, end = row["size_from"], row["size_to"]
    if end is None:
        return f"{start}+"
    return f"{start}" if start == end else f"{start}–{end}"
