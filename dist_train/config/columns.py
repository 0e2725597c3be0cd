"""--columns: which columns of a catalogue are ours, in each form that an option can have."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from shards.storage.errors import BadInput


def read_columns(
    kind: Any, tokens: Sequence[Token] | Mapping[str, Sequence[Token]]
) -> dict[str, str]:
    """Our names to the catalogue's, from posting_id=sku,title=name or from one option a column.

    The latter is --columns.posting_id sku, or a mapping in YAML. Raises BadInput for other forms
    and for a name that is given twice.
    """
    if isinstance(tokens, Mapping):
        return {ours: given[-1].value for ours, given in tokens.items()}
    columns: dict[str, str] = {}
    for token in tokens:
        for pair in filter(None, token.value.split(",")):
            ours, equals, theirs = (part.strip() for part in pair.partition("="))
            if not (ours and equals and theirs):
                raise BadInput(f"--columns {token.value}: write posting_id=sku,title=name")
            if ours in columns:
                raise BadInput(f"--columns {token.value}: {ours} is given twice")
            columns[ours] = theirs
    return columns


Columns = Annotated[
    dict[str, str], Parameter(converter=read_columns, n_tokens=1, accepts_keys=True)
]
"""The option --columns."""
AS_NAMED: dict[str, str] = {}
"""Its default: no column has another name."""
