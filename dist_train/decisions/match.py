"""The stage match: an index over an embedding set to scored pairs and the matches among them."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from dist_train import stage
from dist_train.config import MatchConfig, result_options
from dist_train.decisions.tables import groups_table, matches_table, submission_table
from dist_train.decisions.threshold import check_threshold, decide_threshold
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.engines import Engine, GemmEngine, floor_of_sample
from dist_train.matching.index import index_shards, indexed_views
from dist_train.matching.join import WORK, join, nearest_table, read_pairs
from dist_train.matching.views import Views
from dist_train.runtime import Runtime
from shards import stage_files
from shards.errors import BadInput
from shards.files import atomic_path, read_json, write_json, write_parquet

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
            floor = _floor(views, out, config, runtime)
            engine = _engine(views, index, config, runtime)
            join(views, engine, floor, config.neighbours, out, runtime)
            if runtime.is_main:
                _decide(embedding_set, views, floor, out, config)
            runtime.barrier()
    return read_json(out / "threshold.json")


def _floor(views: Views, out: Path, config: MatchConfig, runtime: Runtime) -> float:
    """The lowest score kept: below the threshold, within the budget of pairs; kept on disk."""
    path = out / WORK / "floor.json"
    if runtime.is_main and not path.exists():
        floor = floor_of_sample(views, config.pairs_per_item, torch.device("cpu"))
        given = config.threshold
        if config.threshold_from is not None:
            given = read_json(config.threshold_from)["threshold"]
        if given is not None and given < floor:
            log.warning("threshold %.3f is below the floor %.3f of the pair budget: "
                        "the budget is passed over", given, floor)  # fmt: skip
            floor = float(given)
        write_json(path, {"floor": floor})
    return runtime.tell_all(read_json(path)["floor"] if runtime.is_main else None)


def _engine(views: Views, index: Path, config: MatchConfig, runtime: Runtime) -> Engine:
    name = config.engine
    if name == "auto":
        # FAISS has no range search on GPUs; there the stored rows are multiplied.
        name = "gemm" if runtime.device.type == "cuda" else "faiss"
        log.info("engine auto: %s on %s", name, runtime.device)
    if name == "gemm":
        return GemmEngine(views, runtime.device)
    from dist_train.matching.faiss_engine import FaissEngine

    return FaissEngine(views, index_shards(index))


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
    write_parquet(out / "nearest.parquet", nearest_table(out))
    write_parquet(out / "matches.parquet", matches)
    write_parquet(out / "groups.parquet", groups_table(postings, accepted))
    with atomic_path(out / "submission.csv") as temporary:
        submission_table(matches).to_csv(temporary, index=False)
    write_json(out / "threshold.json", chosen)
    counts = {"postings": len(postings), "pairs": len(pairs), "matches": len(accepted)}
    files = [path for path in out.glob("*") if path.suffix in (".parquet", ".csv")]
    files += [*(out / "pairs").glob("*.parquet"), out / "threshold.json"]
    stage_files.finish(out, counts, files)
    shutil.rmtree(out / WORK)
    log.info("%s: %d matching pairs among %d postings at threshold %.4f (%s)", out, len(accepted),
             len(postings), chosen["threshold"], chosen["source"])  # fmt: skip
