"""Every unordered pair of items at a floor, each once, and the nearest k of every item.

A block of asking rows is the unit of work, commit and resume: it asks for all of the others, and
its files hold what only it reports. Ranks take blocks in turn and never talk before the end.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from dist_train.matching.engines import Engine, GemmEngine, floor_of_sample
from dist_train.matching.views import Views
from dist_train.runtime import Runtime, row_blocks
from shards.errors import Stopped
from shards.files import write_parquet

WORK = ".work"


@dataclass(frozen=True)
class Pairs:
    """Unordered scored pairs (P,): i < j, score float32."""

    i: np.ndarray
    j: np.ndarray
    score: np.ndarray


def join(
    views: Views, engine: Engine, floor: float, neighbours: int, out: Path, runtime: Runtime
) -> None:
    """Write pairs/*.parquet and, for `nearest_table`, the nearest of every block below `out`."""
    blocks = list(enumerate(row_blocks(len(views))))
    quiet = None if runtime.is_main else True
    for number, rows in tqdm(runtime.share(blocks), desc="match", unit="block", disable=quiet):
        if runtime.stop_asked():
            break
        mark = out / "pairs" / f"{number:05d}.parquet"
        if not mark.exists():
            pairs, nearest = join_block(views, engine, rows, floor, neighbours)
            write_parquet(out / WORK / f"nearest-{number:05d}.parquet", nearest)
            write_parquet(mark, pairs)
    if runtime.anyone_asked_to_stop():
        raise Stopped(f"{out}: stopped by a signal; the same command goes on")
    runtime.barrier()


def join_block(
    views: Views, engine: Engine, rows: range, floor: float, neighbours: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pairs i < j of the asking `rows` i (score, score_image, ...), and their nearest rows."""
    found = engine.search(rows, floor, neighbours)
    lower = found.asking < found.found  # its other item finds the pair too
    pairs = _scored(views, found.asking[lower], found.found[lower])
    pairs = pairs[pairs.score >= np.float32(floor)].sort_values(["i", "j"], ignore_index=True)
    item = np.repeat(np.asarray(rows, np.int64), found.nearest.shape[1])
    near = found.nearest.ravel()
    nearest = _scored(views, item[near >= 0], near[near >= 0])
    nearest = nearest[nearest.score.notna()]
    return pairs, nearest.sort_values(["i", "score"], ascending=[True, False], ignore_index=True)


def nearest_table(out: Path) -> pd.DataFrame:
    """The nearest rows of every item: i, j, score, score_image, score_text."""
    files = sorted((out / WORK).glob("nearest-*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def read_pairs(out: Path) -> pd.DataFrame:
    """All pairs of a match directory: i, j, score, score_image, score_text."""
    files = sorted((out / "pairs").glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def pairs_in_memory(views: Views, device: torch.device, pairs_per_item: float) -> Pairs:
    """The best-scored pairs of a few items on one process, about `pairs_per_item` an item."""
    floor = floor_of_sample(views, pairs_per_item, device)
    engine = GemmEngine(views, device)
    blocks = [join_block(views, engine, rows, floor, 1)[0] for rows in row_blocks(len(views))]
    table = pd.concat(blocks, ignore_index=True)
    return Pairs(table.i.to_numpy(), table.j.to_numpy(), table.score.to_numpy())


def _scored(views: Views, i: np.ndarray, j: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"i": i.astype(np.int64), "j": j.astype(np.int64)} | views.scores(i, j))
