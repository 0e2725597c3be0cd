"""New rows against old ones, for updates: the join without the pairs that are known already.

Old and new rows stand behind each other in one set of views, in blocks that hold either old rows
or new ones. Of the join's tiles those of two old blocks are left out; all else is the same: engine,
workers, commit and resume, proof.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train.config.options import JoinConfig
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import Rows
from dist_train.matching.search import find, finish, set_up
from dist_train.matching.vectors import ItemVectors, ModalityVectors
from dist_train.matching.work_folder import Work, read_table
from shards.storage.errors import BadInput
from shards.storage.files import read_json, write_parquet
from shards.storage.lock import locked

DEGREES = "degrees.parquet"


def behind(old: ItemVectors, new: ItemVectors) -> ItemVectors:
    """Both as one: new row r is row len(old) + r. BadInput when they do not fit each other."""
    if {n: p.rows.width for n, p in old.parts.items()} != {
        n: p.rows.width for n, p in new.parts.items()
    }:
        raise BadInput(f"new rows have {_told(new)}, old ones {_told(old)}: embed them with the "
                       "encoders of the old")  # fmt: skip
    parts = {}
    for name, part in old.parts.items():
        added = new.parts[name]
        if part.weight != added.weight:
            raise BadInput(f"weight of {name} is {added.weight} for the new rows, "
                           f"{part.weight} for the old ones")  # fmt: skip
        rows = Rows([*part.rows.parts, *added.rows.parts])
        parts[name] = ModalityVectors(
            rows, np.concatenate([part.present, added.present]), part.weight
        )
    return ItemVectors(parts)


def join_new(
    old: ItemVectors,
    new: ItemVectors,
    out: Path,
    floor: float,
    config: JoinConfig,
    runtime: Runtime,
) -> dict[str, Any]:
    """Every pair of a new row with an old or a new one that scores `floor` or more; the proof.

    Writes below `out` what a join does (pairs/, proof.json, nearest.parquet with `neighbours`:
    of old rows the new ones nearest to them) and degrees.parquet: row, degree, the found pairs of
    each row that has any. Row numbers are those of `behind`. Any number of workers may share
    `out`; each returns when all is done. Raises BadInput for rows that do not fit each other and
    for too little memory, Stopped after a signal, Failed when the result is not whole.
    """
    if not len(new):
        raise BadInput("no new rows: there is nothing to join")
    config = replace(config, engine="gemm", max_score_floor=floor)
    search = set_up(behind(old, new), None, out, config, runtime, len(old), floor)
    find(search, out, runtime)
    with locked(Work(out).hidden / "finish"):
        if not (out / DEGREES).exists():
            finish(search, out, config)
            write_parquet(out / DEGREES, degrees(out))
    return read_json(out / "proof.json")


def degrees(out: Path) -> pd.DataFrame:
    """row, degree: the pairs of each row that has any, read a file at a time."""
    found = pd.Series(dtype=np.int64)
    for file in sorted((out / "pairs").glob("*.parquet")):
        table = read_table(file, ["i", "j"])
        here = pd.Series(np.concatenate([table.i, table.j])).value_counts()
        found = found.add(here, fill_value=0)
    found = found.sort_index().astype(np.int64)
    return pd.DataFrame({"row": found.index.astype(np.int64), "degree": found.to_numpy()})


def _told(views: ItemVectors) -> str:
    return " and ".join(f"{name} of {p.rows.width} columns" for name, p in views.parts.items())
