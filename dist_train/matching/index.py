"""The stage index: every rank builds the FAISS shards of its rows; ids are global row numbers."""

import logging
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from dist_train import stage
from dist_train.config import IndexConfig, View, result_options
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.views import Views, open_views
from dist_train.runtime import Runtime, row_blocks
from shards import stage_files
from shards.errors import BadInput, Corrupt, Stopped
from shards.files import atomic_path, read_json, sha256_file, write_json

FORMAT = 1
SHARD_ROWS = 1_000_000
log = logging.getLogger(__name__)


def build_index(embeddings: Path, out: Path, config: IndexConfig) -> dict[str, Any]:
    """Build a sharded index over an embedding set; what index.json says of it.

    The bounds of the shards are a function of the number of items alone. Raises BadInput when
    the set lacks a part that the view needs, or `out` holds something else.
    """
    runtime = Runtime("cpu")
    embedding_set = EmbeddingSet(embeddings)
    names = _names(embedding_set, config)
    parents = stage.parents_for(out, embedding=embeddings)
    with runtime.stage(out, stage.INDEX, result_options(config), parents) as done:
        if not done:
            views = open_views(embedding_set, names, config.image_weight)
            _build_shards(views, out, runtime)
            _finish(views, names, out, runtime)
    return read_json(out / "index.json")


def index_shards(path: Path) -> list[Path]:
    """The FAISS files of a finished index; Corrupt names one that is not as it was written."""
    files = stage_files.open_finished(path, stage.INDEX)["files"]
    shards = sorted(name for name in files if name.endswith(".faiss"))
    for name in shards:
        if not (path / name).exists() or sha256_file(path / name) != files[name]["sha256"]:
            raise Corrupt(f"{path / name}: missing or not as it was built; build the index again")
    return [path / name for name in shards]


def indexed_views(path: Path, embeddings: EmbeddingSet) -> Views:
    """The views of an embedding set that an index was built over."""
    about = read_json(path / "index.json")
    if about["format"] != FORMAT:
        raise BadInput(f"{path}: index format {about['format']}, this version reads {FORMAT}")
    return open_views(embeddings, about["views"], about["image_weight"])


def _names(embeddings: EmbeddingSet, config: IndexConfig) -> list[View]:
    choices: dict[str, list[View]] = {
        "auto": embeddings.views, "both": ["image", "text"], "image": ["image"], "text": ["text"]
    }  # fmt: skip
    names = choices[config.view]
    missing = set(names) - set(embeddings.views)
    if missing:
        raise BadInput(f"{embeddings.path}: holds no {' and no '.join(sorted(missing))} vectors")
    return names


def _build_shards(views: Views, out: Path, runtime: Runtime) -> None:
    shards = list(enumerate(row_blocks(len(views), smallest=1024, largest=SHARD_ROWS)))
    quiet = None if runtime.is_main else True
    for number, rows in tqdm(runtime.share(shards), desc="index", unit="shard", disable=quiet):
        if runtime.stop_asked():
            break
        path = out / f"shard-{number:05d}.faiss"
        if not path.exists():
            _build_shard(views, rows, path)
    if runtime.anyone_asked_to_stop():
        raise Stopped(f"{out}: stopped by a signal; the same command goes on")


def _build_shard(views: Views, rows: range, path: Path) -> None:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(views.width))
    index.add_with_ids(np.ascontiguousarray(views.database(rows)), np.asarray(rows, np.int64))
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))


def _finish(views: Views, names: list[View], out: Path, runtime: Runtime) -> None:
    runtime.barrier()
    if runtime.is_main:
        weights = {name: part.weight for name, part in views.parts.items()}
        about = {
            "format": FORMAT, "kind": "Flat", "metric": "inner product", "views": names,
            "image_weight": weights.get("image", 0.0), "items": len(views), "width": views.width,
        }  # fmt: skip
        write_json(out / "index.json", about)
        shards = sorted(out.glob("shard-*.faiss"))
        counts = {"items": len(views), "shards": len(shards)}
        stage_files.finish(out, counts, [*shards, out / "index.json"])
        log.info("%s: %d items in %d shards, views %s", out, len(views), len(shards), names)
    runtime.barrier()
