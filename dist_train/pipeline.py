"""All the stages of a config on this machine, one after the other; what is done is skipped."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_train.config.options import Config
from dist_train.distributed.runtime import Clock, stop_flag, under_launcher
from dist_train.evaluation.scores import Scores
from dist_train.stage_graph import Stage, stage_graph
from shards.storage.errors import BadInput, Stopped
from shards.storage.workers import stops_interrupt

log = logging.getLogger(__name__)


def run(config: Config) -> Scores | None:
    """The whole pipeline into `config.out`; the scores on the test products, None without any.

    Raises Stopped after a signal, whatever stage it came in; the same call goes on.
    """
    if under_launcher():
        raise BadInput("run starts its stages itself; under a launcher start them one by one")
    clock, results = Clock(), dict[str, Any]()
    stop_flag()  # before the first stage that asks for it
    stages = stage_graph(config)
    if stages[-2].name != "evaluate":
        log.info("no posting is of a test product: nothing to score on")
    for stage in stages:
        with _stoppable(stage):
            log.info("── %s: %s", stage.name, stage.result.parent)
            results[stage.name] = stage.call()
    log.info("all done in %.0f s; the report: %s", clock.seconds(), results["report"])
    return results.get("evaluate")


@contextmanager
def _stoppable(stage: Stage) -> Iterator[None]:
    """No stage begins after a signal; one that looks for none is interrupted by it.

    These are evaluate and report: they write one file at their end, and have no options.
    """
    where = stage.result.parent
    if stop_flag().asked:
        raise Stopped(f"{where}: stopped by a signal before {stage.name}; the same command goes on")
    if stage.options is not None:
        yield
        return
    try:
        with stops_interrupt():
            yield
    except KeyboardInterrupt:
        raise Stopped(f"{where}: stopped by a signal; the same command goes on") from None
