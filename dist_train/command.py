"""What every verb has in common: --config FILE, errors as one line, the exit code."""

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from dist_train.config.config_file import read_config
from shards.storage.errors import BadInput, Failed, NoGPU, Stopped
from shards.storage.workers import STOPS

CONFIG_FIRST = ("run", "plan", "submit")
"""Verbs whose first argument is the config file."""


def call(app: App) -> None:
    """Parse the command line, call the verb, and end with the exit code of the outcome."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("dist_train", "shards"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        # By default cyclopts calls sys.exit after the verb, before the process group is left.
        app.meta(exit_on_error=False, print_error=False, result_action="return_value")
        _leave_process_group()
        _ignore_stop_signals()
    except CycloptsError as error:
        # Keys of a config file are written as in the documents: image.lr for [image][lr].
        message, keys = " ".join(str(error).split()), r"(?:\[[\w-]+\])+"
        message = re.sub(keys, lambda found: found[0][1:-1].replace("][", "."), message)
        _exit(message, 2)
    except Stopped as stopped:
        _leave_process_group()
        # A launcher takes any code but 0 for a crash; status.json shows the difference.
        _exit(str(stopped), 0 if "RANK" in os.environ else stopped.exit_code)
    except (BadInput, Failed, NoGPU) as error:
        _exit(str(error), error.exit_code)


def add_config_option(app: App) -> None:
    """Give every verb of `app` the option --config."""

    @app.meta.default
    def with_config(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Path | None = None,
    ) -> None:
        """Call the verb.

        Args:
            config: YAML file with any options of the verb; options on the command line override it.
        """
        if len(tokens) > 1 and tokens[0] in CONFIG_FIRST and not tokens[1].startswith("-"):
            config, tokens = Path(tokens[1]), (tokens[0], *tokens[2:])
        if config is not None:
            words, apps, _ = app.parse_commands(tokens)
            options = read_config(config, _options_of(apps[-1]), " ".join(words))
            # Nested under the verb's name: at the top level cyclopts would silently drop keys that
            # are verbs as well (pack, embed, index, match).
            for verb in reversed(words):
                options = {verb: options}
            # With the source, cyclopts names file and key of a wrong option.
            app.config = (Dict(options, source=str(config)),)
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


def _options_of(verb: App) -> set[str]:
    """Dotted names of the options of a verb; none for a group of verbs."""
    if verb.default_command is None:
        return set()
    arguments = verb.assemble_argument_collection()
    return {name.removeprefix("--") for one in arguments if one.parse for name in one.names}


def _leave_process_group() -> None:
    # gloo's threads abort an interpreter that ends before the process group is destroyed. torch is
    # not imported for it: a verb that has not imported it has no group.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _ignore_stop_signals() -> None:
    """The outcome is final. Python removes its handlers as it ends, and a signal would kill it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _exit(message: str, code: int) -> None:
    _ignore_stop_signals()
    rank = os.environ.get("RANK")
    print(f"dist-train{f' [rank {rank}]' if rank else ''}: {message}", file=sys.stderr)
    sys.exit(code)
