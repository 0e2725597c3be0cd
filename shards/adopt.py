"""Tars that others made become a shard set where they lie: an index beside each, nothing moved.

All tars are scanned before anything is written, so what is refused leaves the folder as it was.
"""

import logging
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from shards import stage_files
from shards.counts import counts_of
from shards.errors import BadInput, Corrupt, Stopped
from shards.files import read_json, remove_abandoned, sha256_file, write_json, write_parquet
from shards.foreign import scan_tar
from shards.index import MAGIC, write_index
from shards.label_noise import label_noise, twin_counts
from shards.layout import ITEMS, KIND, LABEL_NOISE
from shards.split import SPLITS, split_of
from shards.twins import fingerprints, photo_groups
from shards.verify import verify
from shards.workers import each, sigterm_interrupts

COLUMNS = ("posting_id", "title", "label_group")
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
log = logging.getLogger("shards")


def index_tars(
    path: Path,
    columns: Mapping[str, str] | None = None,
    leave: Collection[str] = (),
    workers: int = 1,
) -> dict[str, Any]:
    """Make the folder `path` of tars a shard set by an index beside each tar; its counts.

    `columns` names the json keys of posting_id, title and label_group where they are others,
    `leave` the suffixes (or base names) of members to leave unread. Tars in folders train, val and
    test are of that split, all others are split by label group. Raises BadInput for a folder that
    holds a packed set or has changed since it was indexed, Corrupt for a tar that is not whole.
    """
    config = {"columns": dict(columns or {}), "leave": sorted(leave)}
    _check_columns(config["columns"])
    counts = _indexed_before(path, config)
    if counts is not None:
        return counts
    tars = _tars(path)
    try:
        with sigterm_interrupts():
            table, records = _scan(path, tars, config, workers)
            items = _items(table)
            return _write(path, tars, items, records, config)
    except KeyboardInterrupt:
        if (path / stage_files.STAGE).exists():
            stage_files.write_status(path, "preempted", "stopped by a signal")
        raise Stopped(f"{path}: stopped by a signal; the same command starts again") from None
    except OSError as error:
        raise BadInput(f"{error.filename or path}: {error.strerror}") from None


def _check_columns(columns: Mapping[str, str]) -> None:
    unknown = sorted(columns.keys() - set(COLUMNS))
    if unknown:
        raise BadInput(f"--columns {unknown[0]}: there are {', '.join(COLUMNS)}")


def _indexed_before(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The counts, when the same tars were indexed in the same way; None when they never were."""
    if not (path / stage_files.STAGE).exists():
        if (path / ITEMS).exists():
            raise BadInput(f"{path / ITEMS}: in the way of the table to be written; move it away")
        return None
    stage = read_json(path / stage_files.STAGE)
    if not isinstance(stage, dict) or stage.get("kind") != KIND or "index-tars" not in stage:
        raise BadInput(f"{path}: was made by another verb, which wrote its own index")
    if not (path / stage_files.MANIFEST).exists():
        return None  # killed while it wrote: done again
    again = f"to index it anew remove its {stage_files.STAGE}, {stage_files.MANIFEST} and {ITEMS}"
    if stage["config"] != config:
        raise BadInput(f"{path}: was indexed with {stage['config']}, now {config}; {again}")
    manifest = stage_files.open_finished(path, KIND)
    new = {str(tar.relative_to(path)) for tar in _tars(path)} - set(manifest["files"])
    faults = [f"{path / name}: new" for name in sorted(new)] + verify(path)
    if faults:
        raise BadInput("\n".join([*faults, f"{path}: changed since it was indexed; {again}"]))
    log.info("%s: already indexed, and whole", path)
    return manifest["counts"]


def _tars(path: Path) -> list[Path]:
    # As text, which is the order that the reader has them in: "a-b/" lies before "a/".
    files = sorted((file for file in path.rglob("*") if file.is_file()), key=str)
    packed = [file for file in files if file.name.lower().endswith(PACKED_TARS)]
    if packed:
        raise Corrupt(f"{packed[0]}: a compressed tar; decompress it first, photos gain nothing")
    tars = [file for file in files if file.suffix == ".tar"]
    if not tars:
        raise BadInput(f"{path}: no .tar in it or below it")
    inside = [tar for tar in tars if _folder_split(path, tar)]
    if inside and len(inside) < len(tars):
        other = next(tar for tar in tars if not _folder_split(path, tar))
        raise BadInput(
            f"{other}: in none of the folders {', '.join(SPLITS)}, but {inside[0]} is; "
            "put all tars into such folders, or none"
        )
    for index in (tar.with_suffix(".idx") for tar in tars):
        if index.exists() and not _is_ours(index):
            raise BadInput(f"{index}: an index of another program is in the way; move it away")
    return tars


def _is_ours(index: Path) -> bool:
    with index.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _folder_split(path: Path, tar: Path) -> str:
    first, *below = tar.relative_to(path).parts
    return first if below and first in SPLITS else ""


def _scan(
    path: Path, tars: list[Path], config: dict[str, Any], workers: int
) -> tuple[pd.DataFrame, list[np.ndarray]]:
    jobs = [(tar, config["columns"], config["leave"]) for tar in tars]
    tables, records = [], []
    bar = tqdm(total=len(tars), desc="index", unit="tar", disable=None)
    with bar, closing(each(scan_tar, jobs, workers)) as scanned:
        for number, (tar, (facts, found)) in enumerate(zip(tars, scanned, strict=True)):
            name = str(tar.relative_to(path))
            tables.append(facts.assign(tar=name, shard=number, folder=_folder_split(path, tar)))
            records.append(found)
            bar.update()
    return pd.concat(tables, ignore_index=True), records


def _items(table: pd.DataFrame) -> pd.DataFrame:
    """items.parquet as a pack writes it, with the column tar."""
    items = table.assign(posting_id=_posting_ids(table))
    by_group = {group: split_of(group) for group in dict.fromkeys(items.label_group)}
    drawn = items.label_group.map(by_group)
    # Without a label there is nothing to train on or to score, wherever the tar lies.
    split = drawn.where((items.folder == "") | (drawn == "unlabelled"), items.folder)
    items = items.assign(split=split)
    items["class_id"] = _class_ids(items)
    prints = fingerprints(items.sha256, items.phash, items.colours)
    items["photo_group"] = photo_groups(prints)
    items.loc[items.status == "rejected", ["shard", "slot"]] = -1
    order = ["posting_id", "image", "label_group", "tar", "split", "class_id", "shard", "slot",
             "status", "reason", "sha256", "phash", "colours", "photo_group", "width", "height",
             "has_image", "has_text",
             "title"]  # fmt: skip
    types = dict.fromkeys(("class_id", "shard", "slot"), np.int32)
    return items[order].astype(types)


def _posting_ids(table: pd.DataFrame) -> pd.Series:
    named = table.posting_id != ""
    keys = table.key
    if keys[~named].duplicated().any():
        log.warning("keys return in other tars: posting_id is TAR/KEY where json names none")
        keys = table.tar.str.removesuffix(".tar") + "/" + table.key
    ids = table.posting_id.where(named, keys)
    double = ids.duplicated(keep=False)
    if double.any():
        first, second = table[ids == ids[double].iloc[0]].iloc[:2].itertuples()
        raise BadInput(
            f"{second.tar}: item {second.key!r} has the posting_id {ids[second.Index]!r} of "
            f"{first.key!r} in {first.tar}; name another with --columns posting_id=NAME"
        )
    return ids


def _class_ids(items: pd.DataFrame) -> np.ndarray:
    """As in a plan; the tars' own cls where they number the products of train one to one."""
    train = items[items.split == "train"]
    groups = list(dict.fromkeys(train.label_group))
    number = {group: place for place, group in enumerate(groups)}
    pairs = set(zip(train.label_group, train.cls, strict=True))
    if {cls for _, cls in pairs} == set(map(str, range(len(groups)))) and len(pairs) == len(groups):
        number = {group: int(cls) for group, cls in pairs}
    of_train = np.where(items.split == "train", items.label_group.map(number), -1)
    return of_train.astype(np.int32)


def _write(
    path: Path,
    tars: list[Path],
    items: pd.DataFrame,
    records: list[np.ndarray],
    config: dict[str, Any],
) -> dict[str, Any]:
    remove_abandoned(path)
    stamp = {"format": stage_files.FORMAT, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    made = {"index-tars": True, "kind": KIND, "config": config, "parents": {}}
    write_json(path / stage_files.STAGE, stamp | made)
    stage_files.write_status(path, "running")
    packed = items[items.status == "packed"]
    of_tar = dict(list(packed.groupby("shard")))
    for number, (tar, found) in enumerate(zip(tars, records, strict=True)):
        _write_index(tar, of_tar.get(number, packed[:0]), found)
    write_parquet(path / ITEMS, items)
    write_parquet(path / LABEL_NOISE, label_noise(items))
    counts = counts_of(items) | {
        "indexed_tars": len(tars),
        "products_in_several_splits": _across_splits(packed),
        "twins": twin_counts(items),
    }
    if counts["products_in_several_splits"]:
        log.warning("%s: %d products lie in several splits; scores of test will be too good",
                    path, counts["products_in_several_splits"])  # fmt: skip
    indices = [tar.with_suffix(".idx") for tar in tars]
    stage_files.finish(path, counts, [*tars, *indices, path / ITEMS, path / LABEL_NOISE])
    return counts


def _write_index(tar: Path, items: pd.DataFrame, records: np.ndarray) -> None:
    """The index of one tar: records by split, then slot, with what else the reader tells."""
    rank = items.split.map(SPLITS.index).to_numpy(np.int64)
    order = np.lexsort((items.slot, rank))
    records = records.copy()
    records["class_id"] = items.class_id
    header = {
        "tar_bytes": tar.stat().st_size,
        "tar_sha256": sha256_file(tar),
        "splits": {split: int((items.split == split).sum()) for split in SPLITS},
        "posting_ids": items.posting_id.iloc[order].tolist(),
        "titles": items.title.iloc[order].tolist(),
    }
    write_index(tar.with_suffix(".idx"), header, records[order])


def _across_splits(packed: pd.DataFrame) -> int:
    labelled = packed[packed.label_group != ""]
    return int((labelled.groupby("label_group").split.nunique() > 1).sum())
