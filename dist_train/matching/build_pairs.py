"""The stage join: the items of an embedding set, through its index, to scored pairs."""

import logging
from pathlib import Path
from typing import Any

from dist_train.config.options import JoinConfig, result_options
from dist_train.distributed import stage
from dist_train.distributed.memory import peak_bytes
from dist_train.distributed.runtime import Runtime
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.index import indexed_views
from dist_train.matching.search import find, finish, set_up
from dist_train.matching.threads import use_huge_pages
from dist_train.matching.work_folder import Work
from shards.storage import stage_files
from shards.storage.errors import BadInput, Stopped
from shards.storage.files import read_json
from shards.storage.lock import locked

log = logging.getLogger(__name__)


def build_pairs(embeddings: Path, index: Path, out: Path, config: JoinConfig) -> dict[str, Any]:
    """Find the scored pairs of an embedding set and prove that none is missing: its proof.json.

    Any number of processes may share `out`, of one launcher or started each by itself; all of them
    return when all is done. Raises BadInput when the index is over another embedding set or `out`
    holds something else, Stopped after a signal: the same call goes on.
    """
    use_huge_pages()
    runtime = Runtime(config.device)
    embedding_set = EmbeddingSet(embeddings)
    if stage.parent(index, "embedding").resolve() != embeddings.resolve():
        raise BadInput(f"{index}: is over another embedding set than {embeddings}")
    parents = stage.parents_for(out, embedding=embeddings, index=index)
    with runtime.stage(out, stage.PAIRS, result_options(config), parents) as done:
        if not done:
            search = set_up(indexed_views(index, embedding_set), index, out, config, runtime)
            try:
                find(search, out, runtime)
            except Stopped:
                pass  # another rank may have found all done just before: they leave together
            except FileNotFoundError:
                # Other workers on the same folder have finished it and taken away `.work`.
                if not (out / stage_files.MANIFEST).exists():
                    raise
            # A slower rank may still work in the folder that finishing takes away.
            runtime.stop_together(out)
            if runtime.is_main:
                # Of several mains, each of a launcher of its own, one finishes.
                with locked(Work(out).hidden / "finish"):
                    if not (out / stage_files.MANIFEST).exists():
                        proof = finish(search, out, config)
                        files = [*out.glob("*.parquet"), *(out / "pairs").glob("*.parquet")]
                        counts = {name: proof[name] for name in ("items", "pairs")}
                        stage_files.finish(out, counts, [*files, out / "proof.json"])
                        log.info("%s: %d pairs of %d items score %.3f or more", out,
                                 proof["pairs"], proof["items"], proof["floor"])  # fmt: skip
                Work(out).clear()
                log.info("memory: at most %.2f GB were held to the end", peak_bytes() / 1e9)
            runtime.barrier()
    return read_json(out / "proof.json")
