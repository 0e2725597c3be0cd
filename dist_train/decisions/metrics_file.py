"""metrics.json in a match directory, written by evaluate and read by the report."""

from typing import Any, cast

from dist_train.evaluation.scores import Scores
from shards.read.location import Folder
from shards.storage.errors import Corrupt
from shards.storage.files import read_json, write_json
from shards.storage.stage_files import is_sealed, sealed

METRICS = "metrics.json"


def write_scores(matches: Folder, scores: Scores) -> Scores:
    """Write metrics.json into a match directory and return what it holds."""
    known: dict[str, Any] = {**scores, "matches": matches.manifest["fingerprint"]}
    written = cast(Scores, sealed(known))
    write_json(matches.path / METRICS, written)
    return written


def read_scores(matches: Folder) -> Scores | None:
    """metrics.json of a match directory; None where evaluate has not been run.

    Raises Corrupt when it has changed since it was written, or is of other matches.
    """
    path = matches.path / METRICS
    if not path.exists():
        return None
    scores = read_json(path)
    if not isinstance(scores, dict) or not is_sealed(scores):
        raise Corrupt(f"{path}: differs from its own sha256; run dist-train evaluate again")
    if scores.get("matches") != matches.manifest["fingerprint"]:
        raise Corrupt(f"{path}: is of other matches; run dist-train evaluate again")
    return cast(Scores, scores)
