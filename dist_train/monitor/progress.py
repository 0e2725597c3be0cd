"""Progress of a stage: one line that is redrawn on a terminal, a line a minute in a log."""

import logging
import sys
from typing import Any

from tqdm import tqdm

MINUTE = 60.0
log = logging.getLogger(__name__)


class _Log:
    """A file for tqdm that writes each drawn bar as a line of the log."""

    def write(self, text: str) -> None:
        if text.strip():
            log.info("%s", text.strip())


def progress_bar(name: str, unit: str, total: int, quiet: bool) -> tqdm:
    """A bar over `total` pieces of work; `quiet` processes show none.

    The time left is at the average pace of this process (smoothing 0): add what other processes
    did to both `n` and `initial` of the bar.
    """
    options: dict[str, Any] = {"total": total, "desc": name, "unit": unit, "smoothing": 0}
    if not quiet and not sys.stderr.isatty():
        # Without miniters the bar estimates from the pace how many updates make a minute.
        options |= {"file": _Log(), "miniters": 1, "mininterval": MINUTE, "maxinterval": MINUTE}
        left = "{desc}: {n_fmt} of {total_fmt} {unit}s done, {remaining} left at this pace"
        options["bar_format"] = left
    return tqdm(disable=quiet, **options)
