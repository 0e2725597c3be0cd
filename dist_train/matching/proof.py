"""What is printed with every result: that all was looked at, and how well.

Coverage (the tiles' areas sum to N (N + 1) / 2), the first pass's largest observed error against
its margin, and an audit: some rows scored against all others in float64 by other code. With no miss
among m true pairs the recall is at least 1 - 3 / m at 95 % (rule of three).
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from dist_train.matching.blocks import area_wanted
from dist_train.matching.engines import Engine
from dist_train.matching.rows import read_rows, take_rows
from dist_train.matching.vectors import ItemVectors
from dist_train.matching.work_folder import Work, read_table
from shards.storage.errors import Failed

STEP = 8_192
log = logging.getLogger(__name__)


def prove(
    views: ItemVectors, engine: Engine, out: Path, floor: float, audit_rows: int, first_new: int = 0
) -> dict[str, Any]:
    """What is known of a finished join; Failed when it is not what it must be.

    An engine that is not exact is measured, not refused: its recall stands in the proof. Of rows
    before `first_new` only the pairs with later ones were looked for.
    """
    records = list(Work(out).records().values())
    covered = sum(record["area"] for record in records) + engine.apart
    wanted = area_wanted(len(views), first_new)
    if covered != wanted:
        raise Failed(
            f"the tiles cover {covered} pairs of {wanted}: remove the folder and join again"
        )
    found = {
        "engine": engine.name,
        "exact": engine.exact,
        "items": len(views),
        "floor": floor,
        "tiles": len(records),
        "old": first_new,
        "pairs_covered": covered,
        "first_pass_error": max((record["error"] for record in records), default=0.0),
        "first_pass_margin": max((record["margin"] for record in records), default=0.0),
        "first_pass_checked": sum(record["checked"] for record in records),
        "audit": audit(views, out, floor, audit_rows, first_new),
    }
    _judge(found, engine)
    _log(found)
    return found


def _log(proof: dict[str, Any]) -> None:
    whole = "N (N + 1) / 2"
    if proof["old"]:
        whole = "N_new N_old + N_new (N_new + 1) / 2, N_old = %(old)d,"
    log.info(
        f"proof: %(tiles)d tiles cover %(pairs_covered)d pairs, all of {whole} for the %(items)d "
        "items",
        proof,
    )
    log.info(
        "proof: first pass off by at most %(first_pass_error).1e in %(first_pass_checked)d looked "
        "at, margin %(first_pass_margin).1e",
        proof,
    )
    log.info(
        "proof: audit of %(rows)d rows in float64: %(missed)d of %(true)d pairs missed, %(wrong)d "
        "wrong; recall at least %(recall_low).4f (95 %%)",
        proof["audit"],
    )


def audit(
    views: ItemVectors, out: Path, floor: float, rows: int, first_new: int = 0
) -> dict[str, Any]:
    """Compare the pairs of some items with all of theirs, computed in float64 by other code."""
    N = len(views)
    some = np.unique(np.linspace(first_new, N - 1, min(rows, N - first_new)).astype(np.int64))
    ours: set[int] = set()
    for path in sorted((out / "pairs").glob("*.parquet")):
        table = read_table(path)
        table = table[np.isin(table.i, some) | np.isin(table.j, some)]
        ours.update((table.i * N + table.j).tolist())
    true, near = _true_pairs(views, some, floor)
    # Between the two sums in float64 lies 1e-15: on the edge the score that decides decides.
    edge = np.array(sorted(near), np.int64)
    if len(edge):
        scores = views.scores(edge // N, edge % N)["score"]
        true |= set(edge[scores >= np.float32(floor)].tolist())
    missed, m = len(true - ours), len(true)
    low = float(beta.ppf(0.05, m - missed, missed + 1)) if m > missed else 0.0
    return {
        "rows": len(some), "true": m, "missed": missed, "wrong": len(ours - true),
        "recall": (m - missed) / m if m else 1.0, "recall_low": low,
    }  # fmt: skip


def _true_pairs(views: ItemVectors, some: np.ndarray, floor: float) -> tuple[set[int], set[int]]:
    """Pairs i N + j, i < j, clearly above the floor; and those within 1e-7 of it."""
    above: set[int] = set()
    edge: set[int] = set()
    mine = {name: take_rows(part.rows, some) for name, part in views.parts.items()}
    for start in range(0, len(views), STEP):
        block = range(start, min(start + STEP, len(views)))
        total = np.zeros((len(some), len(block)))
        weight = np.zeros_like(total)
        for name, part in views.parts.items():
            here = np.outer(part.present[some], part.present[block.start : block.stop])
            rows = read_rows(part.rows, block).astype(np.float64)
            total += part.weight * (mine[name] @ rows.T) * here
            weight += part.weight * here
        with np.errstate(invalid="ignore"):
            score = total / weight
        for chosen, into in ((score >= floor + 1e-7, above), (abs(score - floor) < 1e-7, edge)):
            a, b = np.nonzero(chosen)
            i, j = some[a], b + start
            code = np.minimum(i, j) * len(views) + np.maximum(i, j)
            into.update(code[i != j].tolist())
    return above, edge


def _judge(found: dict[str, Any], engine: Engine) -> None:
    audit_ = found["audit"]
    if audit_["wrong"]:
        raise Failed(f"{audit_['wrong']} pairs below the floor were kept: join again into a new "
                     "folder; if it comes back, report it")  # fmt: skip
    if engine.exact and audit_["missed"]:
        raise Failed(
            f"{audit_['missed']} of {audit_['true']} pairs were missed by an exact "
            "engine: join again into a new folder; if it comes back, report it"
        )
    if engine.exact and found["first_pass_error"] > found["first_pass_margin"]:
        raise Failed(f"the first pass was off by {found['first_pass_error']:.1e}, allowed were "
                     f"{found['first_pass_margin']:.1e}: this processor's arithmetic is not "
                     "as expected; join with --engine faiss")  # fmt: skip
