"""How far the work is: one line that changes on a terminal, a line a minute in a log."""

import logging
import sys

from tqdm import tqdm

MINUTE = 60.0
log = logging.getLogger(__name__)


class _Log:
    """Writes what a bar draws as lines of the log."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        """Take what the bar draws next."""
        self.text = text.strip()

    def flush(self) -> None:
        """Log it, once."""
        if self.text:
            log.info("%s", self.text)
        self.text = ""


def progress_bar(name: str, unit: str, total: int, quiet: bool) -> tqdm:
    """A bar over `total` pieces of work; `quiet` processes show none.

    The time left is at the pace of this process since it began (smoothing 0); what others did is
    added to both `n` and `initial` of the bar.
    """
    if quiet or sys.stderr.isatty():
        return tqdm(total=total, desc=name, unit=unit, disable=quiet, smoothing=0)
    # miniters: else the bar guesses from the pace until now when a minute is over.
    return tqdm(
        total=total, desc=name, unit=unit, file=_Log(), smoothing=0, miniters=1,
        mininterval=MINUTE, maxinterval=MINUTE,
        bar_format="{desc}: {n_fmt} of {total_fmt} {unit}s done, {remaining} left at this pace",
    )  # fmt: skip
