"""The cells of a CSV or TSV catalogue, counted row by row: pandas takes a short row silently."""

import csv
import logging
from pathlib import Path

from shards.errors import BadInput

LONGEST = 2**31 - 1
log = logging.getLogger("shards")


def check_cells(path: Path, separator: str) -> None:
    """Raise BadInput naming the first row with fewer cells than the first line names.

    Warns of fields that span lines: legal, but so does a quote that nobody closed swallow rows.
    """
    csv.field_size_limit(LONGEST)  # of the process: pandas, which reads the file too, knows none
    names: list[str] | None = None
    row, spanning, first, last_line = 0, 0, 0, 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        for cells in reader:
            lines, last_line = reader.line_num - last_line, reader.line_num
            if not cells or (len(cells) == 1 and not cells[0].strip()):
                continue  # pandas counts no blank line
            if names is None:
                names = cells
                continue
            row += 1
            if len(cells) < len(names):
                raise BadInput(
                    f"{path}: row {row} (line {reader.line_num}): {len(cells)} cells where the "
                    f"first line names {len(names)}; was the file cut? Give every row all its cells"
                )
            if lines > 1:
                spanning, first = spanning + 1, first or row
    if spanning:
        log.warning(
            "%s: row %d holds a field of several lines (%d such rows): where none is meant a quote "
            "was never closed, and rows behind it are in it",
            path, first, spanning,
        )  # fmt: skip
