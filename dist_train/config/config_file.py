"""Reading a config file: YAML whose keys are options, wrong ones named by line and nearest name."""

import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from shards.storage.errors import BadInput

NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"^[-+]?(?=.*[.eE])(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9]*)?)"
    r"([eE][-+]?[0-9]+)?$",
}


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2: in 1.1 the time 12:00:00 is 43200 and the account 0123 is 83."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag not in NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+.0123456789"))


def read_config(path: Path, options: Collection[str], verb: str) -> Any:
    """The content of a config file of `verb`, whose `options` are dotted names (image.batch_size).

    Without options no key is checked. Raises BadInput for a file that is missing or no YAML, and
    for a key that is no option or is given twice, with its line.
    """
    try:
        text = path.read_text()
        root, content = yaml.compose(text, _Loader), yaml.load(text, _Loader)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such config file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if options and isinstance(root, yaml.MappingNode):
        known = {name.replace("-", "_") for name in options}
        for name, line in _unknown_keys(root, known, "", str(path)):
            near = _nearest(name, known)
            hint = f"did you mean {near}?" if near else f"see dist-train {verb} --help"
            raise BadInput(f"{path}: line {line}: {name} is no option of {verb}; {hint}")
    return content or {}


def _nearest(name: str, known: set[str]) -> str:
    """The option that was meant; empty if none is alike."""

    def last(option: str) -> str:
        return option.rpartition(".")[2]

    # The right word at the wrong level is the most frequent slip.
    if last(name) not in map(last, known) and (near := get_close_matches(name, known, 1, 0.7)):
        return near[0]
    words = get_close_matches(last(name), sorted(set(map(last, known))), 1)
    alike = sorted(one for one in known if words and last(one) == words[0])
    return get_close_matches(name, alike, 1, 0.0)[0] if alike else ""


def _unknown_keys(
    node: yaml.MappingNode, known: set[str], prefix: str, path: str
) -> Iterator[tuple[str, int]]:
    """Dotted name and line of every key that is no option; BadInput for one that is given twice."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        below = [value] if isinstance(value, yaml.MappingNode) else []
        if key.tag == "tag:yaml.org,2002:merge":  # <<: the keys of an anchor are keys of this level
            merged = value.value if isinstance(value, yaml.SequenceNode) else below
            for one in merged:
                yield from _unknown_keys(one, known, prefix, path)
            continue
        name, line = prefix + str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in lines:
            raise BadInput(
                f"{path}: line {line}: {name} is given twice, first in line {lines[name]}"
            )
        lines[name] = line
        if name not in known:
            yield name, line
        elif any(one.startswith(f"{name}.") for one in known):
            for mapping in below:
                yield from _unknown_keys(mapping, known, f"{name}.", path)
