"""Where the files of a shard set lie, and those of one that is being packed."""

from pathlib import Path

KIND = "shard set"
ITEMS = "items.parquet"
LABEL_NOISE = "label_noise.parquet"
REMARKS = "remarks.csv"
WORK = ".pack"
"""Folder of the files that exist only until the set is sealed."""


def shard_path(out: Path, split: str, shard: int) -> Path:
    """The tar of a shard."""
    return out / split / f"{shard:06d}.tar"


def is_tar(name: str) -> bool:
    """Whether a file is a tar by its name; tars from other tools may be called A.TAR."""
    return name.lower().endswith(".tar")


def index_of(tar: str) -> str:
    """The name of the index beside a tar."""
    return str(Path(tar).with_suffix(".idx"))


def facts_path(out: Path, split: str, shard: int) -> Path:
    """The table of each posting's outcome in a shard, until the set is sealed."""
    return out / WORK / f"{split}-{shard:06d}.parquet"


def plan_path(out: Path) -> Path:
    """The plan of a pack, until the set is sealed."""
    return out / WORK / "plan.sqlite"
