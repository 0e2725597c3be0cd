"""From views to a finished join: the floor, the engine and its bounds, the work, the proof."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import JoinConfig, bytes_of
from dist_train.matching.blocks import blocks_of
from dist_train.matching.canaries import Canaries, with_canaries
from dist_train.matching.choosing import (
    MEASURED_FROM,
    Choice,
    choose_sketch,
    faiss_nanoseconds,
)
from dist_train.matching.engines import Engine, GemmEngine
from dist_train.matching.index import index_about, index_shards
from dist_train.matching.join import Wanted, join, settle_pairs
from dist_train.matching.kernels import BYTES, kernels_for
from dist_train.matching.kinds import EXACT
from dist_train.matching.memory import Bounds, join_bounds
from dist_train.matching.nearest import merged_nearest
from dist_train.matching.proof import prove
from dist_train.matching.sampling import HIGHEST_FLOOR, floor_of_sample, sample_rows
from dist_train.matching.sketches import Sketch
from dist_train.matching.views import Views
from dist_train.matching.work import Work
from dist_train.runtime import Runtime, bf16_pays, give_back, peak_bytes
from shards.files import atomic_path, read_json, write_json

SLACK = 2.0
"""The budget is passed by the sample's error before the floor rises."""
NEAR_COPIES = 0.9
"""A floor from which on little but copies is found."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """A join that is set up: what every worker of it knows."""

    views: Views
    canaries: Canaries
    engine: Engine
    wanted: Wanted
    bounds: Bounds
    first_new: int = 0
    """Rows before it were joined already; their pairs with one another are left out."""


def set_up(
    views: Views, index: Path | None, out: Path, config: JoinConfig, runtime: Runtime,
    first_new: int = 0, floor: float | None = None,
) -> Search:  # fmt: skip
    """Agree with the other workers on the floor, the engine and the blocks.

    `index` is looked at by the engine faiss alone; the floor of the budget is taken where none is
    given. Raises BadInput when the memory is too little.
    """
    items = len(views)
    plan = _agreed(Work(out), lambda: _plan(views, index, config, runtime, floor))
    with_them, canaries = with_canaries(views, plan["floor"])
    bounds = _bounds(with_them, config, plan)
    engine = _engine(with_them, items, index, config, plan, bounds, runtime, first_new)
    _announce(plan, bounds, runtime)
    budget = SLACK * config.pairs_per_item * items
    limit = config.max_score_floor
    highest = HIGHEST_FLOOR if limit is None else min(limit, HIGHEST_FLOOR)
    wanted = Wanted(plan["floor"], config.neighbours, budget, highest, items)
    return Search(with_them, canaries, engine, wanted, bounds, first_new)


def find(search: Search, out: Path, runtime: Runtime) -> None:
    """Work until every tile is committed, by this process or by others."""
    join(search.views, search.engine, search.wanted, out, runtime)
    search.engine.release()
    give_back()
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
    kept = settle_pairs(out, floor, search.canaries.items)["pairs"]
    if kept > wanted.budget:
        log.warning("%d pairs are kept, more than the budget of %.0f: they score %.3f and above, "
                    "and the floor is raised no further", kept, wanted.budget, floor)  # fmt: skip
    give_back()
    proof = prove(search.views, search.engine, search.canaries, out, floor, config.audit_rows,
                  search.first_new)  # fmt: skip
    weights = {name: part.weight for name, part in search.views.parts.items()}
    proof |= {"pairs": kept, "weights": weights}
    write_json(out / "proof.json", proof)
    give_back()
    if wanted.k:
        files = sorted(work.nearest.glob("*.parquet"))
        items = search.canaries.items
        merged_nearest(files, search.views, wanted.k, out / "nearest.parquet", items)
        give_back()
    return proof


def _agreed(work: Work, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the first worker decided, all of it in memory: the folder may be cleared after this."""
    with work.locked():
        path = work.hidden / "plan.json"
        if not path.exists():
            plan = decide()
            for parts, told in plan["first_pass"].items():
                columns = told.pop("columns")
                told["width"] = None if columns is None else columns.shape[-1]
                if columns is not None:
                    _save(_columns_path(work, parts), columns)
            write_json(path, plan)
        plan = read_json(path)
        for parts, told in plan["first_pass"].items():
            whole = told["width"] is None
            told["columns"] = None if whole else np.load(_columns_path(work, parts))
    return plan


def _columns_path(work: Work, parts: str) -> Path:
    return work.hidden / f"columns-{parts}.npy"


def _save(path: Path, columns: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, columns)


def _plan(
    views: Views, index: Path | None, config: JoinConfig, runtime: Runtime, floor: float | None
) -> dict[str, Any]:
    """What the first worker decides for all: the floor, the engine, how the first pass goes."""
    floor = floor_of_sample(views, config.pairs_per_item) if floor is None else floor
    limit = config.max_score_floor
    if limit is not None and limit < floor:
        log.warning("--max-score-floor %.3f is below the floor %.3f of the pair budget: "
                    "the budget is passed over", limit, floor)  # fmt: skip
        floor = limit
    if floor >= NEAR_COPIES and limit is None:
        log.warning("so many items are all but copies of one another that the pair budget leaves "
                    "scores from %.3f on alone: look for one photo under many products, or allow "
                    "more with --pairs-per-item", floor)  # fmt: skip
    choices = first_passes(views, floor, config.neighbours, runtime)
    kind = index_about(index)["kind"] if index else None
    name, reason = config.engine, "asked for"
    if name == "auto":
        name, reason = _faster_engine(views, kind, choices, floor, runtime)
    kind = kind if name == "faiss" else "Flat"
    return {
        "format": 1, "floor": floor, "engine": name, "reason": reason,
        "kind": kind, "k": config.neighbours,
        "memory": bytes_of(config.memory), "items": len(views),
        "first_pass": {
            "+".join(parts): {
                "kernel": best.sketch.kernel.name, "nanoseconds": best.nanoseconds,
                "columns": best.sketch.columns,
                "considered": [str(choice) for choice in found[:4]],
            }
            for parts, found in choices.items() for best in found[:1]
        },
    }  # fmt: skip


def _faster_engine(
    views: Views, kind: str | None, choices: dict[tuple[str, ...], list[Choice]], floor: float,
    runtime: Runtime,
) -> tuple[str, str]:  # fmt: skip
    """The engine for these items on this machine, and why."""
    if runtime.device.type != "cpu":
        return "gemm", "FAISS has no range search on a GPU"
    if kind is None:
        return "gemm", "there is no index"
    if kind not in EXACT:
        return "gemm", f"it is exact, the index of kind {kind} is not"
    parts = max(choices, key=len)
    ours = choices[parts][0].nanoseconds
    if not ours:
        return "gemm", f"{len(views)} items are done at once by either"
    theirs = faiss_nanoseconds(sample_rows(views, parts), kind, floor)
    told = f"{ours:.2f} ns a pair, faiss {theirs:.2f} (measured on a sample)"
    return ("gemm" if ours <= theirs else "faiss"), f"gemm takes {told}"


def first_passes(
    views: Views, floor: float, k: int, runtime: Runtime
) -> dict[tuple[str, ...], list[Choice]]:
    """By the parts that are compared: what the first pass may be, the cheapest first."""
    kernels = kernels_for(runtime.device, bf16_pays(runtime.device))
    kernels = kernels if len(views) >= MEASURED_FROM else kernels[:1]
    found = {}
    for parts in {block.parts for block in blocks_of(views, len(views) or 1)}:
        rows = sample_rows(views, parts)
        ends = np.cumsum([views.parts[name].rows.width for name in parts]).tolist()
        share = k / max(1, len(views))
        found[parts] = choose_sketch(rows, kernels, floor, share, ends, len(views))
    return found


def _bounds(views: Views, config: JoinConfig, plan: dict[str, Any]) -> Bounds:
    stored = 4 * views.width  # float32, whatever their files hold
    prepared = 0
    for told in plan["first_pass"].values():
        width = views.width if told["columns"] is None else told["width"] + 16
        prepared = max(prepared, BYTES[told["kernel"]] * width)
    # A complete item is prepared once for each of the parts that others may lack.
    times = len(plan["first_pass"])
    bounds = join_bounds(len(views), stored, prepared * times, views.width, plan["memory"])
    mine = join_bounds(len(views), stored, prepared * times, views.width, bytes_of(config.memory))
    # The blocks are those of the first worker; how many are held is this one's own affair.
    return Bounds(bounds.block, min(bounds.held, mine.held), mine.bytes)


def _engine(
    views: Views, items: int, index: Path | None, config: JoinConfig, plan: dict[str, Any],
    bounds: Bounds, runtime: Runtime, first_new: int,
) -> Engine:  # fmt: skip
    if plan["engine"] == "faiss" and index:
        from dist_train.matching.faiss_engine import FaissEngine

        about = index_about(index)
        held = [range(first, last) for first, last in about["rows"]]
        size = bounds.block
        asking = [range(n, min(n + size, items)) for n in range(0, items, size)]
        asking += [range(items, len(views))] if len(views) > items else []
        return FaissEngine(views, list(zip(index_shards(index), held, strict=True)), asking,
                           about, config.neighbours, runtime.device.type)  # fmt: skip
    by_name = {kernel.name: kernel for kernel in
               kernels_for(runtime.device, bf16_pays(runtime.device))}  # fmt: skip
    plain = next(iter(by_name.values()))
    sketches = {}
    for parts, told in plan["first_pass"].items():
        # Another machine than the first worker's may lack its kernel; the pairs are the same.
        kernel = by_name.get(told["kernel"], plain)
        sketches[tuple(parts.split("+"))] = Sketch(kernel, told["columns"])
    blocks = blocks_of(views, bounds.block, first_new)
    return GemmEngine(views, blocks, sketches, bounds.held, first_new)


def _announce(plan: dict[str, Any], bounds: Bounds, runtime: Runtime) -> None:
    log.info("engine %s (%s) on %s, floor %.3f; blocks of %d rows, %d held, at most %.2f GB",
             plan["engine"], plan["reason"], runtime.device, plan["floor"], bounds.block,
             bounds.held, bounds.bytes / 1e9)  # fmt: skip
    if plan["engine"] == "gemm":
        for parts, told in plan["first_pass"].items():
            for n, choice in enumerate(told["considered"]):
                log.info("%s %s: %s", "rather than" if n else "first pass", parts, choice)
