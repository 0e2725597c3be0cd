"""Values of options: their types, checks on them, their forms as JSON, bytes and folders."""

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from shards.storage.errors import BadInput

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]
Modality = Literal["image", "text"]


def result_options(options: Any) -> dict[str, Any]:
    """The options (a dataclass) that a result depends on, as JSON values.

    Fields with NO_EFFECT_ON_RESULT stay out, also those of nested options.
    """
    named = {f.name: getattr(options, f.name) for f in fields(options) if not f.metadata.get("how")}
    return {k: result_options(v) if is_dataclass(v) else as_json(v) for k, v in named.items()}


def as_json(value: Any, without_none: bool = False) -> Any:
    """`value` with tuples as lists and paths as text; `without_none` drops keys without a value."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if not (without_none and inner is None)}
        return {key: as_json(inner, without_none) for key, inner in kept.items()}
    if isinstance(value, tuple | list):
        return [as_json(inner, without_none) for inner in value]
    return str(value) if isinstance(value, Path) else value


def bytes_of(text: str) -> int:
    """Bytes of a size such as 8GB, 500MB or 2.5 GB (1 GB is 1e9 bytes); BadInput for others."""
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kMGT]?)B?\s*", text)
    if found is None or not float(found[1]) > 0:
        raise BadInput(f"memory {text}: write a size as 8GB or 500MB")
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def local_path(text: str) -> Path | None:
    """The folder that a model option names, or None for the name of a published model.

    Variables and ~ are expanded. Raises BadInput if a variable is not set or a path has no folder.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise BadInput(f"model {text}: the variable is not set in the environment")
    if Path(expanded).is_dir():
        return Path(expanded)
    if expanded != text or expanded.startswith((".", os.sep)):
        raise BadInput(f"model {text}: no such folder ({expanded})")
    return None


def check_range(options: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        # Written so that NaN is refused as well.
        if not low <= getattr(options, name) <= high:
            raise BadInput(f"{name}: {getattr(options, name)}, must lie in {low} to {high}")


def check_positive(options: Any, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise BadInput(f"{name}: {getattr(options, name)}, must be above 0")
