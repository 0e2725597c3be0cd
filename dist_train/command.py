"""What every verb has in common: --config FILE, errors as one line, the exit code."""

import logging
import os
import re
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from dist_train.config.config_file import read_config
from dist_train.distributed.launcher import under_launcher
from shards.storage.errors import BadInput, Failed, NoGPU, Stopped
from shards.storage.stops import STOPS, StopFlag, stops_interrupt

CONFIG_FIRST = ("run", "plan", "submit")
"""Verbs whose first argument is the config file."""


def format_default(value: Any) -> str | None:
    """A default as the command line writes it; None, which shows nothing, for an empty one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        value = " ".join(map(str, value))
    return str(value) if value or value == 0 else None


def call(app: App) -> None:
    """Parse the command line, call the verb, and end with the exit code of the outcome."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("dist_train", "shards"):
        logging.getLogger(name).setLevel(logging.INFO)
    StopFlag.installed()
    # By default cyclopts makes exit code 130 of a KeyboardInterrupt.
    app.suppress_keyboard_interrupt = app.meta.suppress_keyboard_interrupt = False
    try:
        # The ranks of a launcher must stop together, so each looks for a signal where all do.
        with stops_interrupt(not under_launcher()):
            # By default cyclopts calls sys.exit after the verb, before the process group is left.
            app.meta(exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
        _leave_process_group()
        _ignore_stop_signals()
    except CycloptsError as error:
        # Keys of a config file are written as in the documents: image.lr for [image][lr].
        message, keys = " ".join(str(error).split()), r"(?:\[[\w-]+\])+"
        message = re.sub(keys, lambda found: found[0][1:-1].replace("][", "."), message)
        _exit(message, 2)
    except (Stopped, KeyboardInterrupt) as stopped:
        _leave_process_group()
        # A launcher takes any code but 0 for a crash; status.json shows the difference.
        code = 0 if "RANK" in os.environ else Stopped.exit_code
        _exit(str(stopped) or "stopped by a signal; the same command goes on", code)
    except (BadInput, Failed, NoGPU) as error:
        _exit(str(error), error.exit_code)
    except BrokenPipeError:
        reader = select.poll()
        reader.register(sys.stdout.fileno(), 0)
        if not reader.poll(0):
            raise  # another pipe is broken
        # Verbs print when their work is done, and the reader, such as head, has seen enough of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave_process_group()
        _ignore_stop_signals()


def add_config_option(app: App) -> None:
    """Give every verb of `app` the option --config."""

    @app.meta.default
    def with_config(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Path | None = None,
    ) -> None:
        """Call the verb.

        Args:
            config: YAML file with options of the verb: --a-b as a_b, --a.b-c as section a with the
                key b_c. Options on the command line override it.
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
    with suppress(BrokenPipeError):  # nobody reads it
        print(f"dist-train{f' [rank {rank}]' if rank else ''}: {message}", file=sys.stderr)
    sys.exit(code)
