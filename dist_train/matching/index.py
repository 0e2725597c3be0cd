"""The stage index: every rank builds the FAISS shards of its rows; ids are global row numbers."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dist_train.config.options import IndexConfig, bytes_of
from dist_train.config.training import Modality, result_options
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime, row_blocks
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.faiss_library import (
    TRAIN_PER_LIST,
    Kind,
    choose_kind,
    faiss,
    gpus,
    number_of_lists,
    on_cpu,
    on_gpu,
    read_faiss,
)
from dist_train.matching.kernels import use_threads
from dist_train.matching.recall import TARGET, ShardedIndex, measured_recall
from dist_train.matching.vectors import ItemVectors, open_vectors, subset
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput
from shards.storage.files import atomic_path, write_json
from shards.storage.lock import locked
from shards.storage.stage_files import WORK

FORMAT = 3
SHARD_ROWS = 1_000_000
SHARD_COPIES = 4
"""Copies of a shard's vectors in memory while it is built: FAISS's arrays double as they grow."""
ADDED = 65_536
"""Rows in memory at one time."""
TRAINED, SHARD = f"{WORK}/trained.faiss", "shard-{:05d}.faiss"
log = logging.getLogger(__name__)


def build_index(embeddings: Path, out: Path, config: IndexConfig) -> dict[str, Any]:
    """Build a sharded index over an embedding set and return its index.json.

    The bounds of the shards are a function of the items, the width and the memory given. Raises
    BadInput when the set lacks a modality that is required, FAISS refuses the kind, or `out` holds
    something else, and Stopped after a signal: the same call continues.
    """
    runtime = Runtime("cpu")
    embedding_set = EmbeddingSet(embeddings)
    names: list[Modality] = ["image", "text"]
    if config.modality != "both":
        names = embedding_set.modalities if config.modality == "auto" else [config.modality]
    if missing := set(names) - set(embedding_set.modalities):
        raise BadInput(f"{embeddings}: holds no {' and no '.join(sorted(missing))} vectors")
    has = embedding_set.read_items([f"has_{name}" for name in names])
    empty = [name for name in names if not has[f"has_{name}"].any()]
    if empty and (config.modality != "auto" or empty == names):
        raise BadInput(
            f"{embeddings}: no item has a vector of {' or '.join(empty)} modality; index "
            "another (--modality), or embed again with what the items have"
        )
    for name in empty:
        log.warning("%s: no item has a vector of %s: it is left out", embeddings, name)
        names.remove(name)
    parents = stage.parents_for(out, embedding=embeddings)
    with runtime.stage(out, stage.INDEX, result_options(config), parents) as done:
        if not done:
            runtime.compare(embedding_set.folder, embedding_set.files(names))
            vectors = open_vectors(embedding_set, names, config.image_weight)
            memory = bytes_of(config.memory)
            kind = choose_kind(config.kind, len(vectors), vectors.width, memory)
            log.info("index kind %s: %s", kind.factory, kind.reason)
            shards = shard_rows(len(vectors), vectors.width, memory)
            try:
                _build_shards(vectors, kind, shards, out, runtime)
                runtime.alone(out, _finish, vectors, kind, shards, config, out)
            except RuntimeError as error:  # a factory string that FAISS accepts and cannot build
                if "faiss" not in str(error):
                    raise
                raise BadInput(
                    f"--kind {kind.name}: FAISS cannot build {kind.factory} over {len(vectors)} "
                    f"items ({str(error).splitlines()[-1]}); use auto, Flat, SQfp16 or IVF"
                ) from None
    return read_index_json(out)


def index_shards(path: Path) -> list[Path]:
    """The FAISS files of a finished index. Raises Corrupt when one is not as it was written."""
    folder = Folder(path, stage.INDEX)
    shards = folder.names("*.faiss")
    folder.compare(shards)
    return [path / name for name in shards]


def read_index_json(path: Path) -> dict[str, Any]:
    """index.json of an index. Raises BadInput for another version's, Corrupt if it was changed."""
    about = Folder(path, stage.INDEX).json("index.json")
    found = about.get("format") if isinstance(about, dict) else None
    if found != FORMAT:
        raise BadInput(
            f"{path}: index format {found}, this version reads {FORMAT}; build the index again"
        )
    return about


def indexed_vectors(path: Path, embeddings: EmbeddingSet) -> ItemVectors:
    """The vectors of an embedding set that an index was built over."""
    about = read_index_json(path)
    return open_vectors(embeddings, about["modalities"], about["image_weight"])


def shard_rows(items: int, width: int, memory: int) -> list[range]:
    """Row numbers of every shard: each fits in `memory` bytes while it is built."""
    fit = memory // (SHARD_COPIES * 4 * width)
    return row_blocks(items, smallest=1024, largest=max(1024, min(SHARD_ROWS, fit)))


def _build_shards(
    vectors: ItemVectors, kind: Kind, shards: list[range], out: Path, runtime: Runtime
) -> None:
    use_threads()
    # The empty index is trained once: all shards share its quantiser, and so does a restart.
    with locked(out / WORK / "lock"):
        if not (out / TRAINED).exists():
            index = faiss.index_factory(vectors.width, kind.factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                N = len(vectors)
                wanted = min(N, max(TRAIN_PER_LIST * number_of_lists(N), 20_000))
                sample = subset(vectors, np.unique(np.linspace(0, N - 1, wanted).astype(np.int64)))
                # Only inverted lists are trained as a copy on a GPU that comes back unchanged.
                copy = on_gpu(index) if gpus() and isinstance(index, faiss.IndexIVF) else index
                copy.train(sample.database(range(len(sample))))
                index = on_cpu(copy) if copy is not index else index
            with atomic_path(out / TRAINED) as temporary:
                faiss.write_index(index, str(temporary))
    quiet = None if runtime.is_main else True
    mine = runtime.share(list(enumerate(shards)))
    for number, rows in tqdm(mine, desc="index", unit="shard", disable=quiet):
        if runtime.stop_requested():
            break
        path = out / SHARD.format(number)
        if not path.exists():
            build_shard(vectors, rows, out / TRAINED, path)
    runtime.stop_together(out)


def build_shard(vectors: ItemVectors, rows: range, trained: Path, path: Path) -> None:
    """Write the FAISS file of consecutive rows, from the empty index at `trained`."""
    index = read_faiss(trained, vectors.width)
    if not isinstance(index, faiss.IndexIVF):  # an IVF stores ids itself, unless behind OPQ or PCA
        index = faiss.IndexIDMap2(index)
    elif gpus():  # a copy of another kind would gain nothing
        index = on_gpu(index)
    for start in range(rows.start, rows.stop, ADDED):
        some = range(start, min(start + ADDED, rows.stop))
        index.add_with_ids(vectors.database(some), np.asarray(some, np.int64))
    with atomic_path(path) as temporary:
        faiss.write_index(on_cpu(index), str(temporary))


def _finish(
    vectors: ItemVectors,
    kind: Kind,
    bounds: list[range],
    config: IndexConfig,
    out: Path,
) -> None:
    """Measure the index's recall, write index.json and the manifest, remove `.work`."""
    weights = {name: one.weight for name, one in vectors.modalities.items()}
    shards = [out / SHARD.format(number) for number in range(len(bounds))]
    inverted = faiss.try_extract_index_ivf(read_faiss(out / TRAINED, vectors.width))
    lists = inverted.nlist if inverted else 0
    # Without a measurement of how many lists suffice, all of them are searched.
    recall = dict[str, Any](nprobe=lists)
    if config.recall_rows:
        index = ShardedIndex(shards, kind.name, memory=bytes_of(config.memory) // 2)
        recall = measured_recall(vectors, index, config.recall_rows, lists)
    if at_50 := recall.get("recall_at_50"):
        message = "recall@50 of %s: %.4f (95 %%: %.4f to %.4f), range recall %.4f, nprobe %d"
        interval, share = (at_50["low"], at_50["high"]), recall["range_recall"]["share"]
        log.info(message, kind.factory, at_50["share"], *interval, share, recall["nprobe"])
        if lists and at_50["low"] < TARGET:
            log.warning(
                "%s finds too little even when all of its %d lists are searched: recall@50 "
                "%.3f, wanted %.2f; use a kind with larger codes, or an exact one",
                *(kind.factory, lists, at_50["share"], TARGET),
            )
    about = {
        "format": FORMAT,
        "kind": kind.name,
        "factory": kind.factory,
        "reason": kind.reason,
        "metric": "inner product",
        "modalities": list(weights),
        "image_weight": weights.get("image", 0.0),
        "items": len(vectors),
        "width": vectors.width,
        "rows": [[rows.start, rows.stop] for rows in bounds],
        "recall": recall,
    }
    write_json(out / "index.json", about)
    counts = {"items": len(vectors), "shards": len(shards)}
    stage_files.finish(out, counts, [*shards, out / "index.json"])
    shutil.rmtree(out / WORK, ignore_errors=True)
    names = " and ".join(weights)
    log.info("%s: %d items in %d shards over %s", out, len(vectors), len(shards), names)
