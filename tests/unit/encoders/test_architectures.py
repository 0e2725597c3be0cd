"""Architectures of timm and transformers: trained, saved, loaded, and an item alone or in a batch.

A handful of each runs always; every family of timm and all the architectures in the full run.
"""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._registry import _model_to_module

from dist_train.config.training import (
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
    TrainingOptions,
)
from dist_train.encoders.encoder import Encoder, load_encoder, new_encoder
from dist_train.training.loop import train
from shards.read.shard_set import Item, ShardSet
from shards.storage.errors import BadInput
from shards.storage.files import write_json
from tests.support.launching import LAUNCHERS, run
from tests.support.tiny_models import ARCHITECTURES, CAUSAL, save_model

FEW_IMAGES = (
    "convnext",
    "fastvit",
    "mobilenetv3",
    "naflexvit",
    "swin_transformer",
    "vision_transformer",
)
FEW_TEXTS = ("albert", "deberta-v2", "gpt2", "qwen2", "xlnet")
REFUSED = ("convbert", "funnel")
"""Their convolutions and poolings read the padding: a vector would depend on its batch."""
SMALL = ("test_", "atto", "femto", "pico", "050", "035", "_nano", "_n0", "zepto", "xxs", "_xs",
         "tiny", "_t0", "_t", "_s", "small", "18", "19", "_b0", "_0", "_1", "mobile")  # fmt: skip
"""What small models are called, the smallest first."""
SHRUNK: dict[str, dict[str, object]] = {
    "deepseek_vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "gemma4_vit": {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
    },
    "naflexvit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "qwen3_vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin_transformer": {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]},
}
"""Arguments of families whose smallest model is large."""
TWO_STEPS = {"batch_size": 8, "workers": 0, "precision": "fp32", "validate_every": 0,
             "log_every": 1, "keep_best": False, "lr": 1e-3}  # fmt: skip


def some_always(names, few):
    return [name if name in few else pytest.param(name, marks=pytest.mark.full) for name in names]


def families() -> list[str]:
    """The modules of timm that define a model."""
    return sorted({_model_to_module[name] for name in timm.list_models()})


def smallest_of(family: str) -> tuple[str, int]:
    """A model of a family that is small by its name, and the side of its photos."""

    def size(name: str) -> tuple:
        side = timm.get_pretrained_cfg(name).input_size[-1]
        rank = next((n for n, word in enumerate(SMALL) if word in name), len(SMALL))
        return side > 256, rank, side, len(name)

    names = [name for name in timm.list_models() if _model_to_module[name] == family]
    name = min(names, key=size)
    return name, timm.get_pretrained_cfg(name).input_size[-1]


def epochs_of(shards: Path, modality: str, steps: int) -> float:
    packed = ShardSet(shards).packed
    items = int(((packed.split == "train") & packed[f"has_{modality}"]).sum())
    return steps * TWO_STEPS["batch_size"] / items


def check(shards: Path, modality: str, config: TrainingOptions, run_folder: Path) -> Encoder:
    """Two steps by the stage, then: weights moved, saved ones load, no vector knows its batch."""
    train(modality, shards, run_folder, config)
    start = new_encoder(config.encoder, config.seed)
    encoder = load_encoder(run_folder / "encoder", modality)
    before = dict(start.named_parameters())
    still = [
        name for name, weight in encoder.named_parameters()
        if before[name].requires_grad and torch.equal(weight, before[name])
    ]  # fmt: skip
    # A weight may have no gradient (a bias of keys), most have one.
    assert len(still) < 0.25 * len(before), still
    reader = ShardSet(shards).reader()
    packed = ShardSet(shards).packed
    items = [reader[int(n)] for n in packed.index[packed[f"has_{modality}"]][:3]]
    if modality == "text":
        items.append(Item("p", None, items[0].title[:3], -1))
    inputs = encoder.inputs()
    with torch.inference_mode():
        together = F.normalize(encoder(*inputs(items, [0] * len(items))), dim=1)
        alone = [F.normalize(encoder(*inputs([one], [0])), dim=1) for one in items]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    return encoder


@pytest.mark.parametrize("family", some_always(families(), FEW_IMAGES))
def test_every_family_of_timm_trains_and_loads(family, shard_set, tmp_path):
    model, size = smallest_of(family)
    if family in SHRUNK:
        cfg = {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"architecture": model, "model_args": SHRUNK[family], "pretrained_cfg": cfg}
        write_json(tmp_path / "config.json", config)
        model = str(tmp_path)
    training = ImageTraining(
        encoder=ImageEncoderOptions(model=model, pretrained=False, image_size=size),
        epochs=epochs_of(shard_set, "image", 2), **TWO_STEPS,
    )  # fmt: skip
    check(shard_set, "image", training, tmp_path / "run")


@pytest.mark.parametrize(
    "architecture", some_always([one for one in ARCHITECTURES if one not in REFUSED], FEW_TEXTS)
)
def test_architectures_of_transformers_train_and_load(architecture, shard_set, tmp_path):
    model = save_model(tmp_path / "model", architecture)
    pooling = "last" if architecture in CAUSAL else "auto"
    config = TextTraining(
        encoder=TextEncoderOptions(model=str(model), pooling=pooling, max_length=48),
        epochs=epochs_of(shard_set, "text", 2), **TWO_STEPS,
    )  # fmt: skip
    encoder = check(shard_set, "text", config, tmp_path / "run")
    assert encoder.options.pooling == ("last" if architecture in CAUSAL else "mean")


@pytest.mark.parametrize("architecture", REFUSED)
def test_architectures_that_read_the_padding_are_refused(architecture, tmp_path):
    options = TextEncoderOptions(model=str(save_model(tmp_path / "model", architecture)))
    with pytest.raises(BadInput, match="depends on the longest title of its batch"):
        new_encoder(options, 0)


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("architecture", ["roberta", "qwen2", "deberta-v2"])
def test_one_and_two_processes_train_the_same(architecture, launcher, shard_set, tmp_path):
    model = save_model(tmp_path / "model", architecture)
    states = []
    for world in (1, 2):
        out = tmp_path / f"run-{world}"
        run(world, "train", "text", "--shards", shard_set, "--out", out, "--encoder.model", model,
            "--batch-size", 8, "--epochs", epochs_of(shard_set, "text", 2), "--workers", 0,
            "--precision", "fp32", "--validate-every", 0, launcher=launcher)  # fmt: skip
        states.append(load_encoder(out / "encoder", "text").state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-5)
