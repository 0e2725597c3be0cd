"""Every unordered pair of items at a floor, each once, and the nearest k of every item.

A tile is the unit of work, commit and resume. Any number of workers, under one launcher or each by
itself (the tasks of a Slurm array), take the tiles of one fixed list; they may die and join.
"""

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dist_train.distributed.runtime import Runtime
from dist_train.matching.blocks import Tile, block_size, blocks_of
from dist_train.matching.engines import Engine, GemmEngine
from dist_train.matching.kernels import kernels_for
from dist_train.matching.nearest import KnownFloors, Nearest
from dist_train.matching.pairs import SCORES
from dist_train.matching.sampling import floor_of_sample
from dist_train.matching.vectors import ItemVectors
from dist_train.matching.work_folder import Work, histogram, read_table
from dist_train.monitor.progress import progress_bar
from shards.storage.errors import Stopped
from shards.storage.files import remove_abandoned, write_parquet

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


def join(views: ItemVectors, engine: Engine, wanted: Wanted, out: Path, runtime: Runtime) -> None:
    """Work on the tiles below `out` until all are committed, by this worker or by others.

    Raises Stopped after a signal; what is committed stays, and the same call goes on.
    """
    work = Work(out)
    remove_abandoned(out)
    known = KnownFloors(work.hidden / "floors.f32", len(views)) if wanted.k else None
    begin = len(engine.tiles) * runtime.rank // runtime.world
    mine = engine.tiles[begin:] + engine.tiles[:begin]
    idle_since = time.monotonic()
    with progress_bar("join", "block pair", len(mine), quiet=not runtime.is_main) as bar:
        while left := [tile for tile in mine if not work.is_done(tile.number)]:
            if work.is_finished():
                return
            others = len(mine) - len(left) - bar.n
            bar.n, bar.initial = bar.n + others, bar.initial + others
            any_free = False
            for tile in left:
                if runtime.stop_requested():
                    raise Stopped(f"{out}: stopped by a signal; the same command goes on")
                with work.claim(tile.number) as ours:
                    if ours and not work.is_done(tile.number) and not work.is_finished():
                        any_free = True
                        floor = work.floor(wanted.floor, wanted.budget, wanted.highest)
                        do_tile(views, engine, replace(wanted, floor=floor), tile, work, known)
                        bar.update(1)
            if any_free:
                idle_since = time.monotonic()
            else:
                idle = time.monotonic() - idle_since
                time.sleep(min(max(idle / 8, LOOK_AGAIN[0]), LOOK_AGAIN[1]))
        bar.update(len(mine) - bar.n)


def do_tile(
    views: ItemVectors,
    engine: Engine,
    wanted: Wanted,
    tile: Tile,
    work: Work,
    known: KnownFloors | None,
) -> None:
    """Find, score and commit what one tile holds."""
    began, kept, checked = time.monotonic(), _Kept(work, tile.number), engine.seen.checked
    near = None
    if known is not None:
        rows = engine.rows(tile)
        near = Nearest(rows, wanted.k, known.of(rows))
    for asking, found in engine.candidates(tile, wanted.floor, near):
        table = scored(views, engine, asking, found)
        i, j, score = (table[name].to_numpy() for name in ("i", "j", "score"))
        elsewhere = table.asks.to_numpy() > 0
        if near is not None and engine.both_ways:
            near.add(np.concatenate([i, j]), np.concatenate([j, i]), np.tile(score, 2))
        elif near is not None:
            near.add(np.where(elsewhere, j, i), np.where(elsewhere, i, j), score)
        keep = (score >= np.float32(wanted.floor)) & ~elsewhere
        if keep.any():
            kept.add(table.loc[keep, ["i", "j", *SCORES]])
    if kept.tables or not kept.parts:
        kept.write()
    record = {
        "tile": tile.number, "asking": tile.asking, "asked": tile.asked, "area": tile.area,
        "floor": wanted.floor, "pairs": kept.pairs, "parts": kept.parts,
        "histogram": sorted(map(list, kept.counts.items())),
        "seconds": time.monotonic() - began, "engine": engine.name, "error": engine.seen.error,
        "margin": engine.seen.margin, "checked": engine.seen.checked - checked,
    }  # fmt: skip
    work.commit(tile.number, record, None if near is None else near.table())
    if near is not None and known is not None:
        known.raise_to(near.rows, near.scores[:, -1])


def scored(
    views: ItemVectors, engine: Engine, asking: np.ndarray, found: np.ndarray
) -> pd.DataFrame:
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


def in_order(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables of pairs as one: i, j, score, score_image, score_text by i, then j."""
    nothing = {name: np.zeros(0, np.int64) for name in ("i", "j")}
    columns = nothing | {name: np.zeros(0, np.float32) for name in SCORES}
    table = pd.concat([pd.DataFrame(columns), *tables], ignore_index=True)
    return table.sort_values(["i", "j"], ignore_index=True)


def read_pairs(out: Path) -> pd.DataFrame:
    """All pairs below `out`: i, j, score, score_image, score_text, by i, then j."""
    return in_order([read_table(file) for file in sorted((out / "pairs").glob("*.parquet"))])


def settle_pairs(out: Path, floor: float) -> int:
    """Take out of pairs/ what lies below the floor that all tiles gave; how many pairs are left."""
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
        keep = table[table.score >= np.float32(floor)]
        if len(keep) < len(table):
            write_parquet(path, keep)
        kept += len(keep)
    return kept


def pairs_in_memory(views: ItemVectors, device: torch.device, pairs_per_item: float) -> Pairs:
    """The best-scored pairs of a few items on one process, about `pairs_per_item` an item."""
    floor = floor_of_sample(views, pairs_per_item)
    kernel = kernels_for(device, bf16=False)[0]
    engine = GemmEngine(views, blocks_of(views, block_size(len(views))), kernel)
    tables = []
    for tile in engine.tiles:
        for asking, found in engine.candidates(tile, floor):
            table = scored(views, engine, asking, found)
            tables.append(table[table.score >= np.float32(floor)][["i", "j", *SCORES]])
    table = in_order(tables)
    return Pairs(table.i.to_numpy(), table.j.to_numpy(), table.score.to_numpy())
