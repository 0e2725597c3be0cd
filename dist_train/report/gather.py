"""Read a match directory, and the pairs, embedding and shard sets it was created from."""

import base64
import io
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from dist_train.decisions.threshold import Threshold
from dist_train.distributed.stage import MATCHES, parent, parent_location
from dist_train.embedding.store import corrupt_error, read_items
from dist_train.evaluation.f1_curve import F1Curve
from dist_train.evaluation.scores import Scores
from dist_train.evaluation.titles import decode_escapes
from dist_train.matching.pairs import SCORES, PairSet, no_pairs
from dist_train.report.charts import Histogram
from dist_train.report.galleries import Chosen, Kind, choose_pairs
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Unreachable
from shards.storage.files import read_json
from shards.storage.stage_files import STAGE, open_finished

SHOWN_SPLITS = ("test", "val")
"""Products that no weight was fitted to; the second also chose the threshold."""
BEST_OF_A_BATCH = 5_000
"""Matches that are kept of each batch where only the best of the catalogue are shown."""
BINS = 48
LONGEST_SIDE, QUALITY = 160, 70
"""Pixels and JPEG quality of the photos inside the page."""


@dataclass(frozen=True)
class Posting:
    """One side of a pair. photo: a data URI, or None where there is none to show."""

    posting_id: str
    title: str
    photo: str | None


@dataclass(frozen=True)
class PairCard:
    """Two postings and their scores; None where the pair or a modality was never scored."""

    left: Posting
    right: Posting
    score: float | None
    score_image: float | None
    score_text: float | None


@dataclass(frozen=True)
class Gallery:
    """Some pairs of a kind; total: pairs of this kind, None where only the best are known."""

    kind: Kind
    total: int | None
    cards: list[PairCard]


@dataclass(frozen=True)
class ReportData:
    """One match directory. Without labels metrics, curve, histogram and shown_split are None.

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
    curve: F1Curve | None
    histogram: Histogram | None
    shown_split: str | None
    galleries: list[Gallery]
    photos_missing: str | None


class Photos(Protocol):
    """Where the photos of the postings are."""

    def photo(self, posting_id: str) -> bytes | None:
        """The stored JPEG of a posting, None where it has none."""


def gather(matches: Path, shard_set: Photos | None = None) -> ReportData:
    """Everything the report of a match directory shows.

    shard_set: where the photos are; by default the one the embeddings were created from.
    Raises BadInput for a missing file, Corrupt for one that does not fit the others.
    """
    open_finished(matches, MATCHES)
    pair_set = PairSet(parent(matches, "pairs"))
    embedding = pair_set.embedding
    items = read_items(embedding, ["posting_id", "label_group", "split"])
    labelled = items.label_group.notna() & (items.label_group != "")
    rows = {split: (labelled & (items.split == split)).to_numpy() for split in SHOWN_SPLITS}
    split = next((split for split in SHOWN_SPLITS if rows[split].any()), None)
    shown = None if split is None else rows[split]
    postings, matched, pairs = _read_matches(matches / "matches.parquet", items.posting_id, shown)
    table = pd.read_parquet(matches / "groups.parquet", columns=["posting_id", "group_id"])
    groups, _ = pd.factorize(table.group_id)
    sizes = np.bincount(groups, minlength=1)
    if shown is None:
        keys = pairs.i.to_numpy() * len(items) + pairs.j.to_numpy()
        scored = pair_set.select(lambda i, j: np.isin(i * len(items) + j, keys))
        product = groups[pd.Index(table.posting_id).get_indexer(items.posting_id)]
    else:
        scored = pair_set.select(lambda i, j: shown[i] & shown[j])
        product = pd.factorize(items.label_group)[0]
    chosen = choose_pairs(pairs, scored, product, shown)
    photos, photos_missing = (shard_set, None) if shard_set else _open_photos(embedding)
    threshold = read_json(matches / "threshold.json")
    metrics = matches / "metrics.json"
    started = datetime.fromisoformat(read_json(matches / STAGE)["started"])
    return ReportData(
        name=matches.resolve().name,
        created=f"{started.day} {started:%B %Y}",
        postings=postings,
        matched=matched,
        groups=int((sizes > 1).sum()),
        largest_group=int(sizes.max()),
        threshold=threshold,
        metrics=read_json(metrics) if metrics.exists() else None,
        curve=F1Curve.from_json(threshold["curve"]) if threshold.get("curve") else None,
        histogram=None if shown is None else _histogram(scored, product),
        shown_split=split,
        galleries=_galleries(chosen, scored, embedding, items.posting_id, photos),
        photos_missing=photos_missing,
    )


def _read_matches(
    path: Path, posting_ids: pd.Series, shown: np.ndarray | None
) -> tuple[int, int, pd.DataFrame]:
    """Postings in matches.parquet, those with another match than itself, and matched pairs.

    posting_ids: (N,) by row; shown: (N,) bool, the rows whose pairs are wanted, or None for the
    best pairs of all rows. The pairs have columns i, j (i < j) and score, each once. It is read in
    batches, so that a large catalogue fits in memory.
    """
    row_of, postings, matched = pd.Index(posting_ids), 0, 0
    found = [no_pairs(("i", "j", "score"))]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["posting_id", "matches", "scores"]):
            postings += batch.num_rows
            others = pc.greater(pc.list_value_length(batch["matches"]), 1)
            matched += int(pc.sum(others).as_py() or 0)
            lists = pc.list_parent_indices(batch["matches"]).to_numpy()
            one = row_of.get_indexer(batch["posting_id"].to_pandas())[lists]
            other = row_of.get_indexer(pc.list_flatten(batch["matches"]).to_pandas())
            score = pc.list_flatten(batch["scores"]).to_numpy(zero_copy_only=False)
            kept = (one != other) & (one >= 0) & (other >= 0)
            i, j = np.minimum(one, other)[kept], np.maximum(one, other)[kept]
            pairs = pd.DataFrame({"i": i, "j": j, "score": score[kept]})
            if shown is None:
                found.append(pairs.nlargest(BEST_OF_A_BATCH, "score"))
            else:
                found.append(pairs[shown[i] & shown[j]])
    # A match may stand in the list of one side only, so both are read and one is kept.
    pairs = pd.concat(found, ignore_index=True).drop_duplicates(["i", "j"], ignore_index=True)
    return postings, matched, pairs


def _open_photos(embedding: Path) -> tuple[Photos | None, str | None]:
    """The shard set, or None and why not: a report without photos still shows the scores."""
    try:
        return ShardSet(parent_location(embedding, "shards")), None
    except (BadInput, Unreachable) as reason:
        return None, str(reason)


def _histogram(scored: pd.DataFrame, product: np.ndarray) -> Histogram | None:
    """Scores of the right and of the wrong pairs; None without any."""
    if not len(scored):
        return None
    right = product[scored["i"]] == product[scored["j"]]
    edges = np.histogram_bin_edges(scored["score"], bins=BINS)
    counts = [np.histogram(scored["score"][which], edges)[0] for which in (right, ~right)]
    return Histogram(edges, *counts)


def _galleries(
    chosen: list[Chosen],
    scored: pd.DataFrame,
    embedding: Path,
    posting_ids: pd.Series,
    photos: Photos | None,
) -> list[Gallery]:
    """The chosen pairs with the titles, photos and scores of both sides."""
    rows = sorted({int(row) for *_, pairs in chosen for row in pairs[["i", "j"]].to_numpy().flat})
    with corrupt_error(embedding / "items.parquet") as path:
        table = pd.read_parquet(path, columns=["row", "title"], filters=[("row", "in", rows)])
    titles = dict(zip(table["row"].astype(int), table["title"].fillna(""), strict=True))
    postings = {}
    for row in rows:
        photo = photos.photo(posting_ids[row]) if photos else None
        postings[row] = Posting(posting_ids[row], decode_escapes(titles[row]), _thumbnail(photo))
    found = []
    for kind, total, pairs in chosen:
        known = pairs.merge(scored.drop(columns="score"), on=["i", "j"], how="left")
        cards = []
        for i, j, *values in known[["i", "j", *SCORES]].itertuples(index=False):
            scores = (None if pd.isna(value) else float(value) for value in values)
            cards.append(PairCard(postings[i], postings[j], *scores))
        found.append(Gallery(kind, total, cards))
    return found


def _thumbnail(photo: bytes | None) -> str | None:
    """A data URI of a small JPEG; None without a photo that can be read."""
    if not photo:
        return None
    try:
        with Image.open(io.BytesIO(photo)) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
