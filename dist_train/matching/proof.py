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
    vectors, N = engine.vectors, len(engine.vectors)
    records = list(WorkFolder(out).records().values())
    covered, required = engine.disjoint_area, N * (N + 1) // 2
    covered += sum(record["area"] for record in records)
    if covered != required:
        raise Failed(
            f"the block pairs cover {covered} pairs of {required}: remove the folder and join again"
        )
    error = max((record["error"] for record in records), default=0.0)
    margin = max((record["margin"] for record in records), default=0.0)
    checked = sum(record["checked"] for record in records)
    found = audit(vectors, out, score_floor, audit_rows)
    for line in (
        f"{len(records)} block pairs cover {covered} pairs, all of N (N + 1) / 2",
        f"coarse pass off by at most {error:.1e} in {checked} checked, margin {margin:.1e}",
        f"audit of {found['rows']} rows in float64: {found['missed']} of {found['true']} pairs "
        f"missed, {found['wrong']} wrong; recall at least {found['recall_low']:.4f} (95 %)",
    ):
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
        "items": N,
        "score_floor": score_floor,
        "block_pairs": len(records),
        "pairs_covered": covered,
        "coarse_pass_error": error,
        "coarse_pass_margin": margin,
        "coarse_pass_checked": checked,
        "audit": found,
        "pairs": pairs,
        "weights": {name: one.weight for name, one in vectors.modalities.items()},
    }


def audit(vectors: ItemVectors, out: Path, score_floor: float, rows: int) -> Audit:
    """Compare the pairs of some items with all of theirs, in float64 by separate code."""
    N = len(vectors)
    some = np.unique(np.linspace(0, N - 1, min(rows, N)).astype(np.int64))
    ours: set[int] = set()
    for path in sorted((out / "pairs").glob("*.parquet")):
        table = read_table(path)
        table = table[np.isin(table.i, some) | np.isin(table.j, some)]
        ours.update((table.i * N + table.j).tolist())
    true: set[int] = set()
    mine = {name: vectors.stored_rows(name, some) for name in vectors.modalities}
    for start in range(0, N, STEP):
        block = range(start, min(start + STEP, N))
        total = np.zeros((len(some), len(block)))
        weight = np.zeros_like(total)
        for name, one in vectors.modalities.items():
            both = np.outer(one.present[some], one.present[block.start : block.stop])
            stored = read_rows(one.rows, block).astype(np.float64)
            total += one.weight * (mine[name] @ stored.T) * both
            weight += one.weight * both
        with np.errstate(invalid="ignore"):
            score = total / weight
        at, by = np.nonzero(score >= score_floor - 1e-7)
        i, j, clear = some[at], by + start, score[at, by] >= score_floor + 1e-7
        # The two float64 sums differ by 1e-15: at the floor the exact score decides.
        clear[~clear] = vectors.scores(i[~clear], j[~clear])["score"] >= np.float32(score_floor)
        codes = np.minimum(i, j) * N + np.maximum(i, j)
        true.update(codes[clear & (i != j)].tolist())
    missed, m = len(true - ours), len(true)
    return {
        "rows": len(some),
        "true": m,
        "missed": missed,
        "wrong": len(ours - true),
        "recall": (m - missed) / m if m else 1.0,
        "recall_low": float(beta.ppf(0.05, m - missed, missed + 1)) if m > missed else 0.0,
    }
