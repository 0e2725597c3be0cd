"""New rows against old ones, for updates: the join without the pairs that are known already.

Old and new rows form one set of item vectors, in blocks that hold either old rows or new ones. The
block pairs of two old blocks are left out; the engine, workers, commits and proof are the join's.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.config.options import JoinConfig
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import Rows
from dist_train.matching.build_pairs import finish, set_up
from dist_train.matching.join import join
from dist_train.matching.pairs import Proof
from dist_train.matching.vectors import ItemVectors, ModalityVectors
from dist_train.matching.work_folder import WorkFolder, read_table
from shards.storage.errors import BadInput
from shards.storage.files import read_json, write_parquet
from shards.storage.lock import locked

DEGREES = "degrees.parquet"


def concatenated(old: ItemVectors, new: ItemVectors) -> ItemVectors:
    """Both as one: new row r is row len(old) + r.

    Raises BadInput when they differ in modalities, widths or weights.
    """
    old_form, new_form = (
        " and ".join(
            f"{n} of {v.rows.width} columns and weight {v.weight}" for n, v in both.items()
        )
        for both in (old.modalities, new.modalities)
    )
    if old_form != new_form:
        raise BadInput(f"new rows have {new_form}, old ones {old_form}: embed and index them alike")
    modalities = {}
    for name, one in old.modalities.items():
        added = new.modalities[name]
        rows = Rows([*one.rows.parts, *added.rows.parts])
        present = np.concatenate([one.present, added.present])
        modalities[name] = ModalityVectors(rows, present, one.weight)
    return ItemVectors(modalities)


def join_new(
    old: ItemVectors,
    new: ItemVectors,
    out: Path,
    score_floor: float,
    config: JoinConfig,
    runtime: Runtime,
) -> Proof:
    """Every pair of a new row with an old or a new one that scores `score_floor` or more.

    Returns the proof and writes below `out` what a join does: pairs/, proof.json and, with
    `neighbours`, nearest.parquet, in which old rows have the new rows nearest to them. Also written
    is degrees.parquet: row, degree, the number of pairs of each row that has any. Row numbers are
    those of `concatenated`. Any number of workers may share `out`; each returns when all is done.
    Raises BadInput for rows that do not fit each other and for too little memory, Stopped after a
    signal, Failed when the result is not complete.
    """
    if not len(new):
        raise BadInput("no new rows: there is nothing to join")
    config = replace(config, engine="gemm", max_score_floor=score_floor)
    vectors = concatenated(old, new)
    engine, limits, _ = set_up(vectors, None, out, config, runtime, len(old), score_floor)
    join(engine, limits, out, runtime)
    with locked(WorkFolder(out).hidden / "finish"):
        if not (out / DEGREES).exists():
            finish(engine, limits, out, config)
            degree = pd.Series(dtype=np.int64)
            for file in sorted((out / "pairs").glob("*.parquet")):
                table = read_table(file, ["i", "j"])
                here = pd.Series(np.concatenate([table.i, table.j])).value_counts()
                degree = degree.add(here, fill_value=0)
            degree = degree.sort_index().astype(np.int64)
            columns = {"row": degree.index.astype(np.int64), "degree": degree.to_numpy()}
            write_parquet(out / DEGREES, pd.DataFrame(columns))
    return read_json(out / "proof.json")
