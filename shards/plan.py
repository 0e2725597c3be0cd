"""The plan of a pack: split, shard, slot and class of every posting, before a byte is written."""

from hashlib import blake2b

import numpy as np
import pandas as pd

from shards.options import PackOptions
from shards.split import SPLITS, split_of

MIN_SHARD, SHARDS = 64, 8


def make_plan(table: pd.DataFrame, options: PackOptions) -> pd.DataFrame:
    """Add split, class_id, shard and slot to a catalogue; a function of (table, options) alone.

    class_id counts the label groups of the train split in the order of their first posting and
    is -1 elsewhere. Inside a split the items lie in the order of a keyed hash of posting_id.
    """
    plan = table.copy()
    # A dictionary and no array of text: NumPy drops a NUL at the end of a group.
    split_by_group = {group: split_of(group) for group in dict.fromkeys(plan.label_group)}
    trained = [group for group, split in split_by_group.items() if split == "train"]
    class_by_group = {group: number for number, group in enumerate(trained)}
    plan["split"] = [split_by_group[group] for group in plan.label_group]
    plan["class_id"] = np.array([class_by_group.get(g, -1) for g in plan.label_group], np.int32)
    plan["shard"] = np.zeros(len(plan), np.int32)
    plan["slot"] = np.zeros(len(plan), np.int32)
    for split in SPLITS:
        _place(plan, split, options)
    return plan


def shard_size(items: int, options: PackOptions) -> int:
    """Items in one tar: at least eight shards where that leaves each its 64 items."""
    return min(options.shard_items, max(MIN_SHARD, -(-items // SHARDS)))


def _place(plan: pd.DataFrame, split: str, options: PackOptions) -> None:
    rows = np.flatnonzero(plan.split.to_numpy(str) == split)
    keys = [_key(posting_id, options.seed) for posting_id in plan.posting_id.iloc[rows]]
    place = np.empty(len(rows), np.int64)
    place[np.argsort(np.array(keys, "S16"), kind="stable")] = np.arange(len(rows))
    size = shard_size(len(rows), options)
    plan.iloc[rows, plan.columns.get_loc("shard")] = (place // size).astype(np.int32)
    plan.iloc[rows, plan.columns.get_loc("slot")] = (place % size).astype(np.int32)


def _key(posting_id: str, seed: int) -> str:
    return blake2b(posting_id.encode(), digest_size=8, key=str(seed).encode()).hexdigest()
