"""Trainings whose head starts from class means or grows out of an earlier run."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_train.config.training import HeadOptions, ImageEncoderOptions, ImageTraining
from dist_train.distributed.runtime import Runtime
from dist_train.heads.centres import initial_centres
from dist_train.training.checkpoint import FORMAT, grow_centres
from dist_train.training.data import training_items
from dist_train.training.loop import train
from dist_train.training.setup import class_names_digest, set_up, start_centres
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Corrupt
from shards.storage.files import read_json, sha256_file, write_json


def config(tiny_vit, epochs: float = 0.3, **head) -> ImageTraining:
    encoder = ImageEncoderOptions(model=str(tiny_vit), image_size=32)
    return ImageTraining(
        encoder=encoder, batch_size=16, epochs=epochs, workers=0, device="cpu", precision="fp32",
        log_every=1, validate_every=0, head=HeadOptions(**head),
    )  # fmt: skip


@pytest.fixture(scope="module")
def earlier(shard_set, tiny_vit, tmp_path_factory):
    """A run on the whole catalogue."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    train("image", shard_set, out, config(tiny_vit))
    return out


def started(shards, config):
    runtime, items = Runtime("cpu"), training_items(ShardSet(shards), "image", config, 1)
    training = set_up(items, runtime)
    start_centres(training)
    grow_centres(training)
    return training, items


def head_of(run) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"))
    (file,) = newest.glob("head-*")
    return load_file(file)


def with_fewer_classes(run, items, to, drop: int):
    """A copy of `run` as if it had known fewer of the classes: those before the last `drop`."""
    shutil.copytree(run, to)
    newest = max((to / "checkpoints").glob("step-*"))
    (file,) = newest.glob("head-*")
    known = items.classes - drop
    rows = {name: value[:known].contiguous() for name, value in load_file(file).items()}
    file.unlink()
    save_file(rows, newest / f"head-0-{known}.safetensors")
    state = json.loads((newest / "state.json").read_text())
    names = class_names_digest(items.class_names[:known])
    (newest / "state.json").write_text(json.dumps(state | {"classes": known, "class_names": names}))
    known_files = read_json(newest / "manifest.json")["files"]
    kept = [path for path in newest.iterdir() if path.name != "manifest.json"]
    assert len(kept) == len(known_files)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in kept}
    write_json(newest / "manifest.json", {"format": FORMAT, "files": files})
    return to


def test_growing_keeps_the_old_centres_moments_and_steps(earlier, shard_set, tiny_vit, tmp_path):
    _, items = started(shard_set, config(tiny_vit))
    before = with_fewer_classes(earlier, items, tmp_path / "before", drop=9)
    training, _ = started(shard_set, config(tiny_vit, grow_from=before))
    known = items.classes - 9
    old = head_of(earlier)
    state = training.head_optimizer.state[training.head.weight]
    for name, value in {"weight": training.head.weight.detach(), **state}.items():
        assert torch.equal(value[:known], old[name][:known]), name
    fresh = initial_centres(known, items.classes, training.head.weight.shape[1], 0)
    assert torch.equal(training.head.weight[known:], fresh)
    assert not state["step"][known:].any()
    assert state["step"][:known].all()


def test_growing_from_a_damaged_checkpoint_is_refused(earlier, shard_set, tiny_vit, tmp_path):
    run = shutil.copytree(earlier, tmp_path / "run")
    (head,) = max((run / "checkpoints").glob("step-*")).glob("head-*")
    data = bytearray(head.read_bytes())
    data[-5] ^= 1
    head.write_bytes(data)
    with pytest.raises(Corrupt, match=rf"{head.name}: bytes differ .* grow from another run"):
        started(shard_set, config(tiny_vit, grow_from=run))


def test_growing_from_another_catalogue_is_refused(earlier, catalogue, tiny_vit, tmp_path):
    table = pd.read_csv(catalogue / "catalogue.csv").iloc[40:]
    table.to_csv(tmp_path / "other.csv", index=False)
    other = tmp_path / "shards"
    pack(tmp_path / "other.csv", catalogue / "images", other, PackOptions(size=48))
    with pytest.raises(BadInput, match="are not the first of these"):
        started(other, config(tiny_vit, grow_from=earlier))
    with pytest.raises(BadInput, match="has no checkpoint to grow from"):
        started(other, config(tiny_vit, grow_from=tmp_path))


def test_a_warm_start_lowers_the_first_loss(shard_set, tiny_vit, tmp_path):
    first = {}
    for start in ("random", "means"):
        train("image", shard_set, tmp_path / start, config(tiny_vit, epochs=0.1, start=start))
        rows = (tmp_path / start / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(row)["train/loss"] for row in rows if "train/loss" in row]
        first[start] = losses[0]
    assert first["means"] < first["random"] - 1


def test_a_sampled_training_with_sub_centres_and_dynamic_margins_runs_and_goes_on(
    shard_set, tiny_vit, tmp_path
):
    options = {"sample": 0.3, "centres": 2, "margin_of_largest": 0.1, "gradient": "detached"}
    train("image", shard_set, tmp_path / "run", config(tiny_vit, **options))
    steps = head_of(tmp_path / "run")["step"]
    assert 0 < steps.float().mean() < steps.max()  # not every class was seen in every step


def test_fp16_is_refused(shard_set, tiny_vit, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(BadInput, match=r"asks for fp16.*bf16"):
        started(shard_set, config(tiny_vit))


def test_the_margin_of_the_largest_class_is_that_of_the_option(shard_set, tiny_vit):
    training, items = started(
        shard_set, config(tiny_vit, margin=0.4, margin_of_largest=0.1, ramp=0.0)
    )
    ids = items.reader.records["class_id"][items.numbers]
    sizes = torch.from_numpy(np.bincount(ids, minlength=items.classes))
    margins = training.schedule.apply(0) * training.head.shares
    assert {round(float(m), 6) for m in margins[sizes == sizes.max()]} == {0.1}
    assert {round(float(m), 6) for m in margins[sizes == sizes.min()]} == {0.4}
