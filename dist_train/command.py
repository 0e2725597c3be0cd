"""What every verb has in common: --config FILE, errors as one line, the exit code."""

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from shards.storage.errors import BadInput, Failed, NoGPU, Stopped
from shards.storage.workers import STOPS

NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"^[-+]?(?=.*[.eE])(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)"
    r"([eE][-+]?[0-9]+)?$",
}
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
    try:
        # By default cyclopts calls sys.exit after the verb, before the process group is left.
        app.meta(exit_on_error=False, print_error=False, result_action="return_value")
        _leave_process_group()
        _ignore_stop_signals()
    except CycloptsError as error:
        _exit(" ".join(str(error).split()), 2)
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
            config: YAML file with options of the verb: --a-b as a_b, --a.b-c as section a with the
                key b_c. Options on the command line override it.
        """
        if len(tokens) > 1 and tokens[0] in CONFIG_FIRST and not tokens[1].startswith("-"):
            config, tokens = Path(tokens[1]), (tokens[0], *tokens[2:])
        if config is not None:
            try:
                options = yaml.load(config.read_text(), _Loader) or {}
            except OSError:
                raise BadInput(f"{config}: no such config file") from None
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                reason = " ".join(str(error).split())
                raise BadInput(f"{config}: not YAML ({reason})") from None
            # Nested under the verb's name: at the top level cyclopts would silently drop keys that
            # are verbs as well (pack, embed, index, match).
            for verb in reversed(app.parse_commands(tokens)[0]):
                options = {verb: options}
            # With the source, cyclopts names file and key of a wrong option.
            app.config = (Dict(options, source=str(config)),)
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2: in 1.1 the time 12:00:00 is 43200 and the account 0123 is 83."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag not in NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+.0123456789"))


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
