"""The stage index: every rank builds the FAISS shards of its rows; ids are global row numbers."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dist_train.config.options import IndexConfig, Modality, bytes_of, result_options
from dist_train.distributed import stage
from dist_train.distributed.runtime import Runtime, row_blocks
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.faiss_library import faiss, gpus, on_cpu, on_gpu
from dist_train.matching.index_kinds import (
    TRAIN_PER_LIST,
    Kind,
    choose_kind,
    empty_index,
    has_lists,
    number_of_lists,
)
from dist_train.matching.recall import TARGET, ShardedIndex, measured_recall
from dist_train.matching.threads import use_threads
from dist_train.matching.vectors import ItemVectors, open_views, subset
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import (
    atomic_path,
    read_json,
    remove_abandoned,
    sha256_file,
    write_json,
)
from shards.storage.lock import locked

FORMAT = 2
SHARD_ROWS = 1_000_000
SHARD_COPIES = 4
"""Of a shard's vectors in memory while it is built: FAISS's arrays double when they grow."""
ADDED = 65_536
"""Rows in memory at one time."""
WORK = ".work"
TRAINED = f"{WORK}/trained.faiss"
log = logging.getLogger(__name__)


def build_index(embeddings: Path, out: Path, config: IndexConfig) -> dict[str, Any]:
    """Build a sharded index over an embedding set; what index.json says of it.

    The bounds of the shards are a function of the number of items alone. Raises BadInput when
    the set lacks a part that the modality needs, or `out` holds something else.
    """
    runtime = Runtime("cpu")
    embedding_set = EmbeddingSet(embeddings)
    names = _names(embedding_set, config)
    parents = stage.parents_for(out, embedding=embeddings)
    with runtime.stage(out, stage.INDEX, result_options(config), parents) as done:
        if not done:
            views = open_views(embedding_set, names, config.image_weight)
            kind = choose_kind(config.kind, len(views), views.width, bytes_of(config.memory))
            log.info("index kind %s: %s", kind.factory, kind.reason)
            shards = shard_rows(len(views), views.width, bytes_of(config.memory))
            with _faiss_told(kind, len(views)):
                _build_shards(views, kind, shards, out, runtime)
                _finish(views, names, kind, shards, config, out, runtime)
    return read_json(out / "index.json")


@contextmanager
def _faiss_told(kind: Kind, items: int) -> Iterator[None]:
    """What FAISS makes of a string and refuses to train, to fill or to search, as bad input."""
    try:
        yield
    except RuntimeError as error:
        if "faiss" not in str(error):
            raise
        told = str(error).splitlines()[-1]
        raise BadInput(f"--kind {kind.name}: FAISS cannot build {kind.factory} over {items} items "
                       f"({told}); take auto, Flat, SQfp16 or IVF") from None  # fmt: skip


def index_shards(path: Path) -> list[Path]:
    """The FAISS files of a finished index; Corrupt names one that is not as it was written."""
    files = stage_files.open_finished(path, stage.INDEX)["files"]
    shards = sorted(name for name in files if name.endswith(".faiss"))
    for name in shards:
        if not (path / name).exists() or sha256_file(path / name) != files[name]["sha256"]:
            raise Corrupt(f"{path / name}: missing or not as it was built; build the index again")
    return [path / name for name in shards]


def index_about(path: Path) -> dict[str, Any]:
    """What index.json says; BadInput for another version's."""
    about = read_json(path / "index.json")
    told = about.get("format") if isinstance(about, dict) else None
    if told != FORMAT:
        raise BadInput(f"{path}: index format {told}, this version reads {FORMAT}; "
                       "build the index again")  # fmt: skip
    return about


def indexed_views(path: Path, embeddings: EmbeddingSet) -> ItemVectors:
    """The views of an embedding set that an index was built over."""
    about = index_about(path)
    return open_views(embeddings, about["views"], about["image_weight"])


def _names(embeddings: EmbeddingSet, config: IndexConfig) -> list[Modality]:
    choices: dict[str, list[Modality]] = {
        "auto": embeddings.modalities,
        "both": ["image", "text"],
        "image": ["image"],
        "text": ["text"],
    }
    names = choices[config.modality]
    missing = set(names) - set(embeddings.modalities)
    if missing:
        raise BadInput(f"{embeddings.path}: holds no {' and no '.join(sorted(missing))} vectors")
    return names


def shard_rows(items: int, width: int, memory: int) -> list[range]:
    """Row numbers of every shard, so that `memory` bytes hold one with room while it grows."""
    fit = memory // (SHARD_COPIES * 4 * width)
    return row_blocks(items, smallest=1024, largest=max(1024, min(SHARD_ROWS, fit)))


def shard_path(out: Path, number: int) -> Path:
    """Where a shard lies."""
    return out / f"shard-{number:05d}.faiss"


def _build_shards(
    views: ItemVectors, kind: Kind, shards: list[range], out: Path, runtime: Runtime
) -> None:
    use_threads()
    remove_abandoned(out)
    trained = _trained(views, kind, out)
    quiet = None if runtime.is_main else True
    mine = runtime.share(list(enumerate(shards)))
    for number, rows in tqdm(mine, desc="index", unit="shard", disable=quiet):
        if runtime.stop_requested():
            break
        path = shard_path(out, number)
        if not path.exists():
            build_shard(views, rows, trained, path)
    runtime.stop_together(out)


def _trained(views: ItemVectors, kind: Kind, out: Path) -> Path:
    """The empty index, made once: all shards share its quantiser, and a restart does too."""
    path = out / TRAINED
    with locked(out / WORK / "lock"):
        if not path.exists():
            with atomic_path(path) as temporary:
                index = empty_index(kind, views.width, lambda: _sample(views))
                faiss.write_index(index, str(temporary))
    return path


def _sample(views: ItemVectors) -> np.ndarray:
    wanted = max(TRAIN_PER_LIST * number_of_lists(len(views)), 20_000)
    rows = np.linspace(0, len(views) - 1, min(len(views), wanted)).astype(np.int64)
    sample = subset(views, np.unique(rows))
    return sample.database(range(len(sample)))


def build_shard(views: ItemVectors, rows: range, trained: Path, path: Path) -> None:
    index = faiss.read_index(str(trained))
    if not has_lists(index):
        index = faiss.IndexIDMap2(index)
    elif gpus():
        index = on_gpu(index)
    for start in range(rows.start, rows.stop, ADDED):
        some = range(start, min(start + ADDED, rows.stop))
        index.add_with_ids(views.database(some), np.asarray(some, np.int64))
    with atomic_path(path) as temporary:
        faiss.write_index(on_cpu(index), str(temporary))


def _finish(
    views: ItemVectors, names: list[Modality], kind: Kind, bounds: list[range], config: IndexConfig,
    out: Path, runtime: Runtime,
) -> None:  # fmt: skip
    runtime.barrier()
    if runtime.is_main:
        weights = {name: part.weight for name, part in views.parts.items()}
        shards = [shard_path(out, number) for number in range(len(bounds))]
        about = {
            "format": FORMAT, "kind": kind.name, "factory": kind.factory, "reason": kind.reason,
            "metric": "inner product", "views": names,
            "image_weight": weights.get("image", 0.0), "items": len(views), "width": views.width,
            "rows": [[rows.start, rows.stop] for rows in bounds],
            "recall": _recall(views, kind, shards, out / TRAINED, config),
        }  # fmt: skip
        write_json(out / "index.json", about)
        counts = {"items": len(views), "shards": len(shards)}
        stage_files.finish(out, counts, [*shards, out / "index.json"])
        shutil.rmtree(out / WORK, ignore_errors=True)
        log.info("%s: %d items in %d shards, views %s", out, len(views), len(shards), names)
    runtime.barrier()


def _recall(
    views: ItemVectors, kind: Kind, shards: list[Path], trained: Path, config: IndexConfig
) -> dict[str, Any]:  # fmt: skip
    """What is found of the truth, measured whatever the kind; nprobe 0 where it has no lists."""
    if not config.recall_rows:
        return {"nprobe": 0}
    inverted = faiss.try_extract_index_ivf(faiss.read_index(str(trained)))
    lists = inverted.nlist if inverted else 0
    index = ShardedIndex(shards, kind.name, memory=bytes_of(config.memory) // 2)
    found = measured_recall(views, index, config.recall_rows, lists)
    for name, told in (("recall_at_50", "recall@50"), ("range_recall", "range recall")):
        if name in found:
            log.info("%s of %s: %.4f (95 %%: %.4f to %.4f), nprobe %d", told, kind.factory,
                     *(found[name][key] for key in ("share", "low", "high")),
                     found["nprobe"])  # fmt: skip
    if lists and "recall_at_50" in found and found["recall_at_50"]["low"] < TARGET:
        log.warning("%s finds too little even in all of its %d lists: recall@50 %.3f, wanted %.2f; "
                    "take a kind with larger codes, or an exact one", kind.factory, lists,
                    found["recall_at_50"]["share"], TARGET)  # fmt: skip
    return found
