"""Which pairs to show: a few of each kind, spread over products, with photos, titles and scores."""

import base64
import io
import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from dist_train.distributed.stage import parent_location
from dist_train.embedding.store import ITEMS, EmbeddingSet
from dist_train.evaluation.baselines import same_photo_pairs
from shards.catalogue.titles import readable_title
from shards.photos.decode import PhotoRefused, decode_photo
from shards.read.location import Location
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Corrupt, Unfinished, Unreachable
from shards.storage.files import corrupt_error

SHOWN = 12
SHOWN_A_PRODUCT = 2
ITEMS_A_PRODUCT = 30
"""So many items of a product are paired for pairs never scored: two pairs are shown at most,
so the others would only cost time."""
LONGEST_SIDE, QUALITY = 160, 70
"""Pixels and JPEG quality of the photos inside the page."""
Kind = Literal["right", "wrong", "missed", "matches"]
"""matches is that of a catalogue without labels."""
Chosen = tuple[Kind, int | None, pd.DataFrame]
"""A kind of pairs, how many there are (None: only the best are known), and those to show."""
log = logging.getLogger(__name__)


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


def choose_pairs(
    matched: pd.DataFrame, scored: pd.DataFrame, product: np.ndarray, shown: np.ndarray | None
) -> list[Chosen]:
    """The pairs to show of every kind, at most two of a product.

    right: matches of one product, from the surest to the closest call in even steps; wrong:
    matches across two products, the highest score first; missed: pairs of one product that are no
    match, the highest score first, then with NaN those never scored.
    matched, scored: columns i, j (i < j) and score, the latter kept down to the score floor;
    product: (N,) int64 by row; shown: (N,) bool, the rows whose pairs these are. Without labels it
    is None, and the best matches are chosen.
    """
    matched = _by_score(matched)
    if shown is None:
        return [("matches", None, _spread(matched, product))]
    is_right = product[matched.i] == product[matched.j]
    right, wrong = matched[is_right], matched[~is_right]
    few = right[right.groupby(product[right["i"]]).cumcount() < SHOWN_A_PRODUCT]
    even = np.linspace(0, len(few) - 1, min(SHOWN, len(few))).round().astype(int)
    near = _by_score(scored[product[scored.i] == product[scored.j]])
    rows = np.flatnonzero(shown)
    rows = rows[pd.Series(product[rows]).groupby(product[rows]).cumcount() < ITEMS_A_PRODUCT]
    # Pairs of equal products are found as pairs of equal hashes are.
    i, j = same_photo_pairs(product[rows].astype(str))
    every = pd.DataFrame({"i": rows[i], "j": rows[j], "score": np.nan})
    far = every[~_isin(every, scored, len(product))]
    missed = pd.concat([near[["i", "j", "score"]], far], ignore_index=True)
    missed = missed[~_isin(missed, matched, len(product))]
    sizes = np.bincount(product[shown])
    return [
        ("right", len(right), few.iloc[even]),
        ("wrong", len(wrong), _spread(wrong, product)),
        ("missed", int((sizes * (sizes - 1) // 2).sum()) - len(right), _spread(missed, product)),
    ]


def _by_score(pairs: pd.DataFrame) -> pd.DataFrame:
    """The highest score first."""
    return pairs.sort_values(["score", "i", "j"], ascending=[False, True, True])


def _isin(pairs: pd.DataFrame, others: pd.DataFrame, items: int) -> np.ndarray:
    """Which of the pairs (i < j) are one of the others, (P,) bool."""
    keys = pairs["i"].to_numpy() * items + pairs["j"].to_numpy()
    return np.isin(keys, others["i"].to_numpy() * items + others["j"].to_numpy())


def _spread(pairs: pd.DataFrame, product: np.ndarray) -> pd.DataFrame:
    """The first SHOWN pairs such that no product is shown more than SHOWN_A_PRODUCT times."""
    used: dict[int, int] = {}
    kept = []
    for position, pair in enumerate(zip(pairs["i"], pairs["j"], strict=True)):
        products = {int(product[row]) for row in pair}
        if all(used.get(one, 0) < SHOWN_A_PRODUCT for one in products):
            used.update({one: used.get(one, 0) + 1 for one in products})
            kept.append(position)
        if len(kept) == SHOWN:
            break
    return pairs.iloc[kept]


def show_pairs(
    chosen: list[Chosen],
    scored: pd.DataFrame,
    embedding: EmbeddingSet,
    shards: Location | None = None,
) -> tuple[list[Gallery], str | None]:
    """The chosen pairs with titles, photos and scores, and why there are no photos, if so.

    scored: columns i, j, score, score_image, score_text, as a join has them. shards: where the
    user says that the shard set lies.
    """
    try:
        photos, missing = ShardSet(parent_location(embedding.path, "shards", shards)), None
    except (BadInput, Unreachable) as reason:
        if shards is not None or isinstance(reason, Corrupt | Unfinished):
            raise
        log.warning("the report has no photos: %s", reason)
        photos, missing = None, str(reason)  # a report without photos still shows the scores
    rows = sorted({int(row) for *_, pairs in chosen for row in pairs[["i", "j"]].to_numpy().flat})
    with corrupt_error(embedding.folder.file(ITEMS)) as path:
        columns = ["row", "posting_id", "title"]
        table = pd.read_parquet(path, columns=columns, filters=[("row", "in", rows)])
    postings = {}
    for item in table.fillna({"title": ""}).itertuples():
        photo = thumbnail(photos.photo(item.posting_id) if photos else None)
        postings[item.row] = Posting(item.posting_id, readable_title(item.title), photo)
    found = []
    for kind, total, pairs in chosen:
        known = pairs[["i", "j"]].merge(scored, on=["i", "j"], how="left").astype(object)
        known = known.where(known.notna(), None).itertuples(index=False)
        cards = [PairCard(postings[i], postings[j], *scores) for i, j, *scores in known]
        found.append(Gallery(kind, total, cards))
    return found, missing


def thumbnail(photo: bytes | None) -> str | None:
    """A data URI of a small JPEG; None without a photo that can be read."""
    if not photo:
        return None
    try:
        small = decode_photo(photo, LONGEST_SIDE)
    except PhotoRefused:
        return None
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
