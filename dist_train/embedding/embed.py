"""The stage embed: encoders over a shard set, exactly one row an item.

A block of rows (a function of the number of items alone) is the unit of work, commit and resume;
blocks are dealt to the ranks in turn, which do not communicate before the end.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from dist_train.config.options import EmbedConfig
from dist_train.config.training import Modality, result_options
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime, row_blocks
from dist_train.embedding.store import COLUMNS, ITEMS, MODALITIES, open_rows, part_path
from dist_train.encoders.batches import FEW, INTACT, load, plan_batches, unit_vectors
from dist_train.encoders.encoder import load_encoder
from dist_train.encoders.source import ENCODER_FILES
from shards.catalogue.columns import set_aside
from shards.pack.items import OWN
from shards.read.location import Folder, Location
from shards.read.shard_set import ShardSet
from shards.storage import stage_files
from shards.storage.errors import BadInput, Failed
from shards.storage.files import atomic_path, write_parquet

NOT_CARRIED = (*COLUMNS, *OWN, "image", "tar")
"""Columns of a shard set's items.parquet that are not the user's, or only name the photo's file."""
UNREADABLE = "unreadable"
log = logging.getLogger(__name__)


def embed(
    shards: Location, out: Path, config: EmbedConfig, image: Path | None, text: Path | None
) -> dict[str, int]:
    """Embed every item of `shards` with the encoders of the given runs.

    image, text: run directories, at least one. Returns the counts of the embedding set.
    Raises BadInput when no run is given, one is unfinished, or `out` holds something else; Failed
    when too many items are unreadable or an encoder gives NaN or Inf; Stopped after a signal.
    """
    given = zip(MODALITIES, (image, text), strict=True)
    runs = {modality: run for modality, run in given if run is not None}
    if not runs:
        raise BadInput("embed: name at least one run, --image RUN or --text RUN")
    runtime = Runtime(config.device)
    shard_set = ShardSet(shards)
    for modality in runs:
        if not shard_set.packed[f"has_{modality}"].any():
            what = {"image": "a photo", "text": "a title"}[modality]
            raise BadInput(f"{shard_set.location}: no item has {what}; leave out --{modality}")
    parents = stage.parents_for(out, shards=shards, **runs)
    with runtime.stage(out, stage.EMBEDDING, result_options(config), parents) as done:
        if not done:
            # Here, since a rank that has received a stop signal leaves out what others may begin.
            for folder in (Folder(run, stage.RUN) for run in runs.values()):
                runtime.compare(folder, folder.names(ENCODER_FILES))
            for modality, run in runs.items():
                if not runtime.stop_requested():
                    _embed_modality(shard_set, modality, run, out, config, runtime)
            # Some ranks may still have a block to do when a signal comes.
            runtime.stop_together(out)
            runtime.alone(out, _finish, shard_set, out, config)
    return stage_files.open_finished(out, stage.EMBEDDING)["counts"]


def _embed_modality(
    shard_set: ShardSet,
    modality: Modality,
    run: Path,
    out: Path,
    config: EmbedConfig,
    runtime: Runtime,
) -> None:
    """Write this rank's blocks that do not exist yet; returns early when a stop is requested."""
    reader, packed = shard_set.reader(), shard_set.packed
    encoder = load_encoder(run / "encoder", modality, config.trust_remote_code)
    encoder.to(runtime.device)
    encoder.precision = config.precision
    has = packed[f"has_{modality}"].to_numpy()
    todo = {
        number: (rows, plan_batches(reader, np.asarray(rows)[has[rows]], config.batch_size))
        for number, rows in runtime.share(list(enumerate(row_blocks(len(packed)))))
        if not part_path(out, modality, number).exists()
    }
    # One loader for all blocks, so that its workers start once.
    all_plans = [plan for _, plans in todo.values() for plan in plans]
    batches = load(
        reader,
        encoder.inputs(),
        all_plans,
        config.workers,
        refuse_damaged=not config.max_unreadable,
    )
    # None shows the progress on a terminal only.
    disable = None if runtime.is_main else True
    progress = tqdm(todo.items(), f"embed {modality}", unit="block", disable=disable)
    for number, (rows, plans) in progress:
        vectors = np.zeros((len(rows), encoder.width), config.dtype)
        for items, unit in unit_vectors(encoder, batches, len(plans), runtime.device):
            vectors[items - rows.start] = unit
            if runtime.stop_requested():
                # The block may take longer than a signal's grace period, so it is not completed.
                return
        if not np.isfinite(vectors).all():
            raise Failed(
                f"{out}: {modality} block {number} has vectors with NaN or Inf; the encoder of "
                f"{run} is broken"
            )
        path = part_path(out, modality, number)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)


def carried_columns(postings: pd.DataFrame) -> list[str]:
    """The columns of a shard set's items that are the user's, as an embedding set names them."""
    return [name for name in set_aside(postings, ["row"]) if name not in NOT_CARRIED]


def _finish(shard_set: ShardSet, out: Path, config: EmbedConfig) -> None:
    """On rank 0, when all blocks exist: check them, write items.parquet and the manifest."""
    packed, postings = shard_set.packed, shard_set.items
    row_of = pd.Series(np.arange(len(packed)), index=packed.posting_id)
    row = postings.posting_id.map(row_of).fillna(-1).astype(np.int64)
    status = postings.status.where(postings.status == "rejected", "embedded")
    table = set_aside(postings, ["row"]).assign(row=row, status=status)
    table = table[[*COLUMNS, *carried_columns(postings)]]
    embedded = table[table.row >= 0].sort_values("row")
    items, files = len(embedded), []
    for modality in MODALITIES:
        paths = sorted(out.glob(f"{modality}-*.npy"))
        if not paths:
            continue
        files += paths
        zero = np.concatenate([~part.any(axis=1) for part in open_rows(paths).parts])
        if len(zero) != items:
            raise BadInput(
                f"{out}: {len(zero)} {modality} rows for {items} items; remove it and start again"
            )
        # An unreadable photo or title left a zero row: its item counts as not having it.
        broken = embedded.index[zero & embedded[f"has_{modality}"]]
        if len(broken) > max(FEW, (config.max_unreadable or INTACT) * items):
            raise Failed(
                f"{out}: {len(broken)} of {items} items have a broken {modality}, the first "
                f"{table.posting_id[broken[0]]!r}; check with dist-train verify, restore or pack "
                "again, remove this folder, or allow it with --max-unreadable"
            )
        table.loc[broken, f"has_{modality}"] = False
        table.loc[broken, "status"] = UNREADABLE
    write_parquet(out / ITEMS, table)
    unreadable = int((table.status == UNREADABLE).sum())
    counts = {"postings": len(table), "items": items, "unreadable": unreadable}
    stage_files.finish(out, counts, [*files, out / ITEMS])
    log.info("%s: %d items embedded, %d with a broken photo or title", out, items, unreadable)
