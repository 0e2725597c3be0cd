"""The stage join: the items of an embedding set, through its index, to scored pairs."""

import logging
import os
from pathlib import Path
from typing import TypedDict

from dist_train.config.options import JoinConfig, bytes_of
from dist_train.config.training import result_options
from dist_train.distributed import stage
from dist_train.distributed.memory import peak_bytes, trim_allocators
from dist_train.distributed.precision import supports_bf16
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.blocks import Bounds, blocks_of, join_bounds
from dist_train.matching.engines import Engine, GemmEngine
from dist_train.matching.faiss_engine import FaissEngine
from dist_train.matching.faiss_library import EXACT
from dist_train.matching.index import index_shards, indexed_vectors, read_index_json
from dist_train.matching.join import JoinLimits, apply_score_floor, join
from dist_train.matching.kernels import BYTES, Kernel, kernels_for
from dist_train.matching.nearest import merge_nearest
from dist_train.matching.pairs import PairSet, Proof
from dist_train.matching.proof import prove
from dist_train.matching.sampling import (
    HIGHEST_SCORE_FLOOR,
    faiss_nanoseconds,
    sample_rows,
    sampled_score_floor,
    time_kernels,
)
from dist_train.matching.vectors import ItemVectors
from dist_train.matching.work_folder import WorkFolder
from shards.read.location import Folder
from shards.storage import stage_files
from shards.storage.errors import BadInput, Stopped
from shards.storage.files import read_json, write_json
from shards.storage.lock import locked

SLACK = 2.0
"""Factor by which the budget may be exceeded, the sample's error, before the floor is raised."""
NEAR_COPIES = 0.9
"""A score floor from which on little but copies is found."""
log = logging.getLogger(__name__)


class JoinPlan(TypedDict):
    """What the first worker decides for all of them."""

    score_floor: float
    engine: str
    reason: str
    memory: int
    kernel: str
    considered: list[str]


def build_pairs(embeddings: Path, index: Path, out: Path, config: JoinConfig) -> Proof:
    """Find the scored pairs of an embedding set and prove that none is missing: its proof.json.

    Any number of processes may share `out`, of one launcher or each started separately; all of them
    return when the join is finished. Raises BadInput when the index is over another embedding set,
    the memory is too little or `out` holds something else; Failed when the proof fails; Stopped
    after a signal, and the same call continues.
    """
    # Torch then requests pages of 2 MB, if Linux gives them on request. A product is 4 MB that is
    # allocated anew: with pages of 4 kB the page faults took nearly as long as the product.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    runtime = Runtime(config.device)
    embedding_set = EmbeddingSet(embeddings)
    if stage.parent(index, "embedding").resolve() != embeddings.resolve():
        raise BadInput(f"{index}: is over another embedding set than {embeddings}")
    parents = stage.parents_for(out, embedding=embeddings, index=index)
    with runtime.stage(out, stage.PAIRS, result_options(config), parents) as done:
        if not done:
            names = embedding_set.files(read_index_json(index)["modalities"])
            runtime.compare(embedding_set.folder, names)
            vectors = indexed_vectors(index, embedding_set)
            engine, limits, bounds = set_up(vectors, index, out, config, runtime)
            try:
                join(engine, limits, out, runtime)
            except Stopped:
                pass  # another rank may have committed the last block pair: all leave together
            except FileNotFoundError:
                # Other workers on the same folder have finished the join and removed `.work`.
                if not (out / stage_files.MANIFEST).exists():
                    raise
            # A slower rank may still work in the folder that is removed at the end.
            runtime.stop_together(out)
            runtime.alone(out, finish_once, engine, limits, bounds, out, config)
    return PairSet(out).proof


def set_up(
    vectors: ItemVectors, index: Path, out: Path, config: JoinConfig, runtime: Runtime
) -> tuple[Engine, JoinLimits, Bounds]:
    """Agree with the other workers on the score floor, the engine and the blocks.

    Raises BadInput when the memory is too little.
    """
    work, kernels = WorkFolder(out), kernels_for(runtime.device, supports_bf16(runtime.device))
    with locked(work.lock):  # no worker clears the folder now
        path = work.hidden / "plan.json"
        if not path.exists():
            write_json(path, _plan(vectors, index, config, runtime, kernels))
        plan: JoinPlan = read_json(path)  # read now: the folder may be cleared after this
    # All workers have the blocks of the first; how many of them are held is for each to decide. A
    # complete item is prepared once for each of the modalities that others may lack.
    row = 4 * vectors.width, BYTES[plan["kernel"]] * vectors.width * len(vectors.kinds)
    theirs, mine = (
        join_bounds(len(vectors), *row, vectors.width, memory)
        for memory in (plan["memory"], bytes_of(config.memory))
    )
    bounds = Bounds(theirs.block, min(theirs.held, mine.held), mine.bytes)
    engine: Engine
    if plan["engine"] == "faiss":
        folder = Folder(index, stage.INDEX)
        runtime.compare(folder, folder.names("*.faiss"))
        shards, about, device = index_shards(index), read_index_json(index), runtime.device.type
        engine = FaissEngine(vectors, shards, about, bounds.block, config.neighbours, device)
    else:
        # Another machine than the first worker's may lack its kernel; the pairs are the same.
        kernel = next((one for one in kernels if one.name == plan["kernel"]), kernels[0])
        engine = GemmEngine(vectors, blocks_of(vectors, bounds.block), kernel, bounds.held)
        log.info("kernel %s", ", rather than ".join(plan["considered"]))
    log.info(
        "engine %s (%s) on %s, score floor %.3f; blocks of %d rows, %d held, at most %.2f GB",
        *(plan["engine"], plan["reason"], runtime.device, plan["score_floor"]),
        *(bounds.block, bounds.held, bounds.bytes / 1e9),
    )
    budget, highest = SLACK * config.pairs_per_item * len(vectors), HIGHEST_SCORE_FLOOR
    if config.max_score_floor is not None:
        highest = min(config.max_score_floor, highest)
    return engine, JoinLimits(plan["score_floor"], config.neighbours, budget, highest), bounds


def _plan(
    vectors: ItemVectors, index: Path, config: JoinConfig, runtime: Runtime, kernels: list[Kernel]
) -> JoinPlan:
    """Choose the score floor, the engine for these items on this machine, and the kernel."""
    limit = config.max_score_floor
    score_floor = sampled_score_floor(vectors, config.pairs_per_item)
    if limit is not None and limit < score_floor:
        log.warning(
            "--max-score-floor %.3f is below the budget's score floor of %.3f: more pairs than "
            "--pairs-per-item are kept",
            *(limit, score_floor),
        )
        score_floor = limit
    if score_floor >= NEAR_COPIES and limit is None:
        log.warning(
            "so many items are all but copies of one another that the pair budget leaves only "
            "scores from %.3f on: look for one photo under many products, or allow more with "
            "--pairs-per-item",
            score_floor,
        )
    times = time_kernels(vectors, score_floor, config.neighbours, kernels)
    engine, reason, ours = config.engine, "requested", times[0].nanoseconds
    if engine == "auto":
        engine, kind = "gemm", read_index_json(index)["kind"]
        if runtime.device.type != "cpu":
            reason = "FAISS has no range search on a GPU"
        elif kind not in EXACT:
            reason = f"it is exact, the index of kind {kind} is not"
        elif not ours:
            reason = f"{len(vectors)} items take either engine no time"
        else:
            theirs = faiss_nanoseconds(sample_rows(vectors), kind, score_floor)
            reason = f"gemm takes {ours:.2f} ns a pair, faiss {theirs:.2f} (measured on a sample)"
            engine = "gemm" if ours <= theirs else "faiss"
    return {
        "score_floor": score_floor,
        "engine": engine,
        "reason": reason,
        "memory": bytes_of(config.memory),
        "kernel": times[0].kernel.name,
        "considered": [str(timed) for timed in times],
    }


def finish_once(
    engine: Engine, limits: JoinLimits, bounds: Bounds, out: Path, config: JoinConfig
) -> None:
    """Finish the join, unless the main rank of another launcher has, and remove `.work`."""
    with locked(WorkFolder(out).hidden / "finish"):
        if not (out / stage_files.MANIFEST).exists():
            proof = finish(engine, limits, out, config)
            files = [*out.glob("*.parquet"), *(out / "pairs").glob("*.parquet")]
            counts = {"items": proof["items"], "pairs": proof["pairs"]}
            stage_files.finish(out, counts, [*files, out / "proof.json"])
            found = proof["pairs"], proof["items"], proof["score_floor"]
            log.info("%s: %d pairs of %d items score %.3f or more", out, *found)
    WorkFolder(out).clear()
    peak, planned = peak_bytes() / 1e9, bounds.bytes / 1e9
    log.info("memory: at most %.2f GB were held, %.2f GB planned", peak, planned)


def finish(engine: Engine, limits: JoinLimits, out: Path, config: JoinConfig) -> Proof:
    """Apply the final score floor, prove the result and merge the neighbours: proof.json."""
    work = WorkFolder(out)
    score_floor = work.score_floor(limits.score_floor, limits.budget, limits.highest_score_floor)
    if score_floor > limits.score_floor:
        log.warning(
            "more than %.0f pairs: the score floor was raised from %.3f to %.3f; allow more with "
            "--pairs-per-item",
            *(limits.budget, limits.score_floor, score_floor),
        )
    kept = apply_score_floor(out, score_floor)
    if kept > limits.budget:
        log.warning(
            "%d pairs are kept, more than the budget of %.0f: they score %.3f and above, and the "
            "score floor is raised no further",
            *(kept, limits.budget, score_floor),
        )
    trim_allocators()
    proof = prove(engine, out, score_floor, config.audit_rows, kept)
    write_json(out / "proof.json", proof)
    trim_allocators()
    if limits.k:
        files = sorted(work.nearest.glob("*.parquet"))
        merge_nearest(files, engine.vectors, limits.k, out / "nearest.parquet")
        trim_allocators()
    return proof
