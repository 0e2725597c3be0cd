"""Plan, pack, seal: from a catalogue and its photos to a shard set.

Every shard is built by itself: tar and facts under temporary names, read back, renamed, the
index last as its mark. A pack started again after any kill skips the shards that are marked.
"""

import json
import logging
import os
import shutil
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from shards import stage_files
from shards.catalogue import COLUMNS, read_catalogue, set_aside
from shards.errors import BadInput, Corrupt, Stopped
from shards.files import remove_abandoned, sha256_file, write_parquet
from shards.index import read_index
from shards.options import PackOptions
from shards.photo import Photo, PhotoRefused, load_photo
from shards.plan import make_plan
from shards.split import SPLITS
from shards.tar import write_shard
from shards.workers import each, sigterm_interrupts

KIND = "shard set"
WORK = ".pack"
OWN = ("split", "status", "reason", "shard", "slot", "class_id", "sha256", "phash", "width",
       "height", "has_image", "has_text")  # fmt: skip
log = logging.getLogger("shards")


def pack(
    catalogue: Path,
    images: Path | None,
    out: Path,
    options: PackOptions,
    columns: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Pack `catalogue` with the photos below `images` into the shard set `out`; its counts.

    Raises BadInput for a catalogue that cannot be read or an `out` that holds something else,
    Stopped on SIGTERM and Ctrl-C: what is packed by then is kept.
    A photo that cannot be used never stops the pack: its posting keeps the title and the reason.
    """
    # A carried column must not take the name of one of ours.
    table = set_aside(read_catalogue(catalogue, columns), OWN)
    if images is None and (table.image != "").any():
        raise BadInput(f"{catalogue}: names photos; say where they lie with --images DIR")
    if images is not None and not images.is_dir():
        raise BadInput(f"{images}: no such folder of photos")
    parents = _parents(catalogue, images, out)
    config = _result_options(options) | {"columns": columns or {}}
    if stage_files.begin(out, KIND, config, parents):
        log.info("%s: already packed", out)
        _clean_up(out)
        return stage_files.open_finished(out, KIND)["counts"]
    try:
        with sigterm_interrupts():
            plan = make_plan(table, options)
            _build_shards(plan, images, out, options)
            return _seal(plan, out)
    except KeyboardInterrupt:
        stage_files.write_status(out, "preempted", "stopped by a signal")
        raise Stopped(f"{out}: stopped by a signal; the same command goes on") from None
    except BaseException as error:
        stage_files.write_status(out, "failed", f"{type(error).__name__}: {error}")
        raise


def _result_options(options: PackOptions) -> dict[str, Any]:
    how = {f.name for f in fields(options) if f.metadata.get("how")}
    return {name: value for name, value in asdict(options).items() if name not in how}


def _parents(catalogue: Path, images: Path | None, out: Path) -> dict[str, Any]:
    def beside(path: Path) -> str:
        return os.path.relpath(path.resolve(), out.resolve())

    parents = {"catalogue": {"path": beside(catalogue), "sha256": sha256_file(catalogue)}}
    return parents if images is None else parents | {"images": {"path": beside(images)}}


def _build_shards(plan: pd.DataFrame, images: Path | None, out: Path, options: PackOptions) -> None:
    wanted = [*COLUMNS, "split", "shard", "slot", "class_id"]
    shards = [rows for _, rows in plan[wanted].groupby(["split", "shard"], sort=True)]
    jobs = [(rows, images, out, options) for rows in shards]
    bar = tqdm(total=len(plan), desc="pack", unit="posting", disable=None)
    with bar, closing(each(_build_shard, jobs, options.workers)) as built:
        for done in built:
            bar.update(done)


def _build_shard(rows: pd.DataFrame, images: Path | None, out: Path, options: PackOptions) -> int:
    split, shard = rows.split.iloc[0], int(rows.shard.iloc[0])
    tar = shard_path(out, split, shard)
    facts_path = _facts_path(out, split, shard)
    if _is_built(tar, facts_path):
        return len(rows)
    facts: list[dict[str, Any]] = []
    samples = _samples(rows.sort_values("slot"), images, options, facts)
    facts_path.unlink(missing_ok=True)
    write_shard(tar, samples, before_mark=lambda: write_parquet(facts_path, pd.DataFrame(facts)))
    return len(rows)


def _is_built(tar: Path, facts: Path) -> bool:
    try:
        index = read_index(tar.with_suffix(".idx"))
    except Corrupt:
        return False
    whole = tar.exists() and tar.stat().st_size == index.header["tar_bytes"]
    return whole and facts.exists()


def _samples(rows: pd.DataFrame, images: Path | None, options: PackOptions, facts: list):
    """Yield (slot, class_id, members) of every posting that can be packed; note all in `facts`."""
    for row in rows.itertuples():
        photo, reason = _photo(row.image, images, options)
        title = row.title[: options.max_title]
        if len(row.title) > len(title):
            reason = "; ".join(filter(None, [reason, f"title of {len(row.title)} characters cut"]))
        packed = photo is not None or bool(title.strip())
        fact = _fact(row.posting_id, photo, title, packed, reason)
        facts.append(fact)
        if packed:
            yield int(row.slot), int(row.class_id), _members(row, photo, title, fact)


def _photo(name: str, images: Path | None, options: PackOptions) -> tuple[Photo | None, str]:
    if not name or images is None:
        return None, ""
    try:
        return load_photo(images, name, options), ""
    except PhotoRefused as refused:
        return None, f"photo {name}: {refused}"


def _fact(
    posting_id: str, photo: Photo | None, title: str, packed: bool, reason: str
) -> dict[str, Any]:
    return {
        "posting_id": posting_id,
        "status": "packed" if packed else "rejected",
        "reason": reason if packed or reason else "neither a photo nor a title",
        "sha256": photo.sha256 if photo else "",
        "phash": photo.phash if photo else "",
        "width": photo.width if photo else 0,
        "height": photo.height if photo else 0,
        "has_image": photo is not None,
        "has_text": bool(title.strip()),
        "title": title,
    }


def _members(row: Any, photo: Photo | None, title: str, fact: dict[str, Any]) -> dict[str, bytes]:
    about = {"label_group": row.label_group} | {k: v for k, v in fact.items() if k != "status"}
    members = {"json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode()}
    if photo is not None:
        members["jpg"] = photo.jpeg
    if title.strip():
        members["txt"] = title.encode()
    if row.class_id >= 0:
        members["cls"] = str(row.class_id).encode()
    return members


def _seal(plan: pd.DataFrame, out: Path) -> dict[str, Any]:
    keys = plan[["split", "shard"]].drop_duplicates().itertuples(index=False)
    facts = pd.concat([pd.read_parquet(_facts_path(out, *key)) for key in keys])
    items = plan.drop(columns="title").merge(facts, on="posting_id", how="left", sort=False)
    rejected = items.status == "rejected"
    items.loc[rejected, ["shard", "slot"]] = -1
    counts = _counts(items)
    if counts["packed"] + counts["rejected"] != len(plan):
        raise Corrupt(f"{out}: {len(plan)} postings in, {counts} out; remove it and pack again")
    write_parquet(out / "items.parquet", items)
    # The mark of a finished pack is the manifest; the facts are needed until it stands.
    files = [p for s in SPLITS for p in (out / s).glob("[0-9]*")] + [out / "items.parquet"]
    stage_files.finish(out, counts, files)
    _clean_up(out)
    return counts


def _clean_up(out: Path) -> None:
    remove_abandoned(out)
    shutil.rmtree(out / WORK, ignore_errors=True)


def _counts(items: pd.DataFrame) -> dict[str, Any]:
    packed = items[items.status == "packed"]
    return {
        "postings": len(items),
        "packed": len(packed),
        "rejected": int((items.status == "rejected").sum()),
        "with_reason": int((items.reason != "").sum()),
        "photos": int(packed.has_image.sum()),
        "titles": int(packed.has_text.sum()),
        "items": {split: int((packed.split == split).sum()) for split in SPLITS},
        "products": {s: int(packed.label_group[packed.split == s].nunique()) for s in SPLITS},
        "classes": int(items.class_id.max()) + 1,
    }


def shard_path(out: Path, split: str, shard: int) -> Path:
    """Where a shard's tar lies."""
    return out / split / f"{shard:06d}.tar"


def _facts_path(out: Path, split: str, shard: int) -> Path:
    return out / WORK / f"{split}-{shard:06d}.parquet"
