"""Every unordered pair of items at a floor, each once, and the nearest k of every item.

A tile is the unit of work, commit and resume. Any number of workers, under one launcher or each by
itself (the tasks of a Slurm array), take the tiles of one fixed list; they may die and join.
"""

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from dist_train.matching.blocks import Tile, block_size, blocks_of, common_parts
from dist_train.matching.engines import Engine, GemmEngine
from dist_train.matching.kernels import kernels_for
from dist_train.matching.nearest import KnownFloors, Nearest
from dist_train.matching.sampling import floor_of_sample
from dist_train.matching.sketches import Sketch
from dist_train.matching.views import Views
from dist_train.matching.work import Work, histogram, read_table
from dist_train.monitor.progress import progress_bar
from dist_train.runtime import Clock, Runtime
from shards.errors import Stopped
from shards.files import remove_abandoned, write_parquet

SCORES = ("score", "score_image", "score_text")
SPILL = 2_000_000
"""Pairs of a tile in memory; then they are written as a part of it."""
LOOK_AGAIN = 0.02, 2.0
"""Seconds between looks at the tiles that others are at: an eighth of what was waited, within."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Unordered scored pairs (P,): i < j, score float32."""

    i: np.ndarray
    j: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Wanted:
    """What is looked for: pairs from `floor` on, `k` neighbours an item, within a budget."""

    floor: float
    k: int = 0
    budget: float = float("inf")
    """Pairs in all; above it the floor is raised, up to `highest`."""
    highest: float = 1.0
    items: int | None = None
    """Real items; rows from there on are canaries. None: all are real."""


@dataclass
class TileFloors:
    """What is wanted of a tile while it is worked on; see engines.Floors."""

    wanted: Wanted
    near: Nearest | None

    def __post_init__(self) -> None:
        self.k = self.wanted.k

    def pair(self) -> float:
        """See engines.Floors."""
        return self.wanted.floor

    def nearest(self, rows: np.ndarray) -> np.ndarray | None:
        """See engines.Floors."""
        return None if self.near is None else self.near.of(rows)

    def among(self, rows: np.ndarray) -> int:
        """See engines.Floors."""
        items = self.wanted.items
        return self.k + (0 if items is None else int((rows >= items).sum()))


@dataclass
class _Kept:
    """The pairs of a tile: at most SPILL of them in memory, the rest in its parts."""

    work: Work
    tile: int
    tables: list[pd.DataFrame] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    parts: int = 0
    pairs: int = 0

    def add(self, table: pd.DataFrame) -> None:
        self.tables.append(table)
        self.pairs += len(table)
        for step, count in histogram(table.score.to_numpy()):
            self.counts[step] = self.counts.get(step, 0) + count
        if sum(map(len, self.tables)) > SPILL:
            self.write()

    def write(self) -> None:
        table = in_order(self.tables)
        write_parquet(self.work.pairs_path(self.tile, self.parts), table)
        self.parts, self.tables = self.parts + 1, []


def join(views: Views, engine: Engine, wanted: Wanted, out: Path, runtime: Runtime) -> None:
    """Work on the tiles below `out` until all are committed, by this worker or by others.

    Raises Stopped after a signal; what is committed stays, and the same call goes on.
    """
    work = Work(out)
    remove_abandoned(out)
    known = KnownFloors(work.hidden / "floors.f32", len(views)) if wanted.k else None
    begin = len(engine.tiles) * runtime.rank // runtime.world
    mine = engine.tiles[begin:] + engine.tiles[:begin]
    idle = Clock()
    with progress_bar("join", "block pair", len(mine), quiet=not runtime.is_main) as bar:
        while left := [tile for tile in mine if not work.is_done(tile.number)]:
            if work.is_finished():
                return
            others = len(mine) - len(left) - bar.n
            bar.n, bar.initial = bar.n + others, bar.initial + others
            if _take_some(views, engine, wanted, left, work, known, runtime, bar):
                idle = Clock()
            else:
                time.sleep(min(max(idle.seconds() / 8, LOOK_AGAIN[0]), LOOK_AGAIN[1]))
            if runtime.stop_asked():
                raise Stopped(f"{out}: stopped by a signal; the same command goes on")
        bar.update(len(mine) - bar.n)


def _take_some(
    views: Views, engine: Engine, wanted: Wanted, tiles: list[Tile], work: Work,
    known: KnownFloors | None, runtime: Runtime, bar: tqdm,
) -> bool:  # fmt: skip
    """Do those of the tiles that are free; whether there was one."""
    any_free = False
    for tile in tiles:
        if runtime.stop_asked():
            break
        with work.claim(tile.number) as ours:
            if ours and not work.is_done(tile.number) and not work.is_finished():
                any_free = True
                floor = work.floor(wanted.floor, wanted.budget, wanted.highest)
                do_tile(views, engine, replace(wanted, floor=floor), tile, work, known)
                bar.update(1)
    return any_free


def do_tile(
    views: Views, engine: Engine, wanted: Wanted, tile: Tile, work: Work, known: KnownFloors | None
) -> None:
    """Find, score and commit what one tile holds."""
    clock, kept, canaries = Clock(), _Kept(work, tile.number), []
    checked = engine.seen.checked
    near = _nearest_of(engine, tile, wanted, known)
    floors = TileFloors(wanted, near)
    for asking, found in engine.candidates(tile, floors):
        table = scored(views, engine, asking, found)
        if wanted.items is not None and (planted := table.j.to_numpy() >= wanted.items).any():
            canaries += _caught(table[planted], wanted)
            table = table[~planted]
        if near is not None:
            _tell(near, engine, table)
        keep = (table.score.to_numpy() >= np.float32(wanted.floor)) & (table.asks.to_numpy() < 1)
        if keep.any():
            kept.add(table.loc[keep, ["i", "j", *SCORES]])
    if kept.tables or not kept.parts:
        kept.write()
    record = {
        "tile": tile.number, "asking": tile.asking, "asked": tile.asked, "area": tile.area,
        "floor": wanted.floor, "pairs": kept.pairs, "parts": kept.parts,
        "histogram": sorted(map(list, kept.counts.items())), "canaries": canaries,
        "seconds": clock.seconds(), "engine": engine.name, "error": engine.seen.error,
        "margin": engine.seen.margin, "checked": engine.seen.checked - checked,
    }  # fmt: skip
    work.commit(tile.number, record, None if near is None else near.table())
    if near is not None and known is not None:
        known.raise_to(near.rows, near.scores[:, -1])


def scored(views: Views, engine: Engine, asking: np.ndarray, found: np.ndarray) -> pd.DataFrame:
    """i < j with the scores that decide; `asks` 1 where j asked: another tile gives that pair."""
    scores = views.scores(asking, found, engine.take)
    # Taken from arrays: with neighbours a table is made for each product, of few rows.
    real = (asking != found) & ~np.isnan(scores["score"])
    asking, found = asking[real], found[real]
    asks = (asking > found) & (not engine.both_ways)
    columns = {"i": np.minimum(asking, found), "j": np.maximum(asking, found),
               "asks": asks.astype(np.int8)}  # fmt: skip
    columns |= {name: score[real] for name, score in scores.items()}
    return pd.DataFrame(columns, copy=False)


def _nearest_of(
    engine: Engine, tile: Tile, wanted: Wanted, known: KnownFloors | None
) -> Nearest | None:
    if known is None:
        return None
    rows = engine.rows(tile)
    if wanted.items is not None:
        rows = rows[rows < wanted.items]
    return Nearest(rows, wanted.k, known.of(rows))


def _tell(near: Nearest, engine: Engine, table: pd.DataFrame) -> None:
    i, j, score = table.i.to_numpy(), table.j.to_numpy(), table.score.to_numpy()
    turned = table.asks.to_numpy() > 0
    if engine.both_ways:
        near.add(np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([score, score]))
    else:
        near.add(np.where(turned, j, i), np.where(turned, i, j), score)


def _caught(table: pd.DataFrame, wanted: Wanted) -> list[list[float]]:
    """[source, canary, score] of pairs with a canary that reach the floor."""
    seen = table[table.i < wanted.items]
    seen = seen[seen.score >= np.float32(wanted.floor)]
    return [[int(i), int(j), float(s)] for i, j, s in zip(seen.i, seen.j, seen.score, strict=True)]


def in_order(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables of pairs as one: i, j, score, score_image, score_text by i, then j."""
    nothing = {name: np.zeros(0, np.int64) for name in ("i", "j")}
    columns = nothing | {name: np.zeros(0, np.float32) for name in SCORES}
    table = pd.concat([pd.DataFrame(columns), *tables], ignore_index=True)
    return table.sort_values(["i", "j"], ignore_index=True)


def read_pairs(out: Path) -> pd.DataFrame:
    """All pairs of a match directory: i, j, score, score_image, score_text, by i, then j."""
    return in_order([read_table(file) for file in sorted((out / "pairs").glob("*.parquet"))])


def settle_pairs(out: Path, floor: float, items: int) -> dict[str, Any]:
    """Take out of pairs/ what lies below the floor that all tiles gave; the counts."""
    work, kept = Work(out), 0
    wanted = {
        work.pairs_path(tile, part)
        for tile, record in work.records().items()
        for part in range(record["parts"])
    }
    for path in work.pairs.glob("*.parquet"):
        if path not in wanted:  # a killed worker's, of a tile that was done again in fewer parts
            path.unlink()
    for path in sorted(wanted):
        table = read_table(path)
        keep = table[(table.score >= np.float32(floor)) & (table.j < items)]
        if len(keep) < len(table):
            write_parquet(path, keep)
        kept += len(keep)
    return {"pairs": kept}


def pairs_in_memory(views: Views, device: torch.device, pairs_per_item: float) -> Pairs:
    """The best-scored pairs of a few items on one process, about `pairs_per_item` an item."""
    floor = floor_of_sample(views, pairs_per_item)
    plain = kernels_for(device, bf16=False)[0]
    blocks = blocks_of(views, block_size(len(views)))
    sketches = {common_parts(a, b): Sketch(plain) for a in blocks for b in blocks}
    engine, tables = GemmEngine(views, blocks, sketches), []
    for tile in engine.tiles:
        for asking, found in engine.candidates(tile, TileFloors(Wanted(floor), None)):
            table = scored(views, engine, asking, found)
            tables.append(table[table.score >= np.float32(floor)][["i", "j", *SCORES]])
    table = in_order(tables)
    return Pairs(table.i.to_numpy(), table.j.to_numpy(), table.score.to_numpy())
