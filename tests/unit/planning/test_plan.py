"""The plan: counts of a catalogue, its formulas beside counts by hand, what fits and what not."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from dist_train.acceptance.speed import EncoderRates
from dist_train.config.options import Config, EmbedConfig, IndexConfig, JoinConfig
from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.heads.estimate import HeadEstimate
from dist_train.planning import plan as planning
from dist_train.planning.plan import HEAD_RATE, Plan, StageCost, Survey, survey, training_bytes
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput
from tests.support.launching import ROOT, environment

GB = 10**9
N = 2_000_000
CATALOGUE = Survey(
    N, 200_000, Counter({"one product": 3, "another": 2}),
    Counter({
        ("train", "image"): 1_200_000, ("val", "image"): 400_000, ("all", "image"): N,
        ("train", "text"): 1_200_000, ("all", "text"): N - 5,
    }),
    packed_bytes=20_000, row_bytes=100, pack_seconds=0.01,
)  # fmt: skip
RATE = EncoderRates(
    width=512, parameters=100_000_000, load_seconds=7, read_seconds=0.002, augment_seconds=0.004,
    forward_seconds=np.poly1d([0.01, 0.05]), forward_bytes=np.poly1d([0.01 * GB, 0.4 * GB]),
    step_seconds=np.poly1d([0.02, 0.1]), step_bytes=np.poly1d([0.25 * GB, 2 * GB]),
)  # fmt: skip


@pytest.fixture
def config(catalogue: Path, tmp_path: Path, tiny_vit: Path, tiny_bert: Path) -> Config:
    return Config(
        catalogue=catalogue / "catalogue.csv", images=catalogue / "images", out=tmp_path / "out",
        pack=PackOptions(size=48),
        image=ImageTraining(encoder=ImageEncoderOptions(model=str(tiny_vit), image_size=32)),
        text=TextTraining(encoder=TextEncoderOptions(model=str(tiny_bert))),
    )  # fmt: skip


def on_gpus(ranks: int, memory: float = 80 * GB) -> Plan:
    """An empty plan of a machine with 64 cores whose programs start in 5 seconds."""
    return Plan("cuda", ranks, memory, cores=64, start=5.0)


def train(
    options: ImageTraining, ranks: int = 1, memory: float = 80 * GB, rate: EncoderRates = RATE
) -> Plan:
    """The plan of one training over 1.2 M items of 200 000 classes."""
    found = on_gpus(ranks, memory)
    planning.add_training(found, options, "image", CATALOGUE, rate)
    return found


def join(
    config: Config, ranks: int = 1, postings: int = N, width: int = 512
) -> dict[str, StageCost]:
    """The stages after the embedding by name, for a nanosecond a product."""
    found = on_gpus(ranks)
    planning.add_matching(found, config, replace(CATALOGUE, postings=postings), width, 1e-9)
    return {stage.stage: stage for stage in found.stages}


def test_counts_are_those_of_the_packed_set(
    config: Config, shard_set: Path, tmp_path: Path
) -> None:
    counts, packed = survey(config, tmp_path), ShardSet(shard_set)
    assert counts.postings == len(packed.items)
    assert counts.classes == packed.manifest["counts"]["classes"]
    for modality in ("image", "text"):
        for split in ("train", "val", "test", "unlabelled"):
            table = packed.packed[packed.packed.split == split]
            # Photos and titles that turn out to be unusable are still counted here.
            assert counts.items[split, modality] >= table[f"has_{modality}"].sum()
            assert (
                counts.items[split, modality]
                <= len(table) + (packed.items.status != "packed").sum()
            )
        assert counts.items["all", modality] >= packed.packed[f"has_{modality}"].sum()


def test_the_sample_is_of_whole_products(config: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(planning, "SAMPLE", 75)
    found = survey(config, tmp_path)
    taken, whole = pd.read_csv(tmp_path / "sample.csv"), pd.read_csv(config.catalogue)
    sizes = whole.label_group.value_counts()
    # As few products as hold 75 postings: without the last one there would be fewer.
    assert len(taken) - sizes[taken.label_group.dropna()].max() < 75 <= len(taken)
    assert all(sizes[name] == number for name, number in taken.label_group.value_counts().items())
    size = sum(path.stat().st_size for path in (tmp_path / "shards").rglob("*") if path.is_file())
    assert found.packed_bytes * len(taken) == pytest.approx(size)
    assert len(ShardSet(tmp_path / "shards").items) == len(taken)


def test_a_catalogue_that_cannot_be_read_is_named(config: Config, tmp_path: Path) -> None:
    for name, text, reason in (
        ("none.csv", None, "not found"), ("c.txt", "a", "unknown kind"), ("c.csv", "a\n1\n", "a"),
    ):  # fmt: skip
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=reason):
            planning.plan(replace(config, catalogue=tmp_path / name), 1)


def test_memory_and_time_of_a_training() -> None:
    options = ImageTraining(batch_size=64, epochs=2.0, validate_every=1.0, workers=4)
    (stage,) = train(options, 4).stages
    head = HeadEstimate(classes=200_000, width=512, batch=64, world=4)
    gradients = 400_000_000  # DDP's buckets
    assert stage.memory_bytes == 2 * GB + 16 * 0.25 * GB + head.total + gradients
    steps = 2 * 1_200_000 // 64
    step = 0.1 + 16 * 0.02 + 8 * 64 * 50_000 * 512 / HEAD_RATE["cuda"]
    validations = 3 * 400_000 * (0.05 / 64 + 0.01) / 4
    # Weights, two moments and the best weights; centres and their moments.
    checkpoint = 4 * 400_000_000 + 3 * 4 * 200_000 * 512
    saves = (1 + steps // options.checkpoint_every) * checkpoint / 300e6
    assert stage.seconds == pytest.approx(5 + 7 + steps * step + validations + saves)
    assert stage.disk_bytes == 2 * checkpoint + 400_000_000


def test_a_rank_that_waits_for_decoding() -> None:
    slow = replace(RATE, augment_seconds=1.0)
    options = ImageTraining(batch_size=64, workers=4, epochs=1.0, validate_every=0)
    waits = train(options, rate=slow).stages[0].seconds - train(options).stages[0].seconds
    computed = 0.1 + 64 * 0.02 + 8 * 64 * 200_000 * 512 / HEAD_RATE["cuda"]
    assert waits == pytest.approx(18_750 * (64 / 4 - computed))


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    two = Plan("cpu", 1, GB, cores=2)
    assert two.elapsed(3, 1, workers=0) == 4
    assert two.elapsed(3, 1, workers=1) == 3
    assert two.elapsed(3, 2.9, workers=8) == 3  # one core computes, the other decodes
    assert two.elapsed(3, 5, workers=8) == 4
    assert two.elapsed(1, 5, workers=1) == 5
    assert Plan("cpu", 4, GB, cores=2).elapsed(3, 1, workers=0) == 8


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_would_make_it_fit_does(ranks: int) -> None:
    """The advised accumulation is taken, and the plan is made again."""
    (said,) = train(ImageTraining(batch_size=256), ranks, 10 * GB).misfits
    assert said.startswith("train image needs")
    passes = int(said.split("--image.accumulation ")[1].split(",")[0])
    assert 256 % (passes * ranks) == 0
    options = ImageTraining(batch_size=256, accumulation=passes)
    assert not train(options, ranks, 10 * GB).misfits
    larger = ImageTraining(batch_size=256, accumulation=passes // 2)
    assert training_bytes(on_gpus(ranks), larger, CATALOGUE, RATE) > 10 * GB


def test_a_model_or_a_head_too_large_for_any_batch() -> None:
    (said,) = train(ImageTraining(batch_size=64), memory=1.5 * GB).misfits
    assert "a smaller --image.encoder.model" in said
    assert "more ranks for the head's centres" in said
    options = ImageTraining(batch_size=64, head=HeadOptions(centres=8))
    (said,) = train(options, memory=10 * GB).misfits
    assert "more ranks for the head's centres" in said
    assert not train(options, 8, 40 * GB).misfits


def test_more_postings_take_more_and_more_ranks_less(config: Config) -> None:
    one, more, ranks = join(config), join(config, postings=2 * N), join(config, ranks=4)
    for name in ("index", "join", "match"):
        assert more[name].seconds > one[name].seconds
        assert more[name].disk_bytes > one[name].disk_bytes
    for name in ("index", "match"):
        assert more[name].memory_bytes >= one[name].memory_bytes
    assert max(one["join"].memory_bytes, more["join"].memory_bytes) <= 4 * GB  # --join.memory
    assert ranks["join"].seconds < one["join"].seconds / 3
    # The products alone: each pair once, and every other twice.
    assert 0.75e-9 * N**2 < one["join"].seconds < 1.5 * 0.75e-9 * N**2
    options = ImageTraining(batch_size=64)
    alone, four = (train(options, n).stages[0] for n in (1, 4))
    assert four.seconds < alone.seconds / 2
    assert four.memory_bytes < alone.memory_bytes


def test_a_join_without_room_is_named_with_its_setting(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = on_gpus(1)
    tight = replace(config, join=JoinConfig(memory="100MB"))
    planning.add_matching(found, tight, CATALOGUE, 512, 1e-9)
    (said,) = found.misfits
    assert "--join.memory" in said
    assert [stage.stage for stage in found.stages] == ["index"]
    monkeypatch.setattr(planning, "free_memory", lambda: 4 * GB)
    found = on_gpus(4)
    planning.add_matching(found, replace(config, index=IndexConfig()), CATALOGUE, 512, 1e-9)
    assert [said.partition(" needs")[0] for said in found.misfits] == [
        "index on all ranks", "join on all ranks",
    ]  # fmt: skip


def test_bytes_of_the_vectors_are_those_of_their_dtype(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both encoders together, as NumPy lays their vectors down."""
    widths = {"image": 512, "text": 384}
    monkeypatch.setattr(planning, "survey", lambda *_: replace(CATALOGUE, postings=300))
    monkeypatch.setattr(
        planning, "measure_encoder", lambda modality, *_: replace(RATE, width=widths[modality])
    )
    for dtype in ("float16", "float32"):
        found = planning.plan(replace(config, embed=EmbedConfig(dtype=dtype)), 1)
        disk = {stage.stage: stage.disk_bytes for stage in found.stages}
        assert disk["embed"] == np.zeros((300, 512 + 384), dtype).nbytes
        assert disk["all"] == sum(size for stage, size in disk.items() if stage != "all")
        assert found.stages[-1].memory_bytes == max(s.memory_bytes for s in found.stages[:-1])


def test_a_disk_without_room(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "survey", lambda *_: replace(CATALOGUE, packed_bytes=1e15))
    monkeypatch.setattr(planning, "measure_encoder", lambda *_: RATE)
    found = planning.plan(config, 1)
    assert any("--pack.size" in said for said in found.misfits)
    assert "does not fit: " in str(found)
    assert "assumed: all ranks are on this machine" in str(found)


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
    found = json.loads(done.stdout)
    names = [stage["stage"] for stage in found["stages"]]
    assert names == ["pack", "train image", "train text", "embed", "index", "join", "match", "all"]
    assert all(stage["seconds"] > 0 for stage in found["stages"])
    assert all(100e6 < stage["memory_bytes"] < 10e9 for stage in found["stages"])
    assert found["misfits"] == []
    assert not config.out.exists()
