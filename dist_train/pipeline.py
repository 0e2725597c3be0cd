"""All the stages from one config, on this machine. Each is skipped where it is done already."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_train.config import Config, TrainingOptions, View
from dist_train.decisions.match import match
from dist_train.decisions.score import evaluate
from dist_train.embedding.embed import embed
from dist_train.matching.index import build_index
from dist_train.operations.road import without_training
from dist_train.report.html import write_report
from dist_train.runtime import Clock, stop_flag, under_launcher
from dist_train.training.loop import train
from shards.errors import BadInput, Stopped
from shards.packer import pack
from shards.reader import ShardSet
from shards.workers import stops_interrupt

log = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any] | None:
    """The whole road into `config.out`; the scores on the test products, None without labels.

    Raises Stopped after a signal, whatever stage it came in; the same call goes on.
    """
    if under_launcher():
        raise BadInput("run starts its stages itself; under a launcher start them one by one")
    out, clock = config.out, Clock()
    stop_flag()  # before the first stage that asks for it
    _say("pack", config.catalogue)
    pack(config.catalogue, config.images, out / "shards", config.pack, config.columns)
    for view in config.encoders:
        _say(f"train {view}", out / view)
        train(view, out / "shards", out / view, _training(config, view))
    _embed(config, "", "embedding")
    compare: dict[str, Path] = {name: _untrained(config, name) for name in config.compare}
    _say("index", out / "index")
    build_index(out / "embedding", out / "index", config.index)
    _say("match", out / "matches")
    match(out / "embedding", out / "index", out / "matches", config.match)
    scores = _evaluate(config, compare)
    _say("report", out / "matches")
    with _interrupted(out / "matches"):
        report = write_report(out / "matches")
    log.info("all done in %.0f s; the report: %s", clock.seconds(), report)
    return scores


def _untrained(config: Config, name: str) -> Path:
    """Embeddings of the same encoders without training: published or random weights."""
    for view in config.encoders:
        start = without_training(_training(config, view), name)
        _say(f"train {view} ({name})", config.out / f"{name}-{view}")
        train(view, config.out / "shards", config.out / f"{name}-{view}", start)
    return _embed(config, f"{name}-", f"{name}-embedding")


def _embed(config: Config, prefix: str, name: str) -> Path:
    runs = {view: config.out / f"{prefix}{view}" for view in config.encoders}
    _say("embed", config.out / name)
    embed(config.out / "shards", config.out / name, config.embed, runs.get("image"),
          runs.get("text"))  # fmt: skip
    return config.out / name


def _evaluate(config: Config, compare: dict[str, Path]) -> dict[str, Any] | None:
    packed = ShardSet(config.out / "shards").packed
    if not ((packed.split == "test") & (packed.label_group != "")).any():
        log.info("no test posting has a label_group: nothing to score on")
        return None
    _say("evaluate", config.out / "matches")
    with _interrupted(config.out / "matches"):
        return evaluate(config.out / "matches", compare)


def _training(config: Config, view: View) -> TrainingOptions:
    return config.image if view == "image" else config.text


def _say(stage: str, where: Path) -> None:
    if stop_flag().asked:
        raise Stopped(f"{where}: stopped by a signal before {stage}; the same command goes on")
    log.info("── %s: %s", stage, where)


@contextmanager
def _interrupted(out: Path) -> Iterator[None]:
    """Evaluate and report look for no signal and write at their end: one stops them at once."""
    try:
        with stops_interrupt():
            yield
    except KeyboardInterrupt:
        raise Stopped(f"{out}: stopped by a signal; the same command goes on") from None
