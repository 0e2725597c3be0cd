"""An embedding set with planted groups, made by hand, and its pairs by the definition."""

from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.distributed.stage import EMBEDDING
from dist_train.embedding.store import part_path
from dist_train.matching.join import sorted_pairs
from dist_train.matching.work_folder import read_table
from shards.storage import stage_files
from shards.storage.files import write_parquet


def planted(N: int, D: int, dtype: str = "float16", seed: int = 0) -> dict[str, np.ndarray]:
    """Unit rows of both modalities: groups of four, copies, ties; a fifth lacks a modality."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.arange(N) // 4)
    out = {}
    for name, lacking in (("image", 1), ("text", 2)):
        rows = rng.standard_normal((N // 4 + 1, D))[group] + 0.8 * rng.standard_normal((N, D))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rows[::50] = rows[0]  # copies of one another
        rows[1::40] = np.sign(rows[1::40]) / np.sqrt(D)  # scores on a grid: ties
        rows[np.arange(N) % 10 == lacking] = 0
        rows[5::200] = 0  # neither part
        out[name] = rows.astype(dtype)
    return out


def write_set(
    out: Path, vectors: dict[str, np.ndarray], part_rows: int = 700,
    products: np.ndarray | None = None,
) -> None:  # fmt: skip
    """The set on disk, without labels, or all of it val with these `products` (N,)."""
    N = len(next(iter(vectors.values())))
    stage_files.begin(out, EMBEDDING, {"by": "hand"}, {})
    files, has = [out / "items.parquet"], {}
    for name in ("image", "text"):
        has[name] = vectors[name].any(1) if name in vectors else np.zeros(N, bool)
        for number, start in enumerate(range(0, N, part_rows) if name in vectors else ()):
            files.append(part_path(out, name, number))
            np.save(files[-1], vectors[name][start : start + part_rows])
    labels = "" if products is None else [f"g{product}" for product in products]
    table = {
        "row": np.arange(N), "posting_id": [f"p{n}" for n in range(N)], "label_group": labels,
        "split": "unlabelled" if products is None else "val", "title": "",
        "has_image": has["image"], "has_text": has["text"],
        "status": "embedded", "sha256": "", "phash": "", "photo_group": -1,
    }  # fmt: skip
    write_parquet(files[0], pd.DataFrame(table))
    stage_files.finish(out, {"items": N}, files)


def true_pairs(vectors: dict[str, np.ndarray], score_floor: float, weight: float = 0.5):
    """(i, j) arrays, i < j, of all pairs that reach the score floor: float64 sums, rounded once."""
    weights = {"image": weight, "text": 1 - weight} if len(vectors) > 1 else {}
    total, shares = 0.0, 0.0
    for name, rows in vectors.items():
        here, wide = rows.any(1), rows.astype(np.float64)
        both = np.outer(here, here)
        total = total + weights.get(name, 1.0) * (wide @ wide.T) * both
        shares = shares + weights.get(name, 1.0) * both
    with np.errstate(invalid="ignore"):
        return np.nonzero(
            np.triu((total / shares).astype(np.float32) >= np.float32(score_floor), 1)
        )


def read_pairs(out: Path) -> pd.DataFrame:
    """All pairs below `out`, of an unfinished join too: i, j and the scores, by i, then j."""
    return sorted_pairs([read_table(file) for file in sorted((out / "pairs").glob("*.parquet"))])
