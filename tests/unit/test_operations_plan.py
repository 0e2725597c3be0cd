"""The plan: counts of a catalogue, what fits and what would make it fit."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dist_train.config import Config, EmbedConfig, HeadOptions, ImageTraining, JoinConfig
from dist_train.heads.estimate import HeadEstimate
from dist_train.operations import plan as planning
from dist_train.operations.plan import Plan, duration
from dist_train.operations.sample import Counts, count, packed_sample
from dist_train.operations.trial import Trial
from shards.errors import BadInput
from shards.options import PackOptions
from shards.reader import ShardSet
from tests.distributed.launching import ROOT, environment

GB = 10**9
TRIAL = Trial(
    device="cpu", width=512, parameters=100_000_000, step_seconds=(0.1, 0.02),
    step_bytes=(2.0 * GB, 0.25 * GB), embed_seconds=0.01, decode_seconds=0.004, head_flops=1e12,
)  # fmt: skip


@pytest.fixture
def config(catalogue: Path, tmp_path: Path) -> Config:
    return Config(
        catalogue=catalogue / "catalogue.csv", images=catalogue / "images", out=tmp_path / "out",
        pack=PackOptions(size=48),
    )  # fmt: skip


def test_counts_are_those_of_the_packed_set(config: Config, shard_set: Path) -> None:
    counts, packed = count(config), ShardSet(shard_set)
    assert counts.postings == len(packed.items)
    assert counts.classes == packed.manifest["counts"]["classes"]
    for view in ("image", "text"):
        for split in ("train", "val", "test", "unlabelled"):
            table = packed.packed[packed.packed.split == split]
            # Photos and titles that turn out to be unusable are still counted here.
            assert counts.items[split, view] >= table[f"has_{view}"].sum()
            assert counts.items[split, view] <= len(table) + (packed.items.status != "packed").sum()


def test_the_sample_is_of_whole_products(config: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dist_train.operations.sample.POSTINGS", 75)
    packed = packed_sample(config, 300, tmp_path)
    taken, whole = pd.read_csv(tmp_path / "sample.csv"), pd.read_csv(config.catalogue)
    assert 20 < packed.postings == len(taken) < 200
    sizes = whole.label_group.value_counts()
    assert all(sizes[name] == number for name, number in taken.label_group.value_counts().items())
    assert packed.bytes_each > 500
    assert len(ShardSet(packed.shards).items) == packed.postings


def fits(needed: Trial, options: ImageTraining, world: int, memory: float) -> Plan:
    """The plan of one training over 1.2 M items of 200 000 classes."""
    counts = Counts(2_000_000, 200_000, Counter({
        ("train", "image"): 1_200_000, ("val", "image"): 400_000,
    }))  # fmt: skip
    config = Config(catalogue=Path("x"), out=Path("y"), image=options, encoders=("image",))
    found = Plan("nothing")
    planning._train(found, config, counts, "image", needed, world, memory)
    return found


def test_memory_time_and_bytes_of_a_training() -> None:
    options = ImageTraining(batch_size=64, epochs=2.0, validate_every=1.0, workers=4)
    (need,) = fits(TRIAL, options, 4, 80 * GB).needs
    head = HeadEstimate(classes=200_000, width=512, batch=64, world=4)
    assert need.memory_bytes == 2 * GB + 16 * 0.25 * GB + head.total
    steps = 2 * 1_200_000 // 64
    step = 0.1 + 16 * 0.02 + 8 * 64 * 50_000 * 512 / 1e12
    assert need.seconds == pytest.approx(steps * step + 3 * 400_000 * 0.01 / 4)
    sent = 1.5 * 4 * 100_000_000 + head.communication
    assert need.sent_bytes == pytest.approx(steps * sent)


def test_a_rank_that_waits_for_decoding() -> None:
    slow = replace(TRIAL, decode_seconds=1.0)
    options = ImageTraining(batch_size=64, workers=4, epochs=1.0, validate_every=0)
    (need,) = fits(slow, options, 1, 80 * GB).needs
    assert need.seconds == pytest.approx(18_750 * 64 / 4 + 400_000 * 0.01)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_would_make_it_fit_does(world: int) -> None:
    """The advised accumulation is taken, and the plan is made again."""
    options = ImageTraining(batch_size=256)
    memory = 10 * GB
    (told,) = fits(TRIAL, options, world, memory).unfit
    assert "train image needs" in told
    passes = int(told.split("--image.accumulation ")[1].split()[0])
    assert 256 % (passes * world) == 0
    assert not fits(TRIAL, ImageTraining(batch_size=256, accumulation=passes), world, memory).unfit


def test_a_model_or_a_head_too_large_for_any_batch() -> None:
    (told,) = fits(TRIAL, ImageTraining(batch_size=64), 1, 1.5 * GB).unfit
    assert "a smaller --image.encoder.model" in told
    assert "more ranks" in told
    options = ImageTraining(batch_size=64, head=HeadOptions(centres=8))
    (told,) = fits(TRIAL, options, 1, 10 * GB).unfit
    assert "more ranks (the head's centres take" in told


def test_a_join_without_room_is_told_with_its_setting(config: Config) -> None:
    tight = replace(config, join=JoinConfig(memory="100MB"))
    found = Plan("nothing")
    planning._match(found, tight, count(config), {"image": TRIAL}, 1)
    (told,) = found.unfit
    assert "--join.memory" in told
    assert not found.needs


def test_bytes_of_the_vectors_are_those_of_their_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both encoders together, as numpy lays them down."""
    tried = {view: replace(TRIAL, width=width) for view, width in (("image", 512), ("text", 384))}
    monkeypatch.setattr(planning, "try_out", lambda view, *_: tried[view])

    def refuse(*_, **__):
        raise BadInput("the join is planned in other tests")

    monkeypatch.setattr(planning.cost, "plan", refuse)
    rows = [f"{n},title {n},g{n // 4}" for n in range(300)]
    (tmp_path / "c.csv").write_text("\n".join(["posting_id,title,label_group", *rows]))
    for dtype in ("float16", "float32"):
        config = Config(catalogue=tmp_path / "c.csv", out=tmp_path / "out",
                        embed=EmbedConfig(dtype=dtype))  # fmt: skip
        needs = planning.plan(config, 1, measure=True).needs
        disk = {need.stage: need.disk_bytes for need in needs}
        assert disk["embed"] == np.zeros((300, 512 + 384), dtype).nbytes
        assert disk["all"] == sum(size for stage, size in disk.items() if stage != "all")


def test_a_disk_without_room(config: Config) -> None:
    found = Plan("nothing", [planning.Need("pack", 1, None, None, 1e18)])
    planning._disk(found, config)
    assert "--pack.size" in found.unfit[0]
    assert found.needs[-1].seconds is None
    assert "?" in str(found)


def test_durations() -> None:
    said = [duration(s) for s in (0.04, 119, 7000, 100_000, 10**6)]
    assert said == ["0.0 s", "119.0 s", "116.7 min", "27.8 h", "11.6 days"]


@pytest.mark.timeout(600)
def test_the_verb(config: Config, tiny_vit: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """The whole of it on a generated catalogue, and that nothing is left where it planned for."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({
        "catalogue": str(config.catalogue), "images": str(config.images), "out": str(config.out),
        "pack": {"size": 48},
        "image": {"encoder": {"model": str(tiny_vit), "image_size": 32}, "device": "cpu"},
        "text": {"encoder": {"model": str(tiny_bert)}, "device": "cpu"},
    }))  # fmt: skip
    words = [sys.executable, "-m", "dist_train", "plan", str(file), "--json"]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True,
                          timeout=550)  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    stages = [need["stage"] for need in told["needs"]]
    assert stages == ["pack", "train image", "train text", "embed", "index", "join", "all"]
    assert all(need["seconds"] > 0 for need in told["needs"])
    assert 100e6 < told["needs"][1]["memory_bytes"] < 10e9
    assert told["unfit"] == []
    assert not config.out.exists()
