"""Every unordered pair of items that reaches a score floor, once, and each item's nearest k.

A block pair is the unit of work, commit and resume. Any number of workers, under one launcher or
started separately (the tasks of a Slurm array), score the block pairs of one fixed list; they may
die and be started again.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dist_train.distributed.memory import trim_allocators
from dist_train.distributed.runtime import Runtime
from dist_train.matching.blocks import PAIRS_IN_MEMORY, BlockPair, block_size, blocks_of
from dist_train.matching.engines import Engine, GemmEngine
from dist_train.matching.kernels import kernels_for
from dist_train.matching.nearest import KthBestScores, Nearest
from dist_train.matching.pairs import SCORES, no_pairs
from dist_train.matching.sampling import sampled_score_floor
from dist_train.matching.vectors import ItemVectors
from dist_train.matching.work_folder import EDGES, Record, WorkFolder, read_table
from dist_train.monitor.progress import progress_bar
from shards.storage.errors import Stopped
from shards.storage.files import write_parquet
from shards.storage.stage_files import MANIFEST

POLL = 0.02, 2.0
"""Least and most seconds until block pairs that others hold are checked again; between these an
eighth of the time waited so far."""


@dataclass(frozen=True)
class Pairs:
    """Unordered scored pairs (P,): i < j, score float32."""

    i: np.ndarray
    j: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class JoinLimits:
    """What is kept: pairs that reach `score_floor`, and `k` neighbours of every item."""

    score_floor: float
    k: int = 0
    budget: float = float("inf")
    """Pairs in all; with more of them the score floor is raised, up to `highest_score_floor`."""
    highest_score_floor: float = 1.0


def join(engine: Engine, limits: JoinLimits, out: Path, runtime: Runtime) -> None:
    """Score block pairs below `out` until all are committed, by this worker or by others.

    Raises Stopped after a signal; committed work stays, and the same call continues it.
    """
    work, finished = WorkFolder(out), out / MANIFEST
    known = KthBestScores(work.hidden / "kth_best.f32", len(engine.vectors)) if limits.k else None
    total = len(engine.block_pairs)
    begin = total * runtime.rank // runtime.world
    mine = engine.block_pairs[begin:] + engine.block_pairs[:begin]
    idle_since = time.monotonic()
    with progress_bar("join", "block pair", total, quiet=not runtime.is_main) as bar:
        while missing := [pair for pair in mine if not work.is_done(pair.number)]:
            # Finished by another worker, which has removed the records: no block pair is missing.
            if finished.exists():
                break
            done = total - len(missing)
            if not bar.disable:  # what others did does not count as this worker's pace
                bar.initial += done - bar.n
            bar.n = done
            for pair in missing:
                if runtime.stop_requested():
                    raise Stopped(f"{out}: stopped by a signal; the same command goes on")
                with work.claim(pair.number) as ours:
                    if ours and not work.is_done(pair.number) and not finished.exists():
                        score_block_pair(engine, limits, pair, work, known)
                        bar.update(1)
                        idle_since = time.monotonic()
            idle = time.monotonic() - idle_since
            time.sleep(min(max(idle / 8, POLL[0]), POLL[1]))
        bar.update(total - bar.n)
    engine.loaded.clear()
    trim_allocators()


def score_block_pair(
    engine: Engine,
    limits: JoinLimits,
    block_pair: BlockPair,
    work: WorkFolder,
    known: KthBestScores | None,
) -> None:
    """Find, score and commit the pairs and neighbours of one block pair."""
    number, checked = block_pair.number, engine.stats.checked
    score_floor = work.score_floor(limits.score_floor, limits.budget, limits.highest_score_floor)
    tables: list[pd.DataFrame] = []
    files, counts, nearest = 0, np.zeros(len(EDGES), np.int64), None
    if known is not None:
        numbers = {block_pair.query} | ({block_pair.database} if engine.symmetric else set())
        parts = [np.asarray(engine.block_rows[n], np.int64) for n in numbers]
        rows = np.sort(np.concatenate(parts))
        nearest = Nearest(rows, limits.k, known.read(rows))
    for query, database in engine.candidates(block_pair, score_floor, nearest):
        table = score_candidates(engine, query, database)
        i, j, mirrored, score = (table[n].to_numpy() for n in ("i", "j", "mirrored", "score"))
        if nearest is not None and engine.symmetric:
            nearest.add(np.concatenate([i, j]), np.concatenate([j, i]), np.tile(score, 2))
        elif nearest is not None:
            nearest.add(np.where(mirrored, j, i), np.where(mirrored, i, j), score)
        keep = (score >= np.float32(score_floor)) & ~mirrored
        if keep.any():
            tables.append(table.loc[keep, ["i", "j", *SCORES]])
            steps = np.searchsorted(EDGES, score[keep], side="right") - 1
            counts += np.bincount(steps.clip(min=0), minlength=len(EDGES))
            if sum(map(len, tables)) > PAIRS_IN_MEMORY:
                write_parquet(work.pairs_path(number, files), sorted_pairs(tables))
                files, tables = files + 1, []
    if tables or not files:
        write_parquet(work.pairs_path(number, files), sorted_pairs(tables))
        files += 1
    record: Record = {
        "area": block_pair.area,
        "files": files,
        "histogram": np.stack([np.flatnonzero(counts), counts[counts > 0]], axis=1).tolist(),
        "error": engine.stats.error,
        "margin": engine.stats.margin,
        "checked": engine.stats.checked - checked,
    }
    work.commit(number, record, None if nearest is None else nearest.table())
    if nearest is not None and known is not None:
        known.raise_to(nearest.rows, nearest.scores[:, -1])


def score_candidates(engine: Engine, query: np.ndarray, database: np.ndarray) -> pd.DataFrame:
    """i, j, mirrored, score, score_image, score_text of candidates (P,), i < j, by exact scores.

    `mirrored` is true where j was the query item of an engine that finds both sides: the pair is
    reported by another block pair. Self-matches and pairs without a score are left out.
    """
    scores = engine.vectors.scores(query, database, engine.stored_rows)
    # Filtered as arrays: when neighbours are wanted, every product gives a table of few rows.
    real = (query != database) & ~np.isnan(scores["score"])
    query, database = query[real], database[real]
    columns = {
        "i": np.minimum(query, database),
        "j": np.maximum(query, database),
        "mirrored": (query > database) & (not engine.symmetric),
    }
    columns |= {name: score[real] for name, score in scores.items()}
    return pd.DataFrame(columns, copy=False)


def sorted_pairs(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables of pairs as one: i, j, score, score_image, score_text by i, then j."""
    return pd.concat([no_pairs(), *tables]).sort_values(["i", "j"], ignore_index=True)


def apply_score_floor(out: Path, score_floor: float) -> int:
    """Remove the pairs below the score floor of all block pairs; returns how many remain."""
    work, kept = WorkFolder(out), 0
    written = {
        work.pairs_path(number, file)
        for number, record in work.records().items()
        for file in range(record["files"])
    }
    for path in work.pairs.glob("*.parquet"):
        if path not in written:  # of a killed worker; the block pair was done again in fewer files
            path.unlink()
    for path in sorted(written):
        table = read_table(path)
        keep = table[table.score >= np.float32(score_floor)]
        if len(keep) < len(table):
            write_parquet(path, keep)
        kept += len(keep)
    return kept


def pairs_in_memory(vectors: ItemVectors, device: torch.device, pairs_per_item: float) -> Pairs:
    """The best-scored pairs of a few items on one process, about `pairs_per_item` an item."""
    score_floor = sampled_score_floor(vectors, pairs_per_item)
    kernel = kernels_for(device, bf16=False)[0]
    engine = GemmEngine(vectors, blocks_of(vectors, block_size(len(vectors))), kernel)
    tables = []
    for block_pair in engine.block_pairs:
        for query, database in engine.candidates(block_pair, score_floor):
            table = score_candidates(engine, query, database)
            tables.append(table[table.score >= np.float32(score_floor)][["i", "j", *SCORES]])
    table = sorted_pairs(tables)
    return Pairs(table.i.to_numpy(), table.j.to_numpy(), table.score.to_numpy())
