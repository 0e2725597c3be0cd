"""The stage match: an index over an embedding set to scored pairs and the matches among them."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train import stage
from dist_train.config import MatchConfig, result_options
from dist_train.decisions.tables import groups_table, matches_table, submission_table
from dist_train.decisions.threshold import check_threshold, decide_threshold
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.find import Search, find, finish, set_up
from dist_train.matching.index import indexed_views
from dist_train.matching.join import read_pairs
from dist_train.matching.views import Views
from dist_train.runtime import Runtime
from shards import stage_files
from shards.errors import BadInput
from shards.files import atomic_path, read_json, write_json, write_parquet
from shards.lock import locked

WORK = ".work"
log = logging.getLogger(__name__)


def match(embeddings: Path, index: Path, out: Path, config: MatchConfig) -> dict[str, Any]:
    """Match the items of an embedding set through its index; what threshold.json says.

    Raises BadInput when the index is over another embedding set, when no threshold can be chosen,
    or when `out` holds something else.
    """
    runtime = Runtime(config.device)
    embedding_set = EmbeddingSet(embeddings)
    if stage.parent(index, "embedding").resolve() != embeddings.resolve():
        raise BadInput(f"{index}: is over another embedding set than {embeddings}")
    check_threshold(embedding_set.items, config)
    options = result_options(config)
    if config.threshold_from is not None:
        options["threshold"] = read_json(config.threshold_from)["threshold"]
    parents = stage.parents_for(out, embedding=embeddings, index=index)
    with runtime.stage(out, stage.MATCHES, options, parents) as done:
        if not done:
            views = indexed_views(index, embedding_set)
            search = set_up(views, index, out, config, _given(config), runtime)
            _find(search, out, runtime)
            # A slower rank may still work in the folder that finishing takes away.
            runtime.barrier()
            if runtime.is_main:
                _finish(embedding_set, views, search, out, config)
            runtime.barrier()
    return read_json(out / "threshold.json")


def _find(search: Search, out: Path, runtime: Runtime) -> None:
    try:
        find(search, out, runtime)
    except FileNotFoundError:
        # Other workers on the same folder have finished it, and taken away what they worked in.
        if not (out / stage_files.MANIFEST).exists():
            raise


def _given(config: MatchConfig) -> float | None:
    if config.threshold_from is not None:
        return read_json(config.threshold_from)["threshold"]
    return config.threshold


def _finish(
    embedding_set: EmbeddingSet, views: Views, search: Search, out: Path, config: MatchConfig
) -> None:
    """Done by one of the workers that come here; the others find it done."""
    with locked(out / WORK / "finish"):
        if not (out / stage_files.MANIFEST).exists():
            proof = finish(search, out, config)
            _decide(embedding_set, views, proof["floor"], out, config)
    shutil.rmtree(out / WORK, ignore_errors=True)


def _decide(
    embedding_set: EmbeddingSet, views: Views, floor: float, out: Path, config: MatchConfig
) -> None:
    pairs, postings = read_pairs(out), embedding_set.postings
    chosen = decide_threshold(embedding_set.items, pairs, floor, config)
    if chosen["at_floor"]:
        log.warning("the best threshold lies at the floor %.3f: allow more pairs with "
                    "--pairs-per-item", floor)  # fmt: skip
    chosen["weights"] = {name: part.weight for name, part in views.parts.items()}
    accepted = pairs[pairs.score >= chosen["threshold"]]
    matches = matches_table(postings, accepted)
    matches["degree"] = _degrees(postings, pairs)
    write_parquet(out / "matches.parquet", matches)
    write_parquet(out / "groups.parquet", groups_table(postings, accepted))
    with atomic_path(out / "submission.csv") as temporary:
        submission_table(matches).to_csv(temporary, index=False)
    write_json(out / "threshold.json", chosen)
    counts = {"postings": len(postings), "pairs": len(pairs), "matches": len(accepted)}
    files = [path for path in out.glob("*") if path.suffix in (".parquet", ".csv")]
    files += [*(out / "pairs").glob("*.parquet"), out / "threshold.json", out / "proof.json"]
    stage_files.finish(out, counts, files)
    log.info("%s: %d matching pairs among %d postings at threshold %.4f (%s)", out, len(accepted),
             len(postings), chosen["threshold"], chosen["source"])  # fmt: skip


def _degrees(postings: pd.DataFrame, pairs: pd.DataFrame) -> np.ndarray:
    """Kept pairs of every posting, down to the floor: hubs stand out by it."""
    rows = postings.row.to_numpy()
    counts = np.bincount(np.concatenate([pairs.i, pairs.j]), minlength=int(rows.max()) + 2)
    return counts[rows] * (rows >= 0)
