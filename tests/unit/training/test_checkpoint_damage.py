"""Manifests of checkpoints that are no longer what was written, and what a killed save left."""

import json
import os
from pathlib import Path

import pytest

from dist_train.distributed.runtime import Runtime
from dist_train.training import checkpoint as checkpoint_module
from dist_train.training.checkpoint import FORMAT, Checkpoints, checkpoint_fault
from shards.storage.errors import BadInput
from shards.storage.files import read_json, sha256_file, write_json
from tests.support.short_training import checkpoint, image_config, new_training


@pytest.fixture
def two(shard_set, tiny_vit, tmp_path) -> Path:
    """A run with the checkpoints of steps 6 and 7."""
    training = new_training(shard_set, image_config(tiny_vit))
    for step in (6, 7):
        Checkpoints(tmp_path, 9, Runtime("cpu")).save(training, step)
    return tmp_path


def test_one_flipped_bit_anywhere_in_a_manifest_is_found(two):
    folder = checkpoint(two, 7)
    manifest = folder / "manifest.json"
    raw = manifest.read_bytes()
    assert checkpoint_fault(folder) == ""
    passed = []
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        if checkpoint_fault(folder) == "":  # and whatever it is, nothing is raised
            passed.append(bit)
    # What passes means the same: another kind of white space.
    for bit in passed:
        assert raw[bit // 8 : bit // 8 + 1].isspace()


@pytest.mark.parametrize(
    "wrong",
    [[], 3, {}, {"format": 3}, {"format": 3, "files": []}, {"format": 3, "files": {}},
     {"format": 3, "files": {"state.json": 7}}, {"format": 3, "files": {"state.json": {}}}],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_is_none_is_passed_over(two, tiny_vit, shard_set, wrong):
    (checkpoint(two, 7) / "manifest.json").write_text(json.dumps(wrong))
    training = new_training(shard_set, image_config(tiny_vit))
    assert Checkpoints(two, 9, Runtime("cpu")).load_newest(training) == 6


def test_a_checkpoint_of_another_format_is_refused_and_stays(two, tiny_vit, shard_set):
    folder = checkpoint(two, 7)
    write_json(folder / "state.json", read_json(folder / "state.json") | {"format": FORMAT - 1})
    manifest = read_json(folder / "manifest.json")
    size, digest = (folder / "state.json").stat().st_size, sha256_file(folder / "state.json")
    manifest["files"]["state.json"] = {"bytes": size, "sha256": digest}
    write_json(folder / "manifest.json", manifest | {"format": FORMAT - 1})
    training = new_training(shard_set, image_config(tiny_vit))
    with pytest.raises(BadInput, match="of another format"):
        Checkpoints(two, 9, Runtime("cpu")).load_newest(training)
    assert folder.exists()


def test_what_a_killed_save_left_makes_room_before_the_next_one(
    tiny_vit, shard_set, tmp_path, monkeypatch
):
    training, runtime = new_training(shard_set, image_config(tiny_vit)), Runtime("cpu")
    left = tmp_path / "checkpoints/.step-00000008.tmp-other"
    left.mkdir(parents=True)
    (left / "encoder.safetensors").write_bytes(b"half")
    save = checkpoint_module.save_tensors

    def on_a_tight_disk(*arguments):
        if left.exists():
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(checkpoint_module, "save_tensors", on_a_tight_disk)
    Checkpoints(tmp_path, 2, runtime).save(training, 9)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000009"]


def test_a_checkpoint_has_its_name_only_when_all_of_it_is_on_the_disk(
    tiny_vit, shard_set, tmp_path, monkeypatch
):
    """Recorded calls: every file and its folder are synced, then renamed, then the folder above."""
    calls: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, os.replace
    whole = []

    def synced(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        if Path(new).name == "step-00000009":
            manifest = read_json(Path(old) / "manifest.json")  # there is one already
            names = {path.name for path in Path(old).iterdir()}
            assert names == {"manifest.json", *manifest["files"]}
            for name, facts in manifest["files"].items():
                assert sha256_file(Path(old) / name) == facts["sha256"]
            whole.append(names)
        calls.append(("rename", Path(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    training = new_training(shard_set, image_config(tiny_vit, ema=0.5))
    Checkpoints(tmp_path, 2, Runtime("cpu")).save(training, 9)
    final = checkpoint(tmp_path, 9)
    at = calls.index(("rename", final))
    assert calls[at + 1 :] == [("fsync", final.parent)]
    (names,) = whole
    assert len(names) == 6  # encoder, optimizer, average, head, state, manifest
    before = calls[:at]
    new = {path.name: path for what, path in before if what == "rename"}
    for name in names:
        when = before.index(("rename", new[name]))
        assert before[when - 1][0] == before[when + 1][0] == "fsync"
        assert name in before[when - 1][1].name
        assert before[when + 1][1] == before[when][1].parent
    assert before[-2][1].name == "manifest.json"
