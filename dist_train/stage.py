"""The chain of stage directories: what each was made from, by relative path and fingerprint."""

import os
from pathlib import Path
from typing import Any

from shards import stage_files
from shards.errors import BadInput
from shards.files import read_json
from shards.packer import KIND as SHARDS

RUN, EMBEDDING, INDEX, MATCHES = "run", "embedding set", "index", "matches"
KINDS = {"shards": SHARDS, "image": RUN, "text": RUN, "embedding": EMBEDDING, "index": INDEX}
"""Name of a parent in stage.json to the kind of directory it must be."""


def parents_for(out: Path, **paths: Path | None) -> dict[str, Any]:
    """The `parents` of a stage to be written at `out`; each must be finished and of its kind."""
    return {
        name: {
            "path": os.path.relpath(path.resolve(), out.resolve()),
            "fingerprint": stage_files.open_finished(path, KINDS[name])["fingerprint"],
        }
        for name, path in paths.items()
        if path is not None
    }


def parent(path: Path, name: str) -> Path:
    """The directory that `path` was made from; refused when it has changed since."""
    known = read_json(path / stage_files.STAGE)["parents"]
    if name not in known:
        raise BadInput(f"{path}: was not made from any {name}")
    found = Path(os.path.normpath(path.resolve() / known[name]["path"]))
    fingerprint = stage_files.open_finished(found, KINDS[name])["fingerprint"]
    if fingerprint != known[name]["fingerprint"]:
        raise BadInput(f"{path}: was made from another {name} than now lies at {found}")
    return found
