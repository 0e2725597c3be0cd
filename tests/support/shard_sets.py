"""What a test reads of a shard set and of the cache of a remote one."""

from pathlib import Path

from shards.read.shard_set import Item, ShardSet


def all_items(location: object, splits: tuple[str, ...] | None = None) -> list[Item]:
    """Every item of a set on disk or at a URL, or of some of its splits."""
    shards = ShardSet(location)
    reader = shards.reader(splits) if splits else shards.reader()
    return [reader[position] for position in range(len(reader))]


def cached_files(cache: Path) -> list[Path]:
    """The copies of remote files that a cache holds."""
    return [path for path in cache.rglob("*") if path.is_file()]


def tar_files(folder: Path) -> list[Path]:
    """The tars of a set on disk."""
    return sorted(folder.glob("*/*.tar"))
