"""The text of a LightGBM booster, checked before the library reads it.

LightGBM trusts the numbers of a text: a node or a feature that does not exist makes it read memory
out of bounds, which ends the process without a message. Accepted is only what it writes for the
boosters of a pair model, which are binary, without categories and without linear leaves.
"""

import re
from collections.abc import Sequence

import numpy as np

MOST_LEAVES = 256
"""LightGBM walks a tree by recursion, so its depth is bounded."""

_GAP, _END = "\n\n\n", "end of trees\n"
_NODES = ("split_feature", "split_gain", "threshold", "decision_type", "left_child", "right_child")
_LEAVES = ("leaf_value", "leaf_weight", "leaf_count")
_INNER = ("internal_value", "internal_weight", "internal_count")
_FIELDS = ("num_leaves", "num_cat", *_NODES, *_LEAVES, *_INNER, "is_linear", "shrinkage")
_INTEGERS = ("split_feature", "decision_type", "left_child", "right_child", "leaf_count")
_INTEGERS += ("internal_count",)
_INTEGER = r"-?\d{1,9}"
_DECIMAL = r"-?\d{1,25}(?:\.\d{1,25})?(?:e[-+]\d{1,3})?"


def trees_of(text: str) -> list[str]:
    """The trees of a booster, a text each. Raises ValueError for a text without any."""
    return text[text.index("Tree=0\n") : text.index(_END)].split(_GAP)[:-1]


def render(trees: Sequence[str], monotone: Sequence[int]) -> str:
    """A booster of these trees as LightGBM reads it.

    monotone: (F,) -1, 0 or 1 for each feature. What else LightGBM writes, such as the ranges of the
    features and its parameters, changes no prediction and is left out.
    """
    F = len(monotone)
    lines = [
        "tree",
        "version=v4",
        "num_class=1",
        "num_tree_per_iteration=1",
        "label_index=0",
        f"max_feature_idx={F - 1}",
        "objective=binary sigmoid:1",
        f"feature_names={' '.join(f'Column_{n}' for n in range(F))}",
        f"monotone_constraints={' '.join(map(str, monotone))}",
        f"feature_infos={' '.join(['none'] * F)}",
        f"tree_sizes={' '.join(str(len(tree) + len(_GAP)) for tree in trees)}",
        "\n",
    ]
    return "\n".join(lines) + "".join(tree + _GAP for tree in trees) + _END


def fault_of(text: str, monotone: Sequence[int]) -> str:
    """What is wrong with a text that should be as `render` writes it, "" for nothing."""
    try:
        trees = trees_of(text)
    except ValueError:
        trees = []
    if not trees or not text.isascii() or text != render(trees, monotone):
        return f"is not the text of a LightGBM booster of {len(monotone)} features"
    for number, tree in enumerate(trees):
        if fault := _fault_of_tree(tree, number, len(monotone)):
            return f"has {fault} in tree {number}"
    return ""


def _fault_of_tree(tree: str, number: int, features: int) -> str:
    """What is wrong with a tree, "" if each node and leaf is once below a node that precedes it."""
    first, *lines = tree.split("\n")
    fields = {line.partition("=")[0]: line.partition("=")[2] for line in lines}
    if first != f"Tree={number}" or tuple(fields) != _FIELDS or len(lines) != len(_FIELDS):
        return "fields of another kind of tree"
    if (fields["num_cat"], fields["is_linear"]) != ("0", "0"):
        return "categories or linear leaves"
    leaves = fields["leaf_value"].count(" ") + 1
    if fields["num_leaves"] != str(leaves) or leaves > MOST_LEAVES:
        return "another number of leaves than it names"
    for name in (*_NODES, *_LEAVES, *_INNER, "shrinkage"):
        count = leaves if name in _LEAVES else 1 if name == "shrinkage" else leaves - 1
        if leaves == 1 and name == "leaf_weight":
            count = 0  # a tree without a split has no weight
        if not _holds(name, fields[name], count):
            return f"wrong numbers of {name}"
    return _fault_of_nodes(fields, leaves, features) if leaves > 1 else ""


def _holds(name: str, values: str, count: int) -> bool:
    """Whether a field is so many numbers, finite but for the threshold of known from unknown."""
    number = _INTEGER if name in _INTEGERS else _DECIMAL
    if name == "threshold":
        number = f"(?:{number}|inf)"
    if not re.fullmatch(f"(?:{number}(?: {number})*)?", values):
        return False
    found = [float(value) for value in values.split()]
    return len(found) == count and (name == "threshold" or bool(np.isfinite(found).all()))


def _fault_of_nodes(fields: dict[str, str], leaves: int, features: int) -> str:
    """A child below 0 is the leaf -1 - child."""
    values = {name: np.array(fields[name].split(), np.int64) for name in _INTEGERS}
    children = np.stack([values["left_child"], values["right_child"]])
    # Bit 0: a category. Bit 1: where unknown values go. Above: which values are unknown.
    if not np.isin(values["decision_type"], (0, 2, 4, 6, 8, 10)).all():
        return "decisions of an unknown kind"
    if not ((values["split_feature"] >= 0) & (values["split_feature"] < features)).all():
        return "a feature that does not exist"
    once = np.array_equal(np.sort(children.ravel()), [*range(-leaves, 0), *range(1, leaves - 1)])
    if not once or ((children >= 0) & (children <= np.arange(leaves - 1))).any():
        return "nodes that are no tree"
    if min(values["leaf_count"].min(), values["internal_count"].min()) < 1:
        return "a node without pairs"
    return ""
