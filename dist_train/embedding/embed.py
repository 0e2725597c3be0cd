"""The stage embed: encoders over a shard set, exactly one row an item.

A part (a block of rows, a function of the number of items alone) is the unit of work, commit and
resume; ranks take parts in turn and never talk before the end.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from dist_train import stage
from dist_train.config import EmbedConfig, View, result_options
from dist_train.embedding.store import VIEWS, part_path
from dist_train.embedding.vectors import plan_batches, unit_vectors
from dist_train.encoders.batches import FEW, load
from dist_train.encoders.folder import load_encoder
from dist_train.runtime import Runtime, row_blocks
from shards import stage_files
from shards.errors import BadInput, Failed
from shards.files import atomic_path, write_parquet
from shards.location import Location
from shards.reader import ShardSet

COLUMNS = ["row", "posting_id", "label_group", "split", "title", "has_image", "has_text",
           "status", "sha256", "phash", "photo_group"]  # fmt: skip
UNREADABLE = "unreadable"
log = logging.getLogger(__name__)


def embed(
    shards: Location, out: Path, config: EmbedConfig, image: Path | None, text: Path | None
) -> dict[str, Any]:
    """Embed every item of `shards` with the runs given; the counts of the embedding set.

    Raises BadInput when no run is given, one is unfinished, or `out` holds something else.
    """
    given: dict[View, Path | None] = {"image": image, "text": text}
    runs = {view: run for view, run in given.items() if run is not None}
    if not runs:
        raise BadInput("embed: name at least one run, --image RUN or --text RUN")
    runtime = Runtime(config.device)
    shard_set = ShardSet(shards)
    parents = stage.parents_for(out, shards=shards, **runs)
    with runtime.stage(out, stage.EMBEDDING, result_options(config), parents) as done:
        if not done:
            _embed_parts(shard_set, runs, out, config, runtime)
            _finish(shard_set, out, config, runtime)
    return stage_files.open_finished(out, stage.EMBEDDING)["counts"]


def _embed_parts(
    shard_set: ShardSet, runs: dict[View, Path], out: Path, config: EmbedConfig, runtime: Runtime
) -> None:
    for view, run in runs.items():
        if not runtime.stop_asked():
            _embed_view(shard_set, view, run, out, config, runtime)
    runtime.stop_together(out)


def _embed_view(
    shard_set: ShardSet, view: View, run: Path, out: Path, config: EmbedConfig, runtime: Runtime
) -> None:
    """This rank's parts that are not there yet, until a signal asks for a stop."""
    reader, packed = shard_set.reader(), shard_set.packed
    encoder = load_encoder(run / "encoder", view).to(runtime.device)
    encoder.precision = config.precision
    here = packed[f"has_{view}"].to_numpy()
    todo = {
        part: (rows, plan_batches(reader, np.asarray(rows)[here[rows]], config.batch_size))
        for part, rows in runtime.share(list(enumerate(row_blocks(len(packed)))))
        if not part_path(out, view, part).exists()
    }
    # One loader for all parts: its workers start once.
    ahead = [plan for _, plans in todo.values() for plan in plans]
    batches = load(reader, encoder.inputs(), ahead, config.workers)
    quiet = None if runtime.is_main else True
    for part, (rows, plans) in tqdm(todo.items(), f"embed {view}", unit="part", disable=quiet):
        vectors = np.zeros((len(rows), encoder.width), config.dtype)
        for items, unit in unit_vectors(encoder, batches, len(plans), runtime.device):
            vectors[items - rows.start] = unit
            if runtime.stop_asked():
                return  # a signal's grace may be shorter than a part: what is half done is left
        if not np.isfinite(vectors).all():
            raise Failed(f"{out}: {view} part {part} has vectors that are not finite; "
                         f"the encoder of {run} is broken")  # fmt: skip
        _save_part(part_path(out, view, part), vectors)


def _save_part(path: Path, vectors: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)


def _finish(shard_set: ShardSet, out: Path, config: EmbedConfig, runtime: Runtime) -> None:
    runtime.barrier()
    if runtime.is_main:
        table = _table(shard_set)
        items = int((table.row >= 0).sum())
        _check_rows(out, items)
        _mark_unreadable(table, out, config.max_unreadable)
        write_parquet(out / "items.parquet", table)
        parts = [path for view in VIEWS for path in out.glob(f"{view}-*.npy")]
        unreadable = int((table.status == UNREADABLE).sum())
        counts = {"postings": len(table), "items": items, "unreadable": unreadable}
        stage_files.finish(out, counts, [*parts, out / "items.parquet"])
        log.info("%s: %d items embedded, %d with a part that is broken", out, items, unreadable)
    runtime.barrier()


def _table(shard_set: ShardSet) -> pd.DataFrame:
    row_of = pd.Series(np.arange(len(shard_set.packed)), index=shard_set.packed.posting_id)
    items = shard_set.items
    row = items.posting_id.map(row_of).fillna(-1).astype(np.int64)
    status = items.status.where(items.status == "rejected", "embedded")
    return items.assign(row=row, status=status)[COLUMNS]


def _mark_unreadable(table: pd.DataFrame, out: Path, budget: float) -> None:
    """A part that could not be read has a zero row: its item is taken as having no such part."""
    embedded = table[table.row >= 0].sort_values("row")
    for view in VIEWS:
        parts = [np.load(p, mmap_mode="r") for p in sorted(out.glob(f"{view}-*.npy"))]
        if not parts:
            continue
        zero = np.concatenate([~part.any(axis=1) for part in parts])
        broken = embedded.index[zero & embedded[f"has_{view}"]]
        if len(broken) > max(FEW, budget * len(embedded)):
            raise Failed(
                f"{out}: {len(broken)} of {len(embedded)} items have a broken {view}, the first "
                f"{table.posting_id[broken[0]]!r}; look with dist-train verify, restore or pack "
                "again, remove this folder, or allow it with --max-unreadable"
            )
        table.loc[broken, f"has_{view}"] = False
        table.loc[broken, "status"] = UNREADABLE


def _check_rows(out: Path, items: int) -> None:
    for view in VIEWS:
        parts = sorted(out.glob(f"{view}-*.npy"))
        rows = sum(len(np.load(part, mmap_mode="r")) for part in parts)
        if parts and rows != items:
            raise BadInput(
                f"{out}: {rows} {view} rows for {items} items; remove it and start again"
            )
