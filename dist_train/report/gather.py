"""Read a match directory, and the pairs, embedding and shard sets it was made from."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from dist_train.distributed.stage import MATCHES, parent, parent_location
from dist_train.evaluation.f1_curve import F1Curve
from dist_train.evaluation.titles import decode_escapes
from dist_train.matching.pairs import SCORES, PairSet
from dist_train.report import galleries, tables
from dist_train.report.data import Gallery, Histogram, PairCard, Posting, ReportData
from dist_train.report.photos import thumbnail
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Unreachable
from shards.storage.files import read_json
from shards.storage.stage_files import STAGE, open_finished

# Products that no weight was fitted to; the second also chose the threshold.
SHOWN_SPLITS = ("test", "val")
BINS = 48


class Photos(Protocol):
    """What is asked of a shard set."""

    def photo(self, posting_id: str) -> bytes | None:
        """The stored JPEG of a posting, None where it has none."""


def gather(matches: Path, shard_set: Photos | None = None) -> ReportData:
    """Everything the report of a match directory shows.

    shard_set: where the photos are; by default the one the embeddings were made from.
    Raises BadInput for a missing file, Corrupt for one that does not fit the others.
    """
    open_finished(matches, MATCHES)
    pair_set = PairSet(parent(matches, "pairs"))
    embedding = pair_set.embedding
    items = tables.embedded_items(embedding / "items.parquet")
    split, shown = _shown(items)
    found = tables.read_matches(matches / "matches.parquet", items["posting_id"], shown)
    group_of, groups, largest = tables.read_groups(matches / "groups.parquet", items["posting_id"])
    scored = pair_set.select(_wanted(found.pairs, shown, len(items)))
    product = group_of if shown is None else pd.factorize(items["label_group"])[0]
    chosen = _choose(found.pairs, scored, product, shown)
    photos, missing = (shard_set, None) if shard_set else _open_photos(embedding)
    postings = _postings(embedding, items, [pairs for _, _, pairs in chosen], photos)
    threshold = read_json(matches / "threshold.json")
    return ReportData(
        name=matches.resolve().name,
        made=_day(read_json(matches / STAGE)["started"]),
        postings=found.postings,
        matched=found.matched,
        groups=groups,
        largest_group=largest,
        threshold=threshold,
        metrics=_metrics(matches),
        curve=F1Curve.from_json(threshold["curve"]) if threshold.get("curve") else None,
        histogram=None if shown is None else _histogram(scored, product),
        shown_split=split,
        galleries=[_gallery(*one, scored, postings) for one in chosen],
        photos_missing=missing,
    )


def _shown(items: pd.DataFrame) -> tuple[str | None, np.ndarray | None]:
    """The split to show and which rows it has; None and None without labelled products."""
    labelled = items["label_group"].fillna("") != ""
    for split in SHOWN_SPLITS:
        rows = (labelled & (items["split"] == split)).to_numpy()
        if rows.any():
            return split, rows
    return None, None


def _wanted(matched: pd.DataFrame, shown: np.ndarray | None, items: int):
    """Which scored pairs to read: of the rows shown, or those that are matched."""
    if shown is not None:
        return lambda i, j: shown[i] & shown[j]
    keys = matched["i"].to_numpy() * items + matched["j"].to_numpy()
    return lambda i, j: np.isin(i * items + j, keys)


def _choose(matched, scored, product, shown) -> list[tuple[str, int | None, pd.DataFrame]]:
    """(kind, how many there are, those to show) of every gallery."""
    if shown is None:
        return [("matches", None, galleries.best_pairs(matched, product))]
    return [
        ("right", *galleries.right_pairs(matched, product)),
        ("wrong", *galleries.wrong_pairs(matched, product)),
        ("missed", *galleries.missed_pairs(matched, scored, product, shown)),
    ]


def _open_photos(embedding: Path) -> tuple[Photos | None, str | None]:
    """The shard set, or None and why not. A report without photos still tells the scores."""
    try:
        return ShardSet(parent_location(embedding, "shards")), None
    except (BadInput, Unreachable) as reason:
        return None, str(reason)


def _postings(embedding, items, shown: Iterable[pd.DataFrame], photos) -> dict[int, Posting]:
    """The postings of the pairs shown, by row."""
    rows = sorted({int(row) for pairs in shown for row in pairs[["i", "j"]].to_numpy().ravel()})
    titles = tables.titles_of(embedding / "items.parquet", rows)
    return {row: _posting(items["posting_id"][row], titles[row], photos) for row in rows}


def _posting(posting_id: str, title: str, photos: Photos | None) -> Posting:
    photo = photos.photo(posting_id) if photos else None
    return Posting(posting_id, decode_escapes(title), thumbnail(photo))


def _gallery(kind, total, pairs, scored, postings) -> Gallery:
    parts = pairs.merge(scored.drop(columns="score"), on=["i", "j"], how="left")
    cards = [
        PairCard(postings[row.i], postings[row.j], *map(_known, row[3:]))
        for row in parts[["i", "j", *SCORES]].itertuples()
    ]
    return Gallery(kind, total, cards)


def _known(score: float) -> float | None:
    return None if pd.isna(score) else float(score)


def _histogram(scored: pd.DataFrame, product: np.ndarray) -> Histogram | None:
    if not len(scored):
        return None
    right = product[scored["i"]] == product[scored["j"]]
    edges = np.histogram_bin_edges(scored["score"], bins=BINS)
    counts = [np.histogram(scored["score"][which], edges)[0] for which in (right, ~right)]
    return Histogram(edges, *counts)


def _metrics(matches: Path) -> dict | None:
    path = matches / "metrics.json"
    return read_json(path) if path.exists() else None


def _day(started: str) -> str:
    moment = datetime.fromisoformat(started)
    return f"{moment.day} {moment:%B %Y}"
