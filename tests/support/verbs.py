"""Verbs called in the process of the test, since importing torch takes seconds each time."""

import io
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from dist_train import cli

LOGGERS = [logging.getLogger(name) for name in ("dist_train", "shards")]


@dataclass(frozen=True)
class Said:
    """How a verb ended: its exit code, and all that it printed and logged."""

    code: int
    text: str


def call(*words: object) -> Said:
    """Run a verb. What is no outcome of a verb, a traceback for the user, is raised here."""
    said, code = io.StringIO(), 0
    handler = logging.StreamHandler(said)
    for logger in LOGGERS:
        logger.addHandler(handler)
    try:
        with (
            redirect_stdout(said),
            redirect_stderr(said),
            patch.object(sys, "argv", ["dist-train", *map(str, words)]),
        ):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        for logger in LOGGERS:
            logger.removeHandler(handler)
    return Said(code, said.getvalue())
