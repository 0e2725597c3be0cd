"""What is printed with every result: that all was looked at, and how well.

Coverage (the tiles' areas sum to N (N + 1) / 2), the first pass's largest observed error against
its margin, planted canaries, and an audit: some rows scored against all others in float64 by other
code. With no miss among m true pairs the recall is at least 1 - 3 / m at 95 % (rule of three).
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from dist_train.matching.blocks import area_wanted
from dist_train.matching.canaries import Canaries
from dist_train.matching.engines import Engine
from dist_train.matching.rows import read_rows
from dist_train.matching.views import Views
from dist_train.matching.work import Work, read_table
from shards.errors import Failed

STEP = 8_192
log = logging.getLogger(__name__)


def prove(
    views: Views,
    engine: Engine,
    canaries: Canaries,
    out: Path,
    floor: float,
    audit_rows: int,
    first_new: int = 0,
) -> dict[str, Any]:
    """What is known of a finished join; Failed when it is not what it must be.

    An engine that is not exact is measured, not refused: its recall stands in the proof. Of rows
    before `first_new` only the pairs with later ones were looked for.
    """
    records = list(Work(out).records().values())
    found = {
        "engine": engine.name, "exact": engine.exact, "items": canaries.items, "floor": floor,
        "tiles": len(records), "old": first_new,
        "pairs_covered": _coverage(records, engine, canaries, len(views), first_new),
        "first_pass_error": max((r["error"] for r in records), default=0.0),
        "first_pass_margin": max((r["margin"] for r in records), default=0.0),
        "first_pass_checked": sum(r["checked"] for r in records),
        "canaries": _canaries(records, views, canaries, floor, engine.exact),
        "audit": audit(views, canaries.items, out, floor, audit_rows, first_new),
    }  # fmt: skip
    _judge(found, engine)
    for line in told(found):
        log.info("%s", line)
    return found


def told(proof: dict[str, Any]) -> list[str]:
    """The proof in words."""
    audit_, whole = proof["audit"], "N (N + 1) / 2"
    if proof["old"]:
        whole = f"N_new N_old + N_new (N_new + 1) / 2, N_old = {proof['old']},"
    return [
        f"proof: {proof['tiles']} tiles cover {proof['pairs_covered']} pairs, all of {whole} "
        f"for the {proof['items']} items and the canaries",
        f"proof: first pass off by at most {proof['first_pass_error']:.1e} in "
        f"{proof['first_pass_checked']} looked at, margin {proof['first_pass_margin']:.1e}",
        f"proof: {proof['canaries']['found']} of {proof['canaries']['planted']} canaries found",
        f"proof: audit of {audit_['rows']} rows in float64: {audit_['missed']} of "
        f"{audit_['true']} pairs missed, {audit_['wrong']} wrong; recall at least "
        f"{audit_['recall_low']:.4f} (95 %)",
    ]


def _coverage(
    records: list[dict[str, Any]], engine: Engine, canaries: Canaries, rows: int, first_new: int
) -> int:
    covered = sum(record["area"] for record in records) + engine.apart
    N = rows if engine.both_ways else canaries.items
    wanted = area_wanted(N, first_new)
    if covered != wanted:
        raise Failed(f"the tiles cover {covered} pairs of {wanted}: remove the folder "
                     "and join again")  # fmt: skip
    return covered


def _canaries(
    records: list[dict[str, Any]], views: Views, canaries: Canaries, floor: float, exact: bool
) -> dict[str, Any]:
    expected = canaries.expected(views, floor)
    seen = {(int(i), int(j)): s for record in records for i, j, s in record["canaries"]}
    missed = [pair for pair in expected if seen.get(pair) != expected[pair]]
    if missed and exact:
        raise Failed(f"the planted pairs {missed[:3]} were not found: remove the folder and match "
                     "again; if it comes back, report it")  # fmt: skip
    return {"planted": len(expected), "found": len(expected) - len(missed)}


def audit(
    views: Views, items: int, out: Path, floor: float, rows: int, first_new: int = 0
) -> dict[str, Any]:
    """Compare the pairs of some items with all of theirs, computed in float64 by other code."""
    some = np.linspace(first_new, items - 1, min(rows, items - first_new))
    some = np.unique(some.astype(np.int64))
    ours = _found_of(out, some, items)
    true, near = _true_pairs(views, some, items, floor)
    # Between the two sums in float64 lies 1e-15: on the edge the score that decides decides.
    edge = np.array(sorted(near), np.int64)
    if len(edge):
        scores = views.scores(edge // items, edge % items)["score"]
        true |= set(edge[scores >= np.float32(floor)].tolist())
    missed, m = len(true - ours), len(true)
    low = float(beta.ppf(0.05, m - missed, missed + 1)) if m > missed else 0.0
    return {
        "rows": len(some), "true": m, "missed": missed, "wrong": len(ours - true),
        "recall": (m - missed) / m if m else 1.0, "recall_low": low,
    }  # fmt: skip


def _true_pairs(
    views: Views, some: np.ndarray, items: int, floor: float
) -> tuple[set[int], set[int]]:
    """Pairs i N + j, i < j, clearly above the floor; and those within 1e-7 of it."""
    above: set[int] = set()
    edge: set[int] = set()
    mine = {name: part.rows.take(some) for name, part in views.parts.items()}
    for start in range(0, items, STEP):
        block = range(start, min(start + STEP, items))
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
            code = np.minimum(i, j) * items + np.maximum(i, j)
            into.update(code[i != j].tolist())
    return above, edge


def _found_of(out: Path, some: np.ndarray, items: int) -> set[int]:
    found: set[int] = set()
    for path in sorted((out / "pairs").glob("*.parquet")):
        table = read_table(path)
        table = table[np.isin(table.i, some) | np.isin(table.j, some)]
        found.update((table.i * items + table.j).tolist())
    return found


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
