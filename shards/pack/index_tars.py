"""Tars from other tools become a shard set in place: an index beside each, nothing is moved.

All tars are scanned before anything is written, so that a refusal leaves the folder as it was.
What was found of the items lies on the disk meanwhile: memory is that of the largest tar.
"""

import json
import logging
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from shards.catalogue.split import SPLIT_NAMES, SPLITS, split_of
from shards.pack.disk_space import HANDFUL, full_disk_fails
from shards.pack.items import (
    OWN,
    REMARK_COLUMNS,
    STORED,
    Counts,
    arrow_type,
    count_items,
    create_items,
    group_photos,
    write_rows,
)
from shards.pack.labels import log_label_remarks
from shards.photos.remarks import summary_of
from shards.read.verify import verify
from shards.storage import stage_files
from shards.storage.errors import BadInput, Corrupt, Stopped
from shards.storage.files import read_json, remove_abandoned, sha256_file, write_json
from shards.storage.scratch import scratch
from shards.storage.stops import stops_interrupt
from shards.storage.workers import each
from shards.tar.foreign import COLUMNS, scan_tar
from shards.tar.index import MAGIC, write_index
from shards.tar.layout import ITEMS, KIND, LABEL_NOISE, REMARKS, WORK, is_tar

OTHERS = ("tar", "key", "folder", "cls", "image", "title")
NAMES = ("posting_id", "image", "label_group", "tar", *OWN, "title")
SCHEMA = pa.schema([(name, arrow_type(name)) for name in NAMES])
REPEATED = """
SELECT two.tar, two.key, two.posting_id, one.key, one.tar FROM (
    SELECT rowid AS row, MIN(rowid) OVER (PARTITION BY posting_id) AS first FROM item
) JOIN item AS two ON two.rowid = row JOIN item AS one ON one.rowid = first
    WHERE row > first ORDER BY first, row LIMIT 1
"""
# Without a label nothing can be trained on or scored, in whatever folder the tar lies.
SPLIT = """
UPDATE item SET split = IIF(folder = '' OR label_group = '', split_of(label_group), folder);
UPDATE item SET shard = -1, slot = -1 WHERE status = 'rejected';
"""
# Whether cls in the tars numbers the products of train one to one, from 0 without gaps.
IS_NUMBERED = """
SELECT COUNT(*) = COUNT(DISTINCT label_group) AND COUNT(*) = COUNT(DISTINCT cls)
    AND MIN(cls = CAST(CAST(cls AS INTEGER) AS TEXT)) AND MIN(CAST(cls AS INTEGER)) = 0
    AND MAX(CAST(cls AS INTEGER)) = COUNT(*) - 1
    FROM (SELECT DISTINCT label_group, cls FROM item WHERE split = 'train')
"""
CLASSES_OF_TARS = "UPDATE item SET class_id = CAST(cls AS INTEGER) WHERE split = 'train'"
# As in a plan: the rank of its first posting among the first postings of all classes.
CLASSES = """
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
REMARKS_HEADER = ",".join(REMARK_COLUMNS).encode()
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
log = logging.getLogger("shards")


def index_tars(
    path: Path,
    columns: Mapping[str, str] | None = None,
    leave: Collection[str] = (),
    workers: int = 1,
) -> Counts:
    """Make the folder `path` of tars a shard set by an index beside each tar; its counts.

    `columns` has the json keys of posting_id, title, label_group and split where they are others,
    `leave` suffixes and base names, or patterns of them, of members that are not read. An item is
    of the split that its json names, or else a folder or the name of its tar; all others are split
    by label group. Raises BadInput for a folder that holds a packed set or has changed since it was
    indexed, Corrupt for a damaged tar, Failed when the disk has no space for the index, Stopped on
    SIGTERM and Ctrl-C.
    """
    columns = columns or {}
    if path.is_file():
        raise BadInput(
            f"{path}: a file; give the folder that holds it: dist-train index-tars "
            f"{path.parent} (all tars in it become one set)"
        )
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder")
    if unknown := sorted(columns.keys() - set(COLUMNS)):
        raise BadInput(f"--columns {unknown[0]}: there are {', '.join(COLUMNS)}")
    config = {"columns": dict(columns), "leave": sorted(leave)}
    if (counts := _indexed_before(path, config)) is not None:
        return counts
    tars = _tars(path)
    if named := Counter(filter(None, (_folder_split(path, tar) for tar in tars))):
        text = ", ".join(f"{number} {split}" for split, number in named.items())
        log.info("%s: tars by their folders and names: %s", path, text)
    work = path / WORK
    try:
        with stops_interrupt(), full_disk_fails(path):
            remove_abandoned(path)
            # Beside the tars: the system's temporary folder may be memory.
            with scratch(work / "items") as database:
                sizes = _scan(path, tars, config, workers, database)
                _check_photos(path, database)
                _assign(database)
                group_photos(database, work)
                stage = {"format": stage_files.FORMAT, "started": stage_files.timestamp()}
                stage |= {"index-tars": True, "kind": KIND, "config": config, "parents": {}}
                write_json(path / stage_files.STAGE, stage)
                stage_files.write_status(path, "running")
                return _finish(path, tars, sizes, database)
    except KeyboardInterrupt:
        if (path / stage_files.STAGE).exists():
            stage_files.write_status(path, "preempted", "stopped by a signal")
        raise Stopped(f"{path}: stopped by a signal; the same command starts again") from None
    except OSError as error:
        raise BadInput(f"{error.filename or path}: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _indexed_before(path: Path, config: dict[str, Any]) -> Counts | None:
    """The counts, when the same tars were indexed with the same config; None if never indexed."""
    if not (path / stage_files.STAGE).exists():
        remarks = path / REMARKS
        in_the_way = [path / ITEMS] if (path / ITEMS).exists() else []
        if remarks.exists() and not remarks.read_bytes().startswith(REMARKS_HEADER):
            in_the_way.append(remarks)
        if in_the_way:
            raise BadInput(f"{in_the_way[0]}: in the way of the table to be written; move it away")
        return None
    stage = read_json(path / stage_files.STAGE)
    if not isinstance(stage, dict) or stage.get("kind") != KIND or "index-tars" not in stage:
        raise BadInput(f"{path}: was made by another verb, which wrote its own index")
    if not (path / stage_files.MANIFEST).exists():
        return None  # killed while it wrote: done again
    again = f"to index it anew remove its {stage_files.STAGE}, {stage_files.MANIFEST} and {ITEMS}"
    if stage.get("config") != config:
        raise BadInput(f"{path}: was indexed with {stage.get('config')}, now {config}; {again}")
    manifest = stage_files.open_finished(path, KIND)
    new = {str(tar.relative_to(path)) for tar in _tars(path)} - set(manifest["files"])
    faults = [f"{path / name}: new" for name in sorted(new)] + verify(path)
    if faults:
        raise BadInput("\n".join([*faults, f"{path}: changed since it was indexed; {again}"]))
    log.info("%s: already indexed, and intact", path)
    return cast(Counts, manifest["counts"])


def _tars(path: Path) -> list[Path]:
    """The tars in and below `path`; raises BadInput or Corrupt for a folder that cannot be one."""
    # Sorted as text, like the reader's order: "a-b/" lies before "a/".
    # macOS writes attributes of a.tar to ._a.tar on disks that have none.
    found = (file for file in path.rglob("*") if not file.name.startswith("._"))
    files = sorted((file for file in found if file.is_file()), key=str)
    compressed = [file for file in files if file.name.lower().endswith(COMPRESSED)]
    if compressed:
        raise Corrupt(f"{compressed[0]}: a compressed tar; decompress it first, which costs little")
    linked = [file for file in path.rglob("*") if file.is_symlink() and file.is_dir()]
    if linked:
        raise BadInput(
            f"{min(linked)}: a linked folder, which is not followed; put the folder "
            "itself there, or take the link away"
        )
    tars = [file for file in files if is_tar(file.name)]
    if not tars:
        raise BadInput(f"{path}: no .tar in it or below it")
    inside = [tar for tar in tars if _folder_split(path, tar)]
    others = [tar for tar in tars if not _folder_split(path, tar)]
    if inside and others:
        raise BadInput(
            f"{others[0]}: in none of the folders {', '.join(SPLITS)}, nor named so, but "
            f"{inside[0]} is; put all tars into such folders, or none"
        )
    tar_of: dict[Path, Path] = {}
    for tar in tars:
        index = tar.with_suffix(".idx")
        if tar_of.setdefault(index, tar) != tar:
            raise BadInput(f"{tar}: its index would be that of {tar_of[index]}; rename one of them")
        if index.exists() and not index.read_bytes().startswith(MAGIC):
            raise BadInput(f"{index}: an index of another program is in the way; move it away")
    return tars


def _folder_split(path: Path, tar: Path) -> str:
    """The split that the nearest folder, or else the name, of a tar says; empty where none does.

    A folder says it by its whole name (train), a tar by one word of its (shop-train-0001.tar).
    """
    *folders, name = tar.relative_to(path).parts
    said = [SPLIT_NAMES[folder.lower()] for folder in folders if folder.lower() in SPLIT_NAMES]
    words = {
        SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_NAMES
    }
    return said[-1] if said else words.pop() if len(words) == 1 else ""


def _scan(
    path: Path, tars: list[Path], config: dict[str, Any], workers: int, database: sqlite3.Connection
) -> list[int]:
    """Fill table item, and write the index records of each tar to a file; items of each tar."""
    create_items(database, *OTHERS)
    columns = [*STORED, *OTHERS]
    insert = f"INSERT INTO item ({', '.join(columns)}) VALUES (?{', ?' * (len(columns) - 1)})"
    jobs = [(tar, config["columns"], config["leave"]) for tar in tars]
    bar = tqdm(total=len(tars), desc="index", unit="tar", disable=None)
    sizes = []
    with bar, closing(each(scan_tar, jobs, workers, "indexing")) as scanned:
        for number, (tar, (facts, records)) in enumerate(zip(tars, scanned, strict=True)):
            name, folder = str(tar.relative_to(path)), _folder_split(path, tar)
            folders = facts.folder.mask(facts.folder == "", folder)  # json may say it itself
            facts = facts.assign(tar=name, shard=number, folder=folders, split="", class_id=-1)
            rows = facts[columns].astype(object).itertuples(index=False, name=None)
            database.executemany(insert, rows)
            np.save(path / WORK / str(number), records)
            sizes.append(len(facts))
            bar.update()
    return sizes


def _check_photos(path: Path, database: sqlite3.Connection) -> None:
    """Raise BadInput with the reasons when not one of many photos can be used."""
    counts = "SELECT COUNT(*), IFNULL(SUM(has_image), 0) FROM item WHERE image <> ''"
    named, usable = database.execute(counts).fetchone()
    if usable or named <= HANDFUL:
        return
    found = database.execute("SELECT tar, key, remarks FROM item WHERE image <> '' ORDER BY rowid")
    remarks = (
        (kind, f"{tar}: item {key!r}: {text}")
        for tar, key, noted in found
        for kind, text in json.loads(noted)
    )
    raise BadInput(
        f"{path}: not one of its {named} photos can be used: {'; '.join(summary_of(remarks))}"
    )


def _assign(database: sqlite3.Connection) -> None:
    """Give all items their ids, splits and classes, as a pack does."""
    repeated_key = "SELECT 1 FROM item WHERE posting_id = '' GROUP BY key HAVING COUNT(*) > 1"
    key = "key"
    if database.execute(f"{repeated_key} LIMIT 1").fetchone():
        log.warning("keys return in other tars: posting_id is TAR/KEY where json names none")
        key = "SUBSTR(tar, 1, LENGTH(tar) - LENGTH('.tar')) || '/' || key"
    database.execute(f"UPDATE item SET posting_id = {key} WHERE posting_id = ''")
    if repeated := database.execute(REPEATED).fetchone():
        tar, item, posting_id, other, first = repeated
        raise BadInput(
            f"{tar}: item {item!r} has the posting_id {posting_id!r} of {other!r} in {first}; "
            "name another with --columns posting_id=NAME"
        )
    database.create_function("split_of", 1, split_of, deterministic=True)
    database.executescript(SPLIT)
    is_numbered = database.execute(IS_NUMBERED).fetchone()[0]
    database.executescript(CLASSES_OF_TARS if is_numbered else CLASSES)


def _finish(path: Path, tars: list[Path], sizes: list[int], database: sqlite3.Connection) -> Counts:
    """Write the index of each tar, the tables and the manifest; the counts.

    sizes: items of each tar. An index has its records by split, then slot.
    """
    last, written = 0, [path / ITEMS, path / LABEL_NOISE, path / REMARKS]
    for number, (tar, size) in enumerate(zip(tars, sizes, strict=True)):
        first, last = last + 1, last + size
        packed = database.execute(PACKED, (first, last)).fetchall()
        splits, class_ids, posting_ids, titles = zip(*packed, strict=True) if packed else [()] * 4
        order = np.argsort([SPLITS.index(split) for split in splits], kind="stable")
        records = np.load(path / WORK / f"{number}.npy")
        records["class_id"] = class_ids
        header = {
            "tar_bytes": tar.stat().st_size,
            "tar_sha256": sha256_file(tar),
            "splits": {split: splits.count(split) for split in SPLITS},
            "posting_ids": [posting_ids[place] for place in order],
            "titles": [titles[place] for place in order],
        }
        write_index(tar.with_suffix(".idx"), header, records[order])
        written += [tar, tar.with_suffix(".idx")]
    write_rows(path / ITEMS, SCHEMA, database.execute(f"SELECT {', '.join(NAMES)} FROM item"))
    counts = count_items(database, path / LABEL_NOISE)
    counts["indexed_tars"] = len(tars)
    database.execute("DELETE FROM item WHERE status = 'rejected'")
    counts["products_in_several_splits"] = log_label_remarks(database, "item", path)
    stage_files.finish(path, counts, written)
    return counts
