"""Tars that others made become a shard set where they lie: an index beside each, nothing moved.

All tars are scanned before anything is written, so what is refused leaves the folder as it was.
What was found of the items lies on the disk meanwhile: memory is that of the largest tar.
"""

import logging
import shutil
import sqlite3
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from shards import stage_files
from shards.errors import BadInput, Corrupt, Stopped
from shards.files import read_json, remove_abandoned, sha256_file, write_json
from shards.foreign import scan_tar
from shards.index import MAGIC, write_index
from shards.items import (
    ARROW,
    OWN,
    STORED,
    TYPES,
    count_items,
    create_items,
    group_photos,
    tell_twins,
    write_rows,
)
from shards.layout import ITEMS, KIND, LABEL_NOISE, WORK, is_tar
from shards.room import full_disk_told
from shards.scratch import scratch
from shards.split import SPLITS, split_of
from shards.verify import verify
from shards.workers import each, stops_interrupt

COLUMNS = ("posting_id", "title", "label_group")
OTHERS = ("tar", "key", "folder", "cls", "image", "title")
SCHEMA = pa.schema(
    [(name, ARROW.get(TYPES.get(name, ""), pa.string())) for name in (
        "posting_id", "image", "label_group", "tar", *OWN, "title",
    )]
)  # fmt: skip
DOUBLE = """
SELECT two.tar, two.key, two.posting_id, one.key, one.tar FROM (
    SELECT rowid AS row, MIN(rowid) OVER (PARTITION BY posting_id) AS first FROM item
) JOIN item AS two ON two.rowid = row JOIN item AS one ON one.rowid = first
    WHERE row > first ORDER BY first, row LIMIT 1
"""
# Without a label there is nothing to train on or to score, wherever the tar lies.
SPLIT = """
UPDATE item SET split = IIF(folder = '' OR label_group = '', split_of(label_group), folder);
UPDATE item SET shard = -1, slot = -1 WHERE status = 'rejected';
"""
# Whether the tars' own cls number the products of train one to one.
OWN_NUMBERS = """
SELECT COUNT(*) = COUNT(DISTINCT label_group) AND COUNT(*) = COUNT(DISTINCT cls)
    AND MIN(cls = CAST(CAST(cls AS INTEGER) AS TEXT)) AND MIN(CAST(cls AS INTEGER)) = 0
    AND MAX(CAST(cls AS INTEGER)) = COUNT(*) - 1
    FROM (SELECT DISTINCT label_group, cls FROM item WHERE split = 'train')
"""
NUMBERS_OF_TARS = "UPDATE item SET class_id = CAST(cls AS INTEGER) WHERE split = 'train'"
# As in a plan: the rank of its first posting among the first postings of all classes.
NUMBERS = """
CREATE TABLE class (row INTEGER PRIMARY KEY, class_id INTEGER);
INSERT INTO class SELECT row, DENSE_RANK() OVER (ORDER BY first) - 1 FROM (
    SELECT rowid AS row, MIN(rowid) OVER (PARTITION BY label_group) AS first
    FROM item WHERE split = 'train'
) ORDER BY row;
UPDATE item SET class_id = class.class_id FROM class WHERE class.row = item.rowid;
"""
PACKED = """
SELECT split, class_id, posting_id, title FROM item
    WHERE rowid BETWEEN ? AND ? AND status = 'packed' ORDER BY rowid
"""
ACROSS = """
SELECT COUNT(*) FROM (
    SELECT 1 FROM item WHERE status = 'packed' AND label_group <> ''
    GROUP BY label_group HAVING COUNT(DISTINCT split) > 1
)
"""
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
    holds a packed set or has changed since it was indexed, Corrupt for a tar that is not whole,
    Failed when the disk has no room for the index.
    """
    config = {"columns": dict(columns or {}), "leave": sorted(leave)}
    _check_columns(config["columns"])
    counts = _indexed_before(path, config)
    if counts is not None:
        return counts
    tars = _tars(path)
    try:
        with stops_interrupt(), full_disk_told(path):
            remove_abandoned(path)
            # Beside the tars: a temporary folder of the system may be memory.
            with scratch(path / WORK / "items") as database:
                items = _scan(path, tars, config, workers, path / WORK, database)
                _settle(database, path / WORK)
                return _write(path, tars, items, config, path / WORK, database)
    except KeyboardInterrupt:
        if (path / stage_files.STAGE).exists():
            stage_files.write_status(path, "preempted", "stopped by a signal")
        raise Stopped(f"{path}: stopped by a signal; the same command starts again") from None
    except OSError as error:
        raise BadInput(f"{error.filename or path}: {error.strerror}") from None
    finally:
        shutil.rmtree(path / WORK, ignore_errors=True)


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
    linked = [file for file in path.rglob("*") if file.is_symlink() and file.is_dir()]
    if linked:
        raise BadInput(f"{min(linked)}: a linked folder, which is not followed; put the folder "
                       "itself there, or take the link away")  # fmt: skip
    tars = [file for file in files if is_tar(file.name)]
    if not tars:
        raise BadInput(f"{path}: no .tar in it or below it")
    inside = [tar for tar in tars if _folder_split(path, tar)]
    if inside and len(inside) < len(tars):
        other = next(tar for tar in tars if not _folder_split(path, tar))
        raise BadInput(
            f"{other}: in none of the folders {', '.join(SPLITS)}, but {inside[0]} is; "
            "put all tars into such folders, or none"
        )
    taken: dict[Path, Path] = {}
    for tar in tars:
        index = tar.with_suffix(".idx")
        if taken.setdefault(index, tar) != tar:
            raise BadInput(f"{tar}: its index would be that of {taken[index]}; rename one of them")
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
    path: Path, tars: list[Path], config: dict[str, Any], workers: int, folder: Path,
    database: sqlite3.Connection,
) -> list[int]:  # fmt: skip
    """Fill table item; the index records of each tar in a file in `folder`. Items of each tar."""
    create_items(database, *OTHERS)
    columns = [*STORED, *OTHERS]
    places = ", ".join("?" * len(columns))
    jobs = [(tar, config["columns"], config["leave"]) for tar in tars]
    bar = tqdm(total=len(tars), desc="index", unit="tar", disable=None)
    items = []
    with bar, closing(each(scan_tar, jobs, workers, "indexing")) as scanned:
        for number, (tar, (facts, records)) in enumerate(zip(tars, scanned, strict=True)):
            name = str(tar.relative_to(path))
            facts = facts.assign(tar=name, shard=number, folder=_folder_split(path, tar),
                                 split="", class_id=-1)  # fmt: skip
            rows = facts[columns].astype(object).itertuples(index=False, name=None)
            database.executemany(f"INSERT INTO item ({', '.join(columns)}) VALUES ({places})", rows)
            np.save(folder / str(number), records)
            items.append(len(facts))
            bar.update()
    return items


def _settle(database: sqlite3.Connection, folder: Path) -> None:
    """Ids, splits, classes and photo groups of all items, as a pack gives them."""
    returning = "SELECT 1 FROM item WHERE posting_id = '' GROUP BY key HAVING COUNT(*) > 1 LIMIT 1"
    if database.execute(returning).fetchone():
        log.warning("keys return in other tars: posting_id is TAR/KEY where json names none")
        key = "SUBSTR(tar, 1, LENGTH(tar) - LENGTH('.tar')) || '/' || key"
    else:
        key = "key"
    database.execute(f"UPDATE item SET posting_id = {key} WHERE posting_id = ''")
    double = database.execute(DOUBLE).fetchone()
    if double:
        tar, item, posting_id, other, first = double
        raise BadInput(
            f"{tar}: item {item!r} has the posting_id {posting_id!r} of {other!r} in {first}; "
            "name another with --columns posting_id=NAME"
        )
    database.create_function("split_of", 1, split_of, deterministic=True)
    database.executescript(SPLIT)
    own = database.execute(OWN_NUMBERS).fetchone()[0]
    database.executescript(NUMBERS_OF_TARS if own else NUMBERS)
    group_photos(database, folder)


def _write(
    path: Path, tars: list[Path], items: list[int], config: dict[str, Any], folder: Path,
    database: sqlite3.Connection,
) -> dict[str, Any]:  # fmt: skip
    stamp = {"format": stage_files.FORMAT, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    made = {"index-tars": True, "kind": KIND, "config": config, "parents": {}}
    write_json(path / stage_files.STAGE, stamp | made)
    stage_files.write_status(path, "running")
    last = 0
    for number, (tar, size) in enumerate(zip(tars, items, strict=True)):
        first, last = last + 1, last + size
        packed = database.execute(PACKED, (first, last)).fetchall()
        _write_index(tar, packed, np.load(folder / f"{number}.npy"))
    write_rows(
        path / ITEMS, SCHEMA, database.execute(f"SELECT {', '.join(SCHEMA.names)} FROM item")
    )
    across = database.execute(ACROSS).fetchone()[0]
    counts = count_items(database) | {
        "indexed_tars": len(tars),
        "products_in_several_splits": across,
        "twins": tell_twins(database, path / LABEL_NOISE),
    }
    if across:
        log.warning("%s: %d products lie in several splits; scores of test will be too good",
                    path, across)  # fmt: skip
    indices = [tar.with_suffix(".idx") for tar in tars]
    stage_files.finish(path, counts, [*tars, *indices, path / ITEMS, path / LABEL_NOISE])
    return counts


def _write_index(tar: Path, packed: list[tuple], records: np.ndarray) -> None:
    """The index of one tar: records by split, then slot, with what else the reader tells.

    packed: (split, class_id, posting_id, title) of each record.
    """
    splits, class_ids, posting_ids, titles = zip(*packed, strict=True) if packed else [()] * 4
    order = np.argsort([SPLITS.index(split) for split in splits], kind="stable")
    records["class_id"] = class_ids
    header = {
        "tar_bytes": tar.stat().st_size,
        "tar_sha256": sha256_file(tar),
        "splits": {split: splits.count(split) for split in SPLITS},
        "posting_ids": [posting_ids[place] for place in order],
        "titles": [titles[place] for place in order],
    }
    write_index(tar.with_suffix(".idx"), header, records[order])
