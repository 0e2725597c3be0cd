"""From views to a finished join: the floor, the engine and its bounds, the work, the proof."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.config.options import JoinConfig, bytes_of
from dist_train.distributed.memory import peak_bytes, trim_allocators
from dist_train.distributed.precision import supports_bf16
from dist_train.distributed.runtime import Runtime
from dist_train.matching.blocks import blocks_of
from dist_train.matching.engines import Engine, GemmEngine
from dist_train.matching.faiss_engine import FaissEngine
from dist_train.matching.index import index_about, index_shards
from dist_train.matching.index_kinds import EXACT
from dist_train.matching.join import Wanted, join, settle_pairs
from dist_train.matching.kernel_choice import Choice, choose_kernel, faiss_nanoseconds
from dist_train.matching.kernels import Kernel, kernels_for
from dist_train.matching.memory import Bounds, join_bounds, row_bytes
from dist_train.matching.nearest import merged_nearest
from dist_train.matching.proof import prove
from dist_train.matching.sampling import HIGHEST_FLOOR, floor_of_sample, sample_rows
from dist_train.matching.vectors import ItemVectors
from dist_train.matching.work_folder import Work
from shards.storage.files import read_json, write_json

SLACK = 2.0
"""The budget is passed by the sample's error before the floor rises."""
NEAR_COPIES = 0.9
"""A floor from which on little but copies is found."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """A join that is set up: what every worker of it knows."""

    views: ItemVectors
    engine: Engine
    wanted: Wanted
    bounds: Bounds
    first_new: int = 0
    """Rows before it were joined already; their pairs with one another are left out."""


def set_up(
    views: ItemVectors,
    index: Path | None,
    out: Path,
    config: JoinConfig,
    runtime: Runtime,
    first_new: int = 0,
    floor: float | None = None,
) -> Search:
    """Agree with the other workers on the floor, the engine and the blocks.

    `index` is looked at by the engine faiss alone; the floor of the budget is taken where none is
    given. Raises BadInput when the memory is too little.
    """
    work, kernels = Work(out), kernels_for(runtime.device, supports_bf16(runtime.device))
    with work.locked():
        path = work.hidden / "plan.json"
        if not path.exists():
            write_json(path, _plan(views, index, config, runtime, floor, kernels))
        plan = read_json(path)  # whole in memory: the folder may be cleared after this
    # The blocks are those of the first worker; how many are held is this one's own affair.
    row = row_bytes(views.width, plan["kernel"], len(views.kinds))
    theirs, mine = (
        join_bounds(len(views), *row, views.width, memory)
        for memory in (plan["memory"], bytes_of(config.memory))
    )
    bounds = Bounds(theirs.block, min(theirs.held, mine.held), mine.bytes)
    engine: Engine
    if plan["engine"] == "faiss" and index:
        engine = _faiss_engine(views, index, bounds.block, config.neighbours, runtime)
    else:
        # Another machine than the first worker's may lack its kernel; the pairs are the same.
        kernel = next((one for one in kernels if one.name == plan["kernel"]), kernels[0])
        blocks = blocks_of(views, bounds.block, first_new)
        engine = GemmEngine(views, blocks, kernel, bounds.held, first_new)
        log.info("kernel %s", ", rather than ".join(plan["considered"]))
    log.info(
        "engine %s (%s) on %s, floor %.3f; blocks of %d rows, %d held, at most %.2f GB",
        *(plan["engine"], plan["reason"], runtime.device, plan["floor"]),
        *(bounds.block, bounds.held, bounds.bytes / 1e9),
    )
    budget = SLACK * config.pairs_per_item * len(views)
    limit = config.max_score_floor
    highest = HIGHEST_FLOOR if limit is None else min(limit, HIGHEST_FLOOR)
    wanted = Wanted(plan["floor"], config.neighbours, budget, highest)
    return Search(views, engine, wanted, bounds, first_new)


def find(search: Search, out: Path, runtime: Runtime) -> None:
    """Work until every tile is committed, by this process or by others."""
    join(search.views, search.engine, search.wanted, out, runtime)
    search.engine.release()
    trim_allocators()
    peak = peak_bytes()
    log.info("memory: at most %.2f GB were held, %.2f GB planned", peak / 1e9,
             search.bounds.bytes / 1e9)  # fmt: skip


def finish(search: Search, out: Path, config: JoinConfig) -> dict[str, Any]:
    """Settle the floor, prove the result, merge the nearest; what proof.json says."""
    work, wanted = Work(out), search.wanted
    floor = work.floor(wanted.floor, wanted.budget, wanted.highest)
    if floor > wanted.floor:
        log.warning("more than %.0f pairs: the floor was raised from %.3f to %.3f; allow more "
                    "with --pairs-per-item", wanted.budget, wanted.floor, floor)  # fmt: skip
    kept = settle_pairs(out, floor)
    if kept > wanted.budget:
        log.warning("%d pairs are kept, more than the budget of %.0f: they score %.3f and above, "
                    "and the floor is raised no further", kept, wanted.budget, floor)  # fmt: skip
    trim_allocators()
    proof = prove(search.views, search.engine, out, floor, config.audit_rows, search.first_new)
    weights = {name: part.weight for name, part in search.views.parts.items()}
    proof |= {"pairs": kept, "weights": weights}
    write_json(out / "proof.json", proof)
    trim_allocators()
    if wanted.k:
        files = sorted(work.nearest.glob("*.parquet"))
        merged_nearest(files, search.views, wanted.k, out / "nearest.parquet")
        trim_allocators()
    return proof


def _plan(
    views: ItemVectors,
    index: Path | None,
    config: JoinConfig,
    runtime: Runtime,
    floor: float | None,
    kernels: list[Kernel],
) -> dict[str, Any]:
    """What the first worker decides for all: the floor, the engine, the kernel."""
    floor = floor_of_sample(views, config.pairs_per_item) if floor is None else floor
    limit = config.max_score_floor
    if limit is not None and limit < floor:
        log.warning(
            "--max-score-floor %.3f is below the floor %.3f of the pair budget: "
            "the budget is passed over",
            limit,
            floor,
        )
        floor = limit
    if floor >= NEAR_COPIES and limit is None:
        log.warning("so many items are all but copies of one another that the pair budget leaves "
                    "scores from %.3f on alone: look for one photo under many products, or allow "
                    "more with --pairs-per-item", floor)  # fmt: skip
    choices = choose_kernel(views, floor, config.neighbours, kernels)
    engine, reason = config.engine, "asked for"
    if engine == "auto":
        kind = index_about(index)["kind"] if index else None
        engine, reason = _faster_engine(views, kind, choices[0], floor, runtime)
    return {
        "floor": floor,
        "engine": engine,
        "reason": reason,
        "memory": bytes_of(config.memory),
        "kernel": choices[0].kernel.name,
        "considered": [str(choice) for choice in choices],
    }


def _faster_engine(
    views: ItemVectors, kind: str | None, choice: Choice, floor: float, runtime: Runtime
) -> tuple[str, str]:
    """The engine for these items on this machine, beside an index of `kind`, and why."""
    ours = choice.nanoseconds
    if runtime.device.type != "cpu":
        return "gemm", "FAISS has no range search on a GPU"
    if kind is None:
        return "gemm", "there is no index"
    if kind not in EXACT:
        return "gemm", f"it is exact, the index of kind {kind} is not"
    if not ours:
        return "gemm", f"{len(views)} items are done at once by either"
    theirs = faiss_nanoseconds(sample_rows(views), kind, floor)
    reason = f"gemm takes {ours:.2f} ns a pair, faiss {theirs:.2f} (measured on a sample)"
    return ("gemm" if ours <= theirs else "faiss"), reason


def _faiss_engine(views: ItemVectors, index: Path, block: int, k: int, runtime: Runtime) -> Engine:
    about = index_about(index)
    held = [range(first, last) for first, last in about["rows"]]
    asking = [range(n, min(n + block, len(views))) for n in range(0, len(views), block)]
    shards = list(zip(index_shards(index), held, strict=True))
    return FaissEngine(views, shards, asking, about, k, runtime.device.type)
