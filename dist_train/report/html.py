"""One HTML file a person opens from disk: what was matched, how well, and which pairs."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dist_train.decisions.match_lists import read_matches
from dist_train.decisions.metrics_file import read_scores
from dist_train.decisions.threshold import Threshold
from dist_train.distributed.stage import MATCHES, parent
from dist_train.evaluation.f1_curve import F1Curve
from dist_train.evaluation.scores import Scores
from dist_train.matching.pairs import PairSet
from dist_train.report import charts
from dist_train.report.galleries import Gallery, choose_pairs, show_pairs
from shards.read.location import Folder, Location
from shards.storage.files import corrupt_error, remove_abandoned, write_atomic
from shards.storage.stops import stops_interrupt

SHOWN_SPLITS = ("test", "val")
"""Products that no weight was fitted to; the second also chose the threshold."""
BEST_OF_A_BATCH = 5_000
"""Matches that are kept of each batch where only the best of the catalogue are shown."""
BINS = 48


@dataclass(frozen=True)
class ReportData:
    """One match directory. Without labels metrics, histogram and shown_split are None.

    matched: postings that match another; groups: those of two postings or more; photos_missing:
    why there are no photos, None where there are.
    """

    name: str
    created: str
    postings: int
    matched: int
    groups: int
    largest_group: int
    threshold: Threshold
    metrics: Scores | None
    histogram: charts.Histogram | None
    shown_split: str | None
    galleries: list[Gallery]
    photos_missing: str | None


@stops_interrupt()
def write_report(matches: Path, shards: Location | None = None) -> Path:
    """Write MATCHES/report.html and return its path. Errors as in `gather`."""
    target = matches / "report.html"
    remove_abandoned(matches)
    write_atomic(target, render(gather(matches, shards)).encode())
    return target


def gather(matches: Path, shards: Location | None = None) -> ReportData:
    """Everything the report of a match directory shows.

    shards: where its photos lie, if not where the embedding set says.

    Raises BadInput for a missing file, Corrupt for one that does not fit the others.
    """
    folder = Folder(matches, MATCHES)
    pair_set = PairSet(parent(matches, "pairs"))
    items = pair_set.embedding.read_items(["posting_id", "label_group", "split"])
    labelled = items.label_group.notna() & (items.label_group != "")
    rows = {split: (labelled & (items.split == split)).to_numpy() for split in SHOWN_SPLITS}
    split = next((split for split in SHOWN_SPLITS if rows[split].any()), None)
    shown = None if split is None else rows[split]
    listed, grouped = (folder.file(f"{name}.parquet") for name in ("matches", "groups"))
    with corrupt_error(grouped):
        groups = pd.read_parquet(grouped, columns=["posting_id", "group_id"])
    with corrupt_error(listed):  # a posting itself is the first of its list
        lengths = pc.list_value_length(pq.read_table(listed, columns=["scores"])["scores"])
    histogram = None
    if shown is None:
        pairs = read_matches(listed, items.posting_id, BEST_OF_A_BATCH)
        keys = pairs.i.to_numpy() * len(items) + pairs.j.to_numpy()
        scored = pair_set.select(lambda i, j: np.isin(i * len(items) + j, keys))
        place = pd.Index(groups.posting_id).get_indexer(items.posting_id)
        product = groups.group_id.to_numpy()[place]
    else:
        pairs = read_matches(listed, items.posting_id[shown])
        pairs[["i", "j"]] = np.flatnonzero(shown)[pairs[["i", "j"]].to_numpy()]
        scored = pair_set.select(lambda i, j: shown[i] & shown[j])
        product = pd.factorize(items.label_group)[0]
        if len(scored):
            right = product[scored.i] == product[scored.j]
            edges = np.histogram_bin_edges(scored.score, bins=BINS)
            counts = [np.histogram(scored.score[which], edges)[0] for which in (right, ~right)]
            histogram = charts.Histogram(edges, *counts)
    chosen = choose_pairs(pairs, scored, product, shown)
    galleries, photos_missing = show_pairs(chosen, scored, pair_set.embedding, shards)
    started = datetime.fromisoformat(folder.stage["started"])
    sizes = np.bincount(groups.group_id, minlength=1)
    return ReportData(
        name=matches.resolve().name,
        created=f"{started.day} {started:%B %Y}",
        postings=len(groups),
        matched=pc.sum(pc.greater(lengths, 1)).as_py(),
        groups=int((sizes > 1).sum()),
        largest_group=int(sizes.max()),
        threshold=folder.json("threshold.json"),
        metrics=read_scores(folder),
        histogram=histogram,
        shown_split=split,
        galleries=galleries,
        photos_missing=photos_missing,
    )


def render(data: ReportData) -> str:
    """The page, with everything it needs inside. Text of the catalogue is always escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dist_train", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda n: f"{n:,}"
    environment.filters["fixed"] = lambda n, digits=3: "–" if n is None else f"{n:.{digits}f}"
    threshold, saved = data.threshold["threshold"], data.threshold.get("curve")
    rows = data.metrics["delivered"]["rows"] if data.metrics else []
    baselines = [row for row in rows if row["kind"] == "baseline"]
    return environment.get_template("page.html.j2").render(
        data=data,
        box=charts,
        curve=charts.curve_chart(F1Curve.from_json(saved), threshold) if saved else None,
        histogram=charts.histogram_chart(data.histogram, data.threshold["score_threshold"])
        if data.histogram
        else None,
        ours=next((row for row in rows if row["kind"] == "ours"), None),
        baseline=max(baselines, key=lambda row: row["f1"], default=None),
    )
