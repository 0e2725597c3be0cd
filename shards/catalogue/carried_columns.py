"""The columns that a catalogue carries along: one type each, found chunk by chunk.

Only JSON Lines can hold values of several types in one column, items.parquet cannot: such a
column becomes text. The type is the one that pyarrow infers from the complete column.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

EXACT = 2**53  # integers up to here are floats without loss


@dataclass
class Carried:
    """What was seen of each column: the types of its chunks, and its largest integer.

    A column without any type so far holds text; None among the types stands for a chunk of values
    without a common type.
    """

    types: dict[str, set[pa.DataType | None]] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def note(self, chunk: pd.DataFrame) -> None:
        """Add the types of the columns of one chunk."""
        for name in chunk.columns:
            types = self.types.setdefault(name, set())
            column = chunk[name]
            kinds = set(map(type, column)) if column.dtype == object else set()
            # pyarrow takes true for 1.0 behind a number, and refuses it where none stands.
            is_mixed = kinds & {dict, list} or (bool in kinds and kinds & {int, float})
            try:
                values = None if is_mixed else pa.array(column, from_pandas=True)
            except (pa.ArrowException, OverflowError):
                values = None
            if values is None:
                types.add(None)
                continue
            kind = values.type
            if pa.types.is_dictionary(kind):  # its integers grow with what a chunk happens to hold
                kind = pa.dictionary(pa.int32(), kind.value_type, kind.ordered)
            types.add(kind)
            if kind == pa.int64():
                ends = pc.min_max(values).as_py().values()
                seen = max((abs(end) for end in ends if end is not None), default=0)
                self.largest[name] = max(self.largest.get(name, 0), seen)

    def schema(self) -> pa.Schema:
        """One type a column, in the order in which they appeared; text where values disagree."""
        fields = []
        for name, types in self.types.items():
            known, kind = types - {pa.null()}, pa.string()
            if known == {pa.int64(), pa.float64()} and self.largest[name] <= EXACT:
                kind = pa.float64()
            elif None not in known and len(known) <= 1:
                kind = next(iter(known), pa.null())
            elif None not in known and all(pa.types.is_decimal(one) for one in known):
                schemas = [pa.schema([(name, one)]) for one in known]
                kind = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
            fields.append((name, kind))
        return pa.schema(fields)


def of_type(column: pd.Series, kind: pa.DataType) -> pd.Series:
    """The column in a form that pyarrow can convert to `kind`: unchanged, or as text."""

    def text(value: Any) -> str | None:
        if isinstance(value, str):
            return value
        missing = pd.api.types.is_scalar(value) and pd.isna(value)
        return None if missing else json.dumps(value, ensure_ascii=False, default=str)

    if column.dtype == object and pa.types.is_string(kind):
        return column.map(text).astype(object)
    return column
