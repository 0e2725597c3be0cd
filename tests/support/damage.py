"""Damage done to stage directories and batches."""

from pathlib import Path

from dist_train.training import loop
from dist_train.training.data import training_items
from shards.read.shard_set import ShardSet
from shards.storage.files import read_json
from shards.storage.stage_files import MANIFEST, finish


def flip_photos(shards: Path, splits: tuple[str, ...], every: int) -> list[int]:
    """Flip one bit in every `every`th photo of some splits; the items' numbers."""
    reader = ShardSet(shards).reader()
    photos = [n for n in range(len(reader)) if reader.read(n).photo]
    split_of = [reader.tars[reader.tar_of[n]].partition("/")[0] for n in photos]
    broken = [n for n, split in zip(photos, split_of, strict=True) if split in splits][::every]
    for number in broken:
        at = int(reader.records["jpg_at"][number]) + 100
        with (shards / reader.tars[reader.tar_of[number]]).open("r+b") as tar:
            tar.seek(at)
            byte = tar.read(1)[0]
            tar.seek(at)
            tar.write(bytes([byte ^ 16]))
    return broken


def vouch_again(out: Path) -> None:
    """Have the manifest vouch for the files as they are now, as if the stage had written them."""
    manifest = read_json(out / MANIFEST)
    finish(out, manifest["counts"], [out / name for name in manifest["files"]])


def spoil_batch(monkeypatch, shard_set, config, step: int) -> None:
    """Put NaN into the batch of `step`, whichever attempt trains it."""
    items = training_items(ShardSet(shard_set), "image", config, 1)
    spoilt, real_load = next(items.plans(step, step + 1, 0, 1)).items, loop.load

    def load(*arguments, **options):
        for batch in real_load(*arguments, **options):
            if (batch.items == spoilt).all():
                batch.inputs[0][0] = float("nan")
            yield batch

    monkeypatch.setattr(loop, "load", load)
