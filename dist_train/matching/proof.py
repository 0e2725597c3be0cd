"""What is proven of every join: that all pairs were compared, and how well.

Coverage: the areas of the block pairs sum to N (N + 1) / 2. Margin: the coarse pass's largest
observed error lies within it. Audit: some items are scored against all others in float64 by
separate code; with no miss among m true pairs the recall is at least 1 - 3 / m at 95 % (rule of
three).
"""

import logging
from pathlib import Path

import numpy as np
from scipy.stats import beta

from dist_train.matching.blocks import required_area
from dist_train.matching.engines import Engine
from dist_train.matching.pairs import Audit, Proof
from dist_train.matching.vectors import ItemVectors, read_rows
from dist_train.matching.work_folder import WorkFolder, read_table
from shards.storage.errors import Failed

STEP = 8_192
"""Rows that the audited items are scored against at a time."""
log = logging.getLogger(__name__)


def prove(engine: Engine, out: Path, score_floor: float, audit_rows: int, pairs: int = 0) -> Proof:
    """Check a join of `pairs` pairs and return its proof. Raises Failed when it is not complete.

    An engine that is not exact is measured, not refused: its recall stands in the proof.
    """
    vectors, first_new = engine.vectors, engine.first_new
    records = list(WorkFolder(out).records().values())
    covered = sum(record["area"] for record in records) + engine.disjoint_area
    required = required_area(len(vectors), first_new)
    if covered != required:
        raise Failed(
            f"the block pairs cover {covered} pairs of {required}: remove the folder and join again"
        )
    error = max((record["error"] for record in records), default=0.0)
    margin = max((record["margin"] for record in records), default=0.0)
    checked = sum(record["checked"] for record in records)
    found = audit(vectors, out, score_floor, audit_rows, first_new)
    formula = "N_new N_old + N_new (N_new + 1) / 2" if first_new else "N (N + 1) / 2"
    lines = (
        f"{len(records)} block pairs cover {covered} pairs, all of {formula}",
        f"coarse pass off by at most {error:.1e} in {checked} checked, margin {margin:.1e}",
        f"audit of {found['rows']} rows in float64: {found['missed']} of {found['true']} pairs "
        f"missed, {found['wrong']} wrong; recall at least {found['recall_low']:.4f} (95 %)",
    )
    for line in lines:
        log.info("proof: %s", line)
    again = "join again into a new folder; if it happens again, report it"
    if found["wrong"]:
        raise Failed(f"{found['wrong']} pairs below the score floor were kept: {again}")
    if engine.exact and found["missed"]:
        of = f"{found['missed']} of {found['true']} pairs"
        raise Failed(f"{of} were missed by an exact engine: {again}")
    if engine.exact and error > margin:
        raise Failed(
            f"the coarse pass was off by {error:.1e}, allowed were {margin:.1e}: this processor's "
            "arithmetic is not as expected; join with --engine faiss"
        )
    return {
        "engine": engine.name,
        "exact": engine.exact,
        "items": len(vectors),
        "score_floor": score_floor,
        "block_pairs": len(records),
        "old": first_new,
        "pairs_covered": covered,
        "coarse_pass_error": error,
        "coarse_pass_margin": margin,
        "coarse_pass_checked": checked,
        "audit": found,
        "pairs": pairs,
        "weights": {name: one.weight for name, one in vectors.modalities.items()},
    }


def audit(
    vectors: ItemVectors, out: Path, score_floor: float, rows: int, first_new: int = 0
) -> Audit:
    """Compare the pairs of some new items with all of theirs, in float64 by separate code."""
    N = len(vectors)
    some = np.unique(np.linspace(first_new, N - 1, min(rows, N - first_new)).astype(np.int64))
    ours: set[int] = set()
    for path in sorted((out / "pairs").glob("*.parquet")):
        table = read_table(path)
        table = table[np.isin(table.i, some) | np.isin(table.j, some)]
        ours.update((table.i * N + table.j).tolist())
    true, near = _true_pairs(vectors, some, score_floor)
    # The two float64 sums differ by 1e-15: at the floor the exact score decides.
    edge = np.array(sorted(near), np.int64)
    if len(edge):
        scores = vectors.scores(edge // N, edge % N)["score"]
        true |= set(edge[scores >= np.float32(score_floor)].tolist())
    missed, m = len(true - ours), len(true)
    return {
        "rows": len(some),
        "true": m,
        "missed": missed,
        "wrong": len(ours - true),
        "recall": (m - missed) / m if m else 1.0,
        "recall_low": float(beta.ppf(0.05, m - missed, missed + 1)) if m > missed else 0.0,
    }


def _true_pairs(
    vectors: ItemVectors, some: np.ndarray, score_floor: float
) -> tuple[set[int], set[int]]:
    """Codes i N + j, i < j, of the pairs of rows `some` (n,) clearly above the score floor, and of
    those within 1e-7 of it."""
    above: set[int] = set()
    edge: set[int] = set()
    mine = {name: vectors.stored_rows(name, some) for name in vectors.modalities}
    for start in range(0, len(vectors), STEP):
        block = range(start, min(start + STEP, len(vectors)))
        total = np.zeros((len(some), len(block)))
        weight = np.zeros_like(total)
        for name, one in vectors.modalities.items():
            both = np.outer(one.present[some], one.present[block.start : block.stop])
            rows = read_rows(one.rows, block).astype(np.float64)
            total += one.weight * (mine[name] @ rows.T) * both
            weight += one.weight * both
        with np.errstate(invalid="ignore"):
            score = total / weight
        near = abs(score - score_floor) < 1e-7
        for chosen, codes in ((score >= score_floor + 1e-7, above), (near, edge)):
            a, b = np.nonzero(chosen)
            i, j = some[a], b + start
            code = np.minimum(i, j) * len(vectors) + np.maximum(i, j)
            codes.update(code[i != j].tolist())
    return above, edge
