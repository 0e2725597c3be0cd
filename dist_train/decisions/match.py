"""The stage match: an index over an embedding set to scored pairs and the matches among them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dist_train import stage
from dist_train.config import MatchConfig, result_options
from dist_train.decisions.labelled import labelled_rows, read_labels
from dist_train.decisions.lists import pair_files, read_postings, write_lists
from dist_train.decisions.threshold import check_threshold, decide_threshold, given_threshold
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.find import Search, find, finish, set_up
from dist_train.matching.index import indexed_views
from dist_train.matching.threads import use_huge_pages
from dist_train.matching.views import Views
from dist_train.matching.work import Work
from dist_train.runtime import Runtime, peak_bytes
from shards import stage_files
from shards.errors import BadInput, Stopped
from shards.files import read_json, write_json
from shards.lock import locked

WORK = ".work"
log = logging.getLogger(__name__)


def match(embeddings: Path, index: Path, out: Path, config: MatchConfig) -> dict[str, Any]:
    """Match the items of an embedding set through its index; what threshold.json says.

    Raises BadInput when the index is over another embedding set, when no threshold can be chosen,
    or when `out` holds something else.
    """
    use_huge_pages()
    runtime = Runtime(config.device)
    embedding_set = EmbeddingSet(embeddings)
    if stage.parent(index, "embedding").resolve() != embeddings.resolve():
        raise BadInput(f"{index}: is over another embedding set than {embeddings}")
    given = given_threshold(config)
    if given is None:
        check_threshold(read_labels(embedding_set.path), config)
    options = result_options(config)
    if config.threshold_from is not None:
        options["threshold"] = given
    parents = stage.parents_for(out, embedding=embeddings, index=index)
    with runtime.stage(out, stage.MATCHES, options, parents) as done:
        if not done:
            views = indexed_views(index, embedding_set)
            search = set_up(views, index, out, config, given, runtime)
            _find(search, out, runtime)
            # A slower rank may still work in the folder that finishing takes away.
            runtime.barrier()
            if runtime.anyone_asked_to_stop():
                raise Stopped(f"{out}: stopped by a signal; the same command goes on")
            if runtime.is_main:
                _finish(embedding_set, views, search, out, config)
                log.info("memory: at most %.2f GB were held to the end", peak_bytes() / 1e9)
            runtime.barrier()
    return read_json(out / "threshold.json")


def _find(search: Search, out: Path, runtime: Runtime) -> None:
    try:
        find(search, out, runtime)
    except Stopped:
        pass  # another rank may have found all done just before: they leave together
    except FileNotFoundError:
        # Other workers on the same folder have finished it, and taken away what they worked in.
        if not (out / stage_files.MANIFEST).exists():
            raise


def _finish(
    embedding_set: EmbeddingSet, views: Views, search: Search, out: Path, config: MatchConfig
) -> None:
    """Done by one of the workers that come here; the others find it done."""
    with locked(out / WORK / "finish"):
        if not (out / stage_files.MANIFEST).exists():
            proof = finish(search, out, config)
            _decide(embedding_set, views, proof["floor"], out, config)
    Work(out).clear()


def _decide(
    embedding_set: EmbeddingSet, views: Views, floor: float, out: Path, config: MatchConfig
) -> None:
    labels = read_labels(embedding_set.path)
    rows = labelled_rows(labels, "val")
    known = np.isin(np.arange(len(labels)), rows)
    among = [p[known[p.i.to_numpy()] & known[p.j.to_numpy()]] for p in pair_files(out)]
    chosen = decide_threshold(labels, pd.concat(among, ignore_index=True), floor, config)
    if chosen["at_floor"]:
        log.warning("the best threshold lies at the floor %.3f: allow more pairs with "
                    "--pairs-per-item", floor)  # fmt: skip
    chosen["weights"] = {name: part.weight for name, part in views.parts.items()}
    postings = read_postings(embedding_set.path / "items.parquet")
    counts = write_lists(out, postings, chosen["threshold"], out / WORK / "lists")
    write_json(out / "threshold.json", chosen)
    files = [path for path in out.glob("*") if path.suffix in (".parquet", ".csv")]
    files += [*(out / "pairs").glob("*.parquet"), out / "threshold.json", out / "proof.json"]
    stage_files.finish(out, {"postings": len(postings.row)} | counts, files)
    log.info("%s: %d matching pairs among %d postings at threshold %.4f (%s)", out,
             counts["matches"], len(postings.row), chosen["threshold"],
             chosen["source"])  # fmt: skip
