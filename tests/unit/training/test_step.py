"""Single steps: what is left out, what is averaged, what stands still, what is recomputed."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AlbertConfig, AlbertModel

from dist_train.config.training import HeadOptions
from dist_train.encoders.encoder import load_encoder
from dist_train.training.data import training_items
from dist_train.training.loop import Stepper, train
from dist_train.training.optimisation import encoder_optimizer
from dist_train.training.standstill import checksum
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Failed
from tests.support.faulty_rank import spoil_centres
from tests.support.short_training import (
    equal_tensors,
    image_config,
    state_of,
    stepper_of,
    text_config,
)


def everything(training) -> dict[str, torch.Tensor]:
    """All that a step may change, copied."""
    state = state_of(training)
    if training.average is not None:
        state |= {f"average/{k}": v for k, v in training.average.module.state_dict().items()}
    return {name: value.clone() for name, value in state.items()}


# A loss or gradient that is NaN or Inf


@pytest.mark.parametrize(("accumulation", "spoilt"), [(1, 1), (2, 2), (2, 3)])
def test_a_batch_with_nan_changes_nothing(shard_set, tiny_vit, caplog, accumulation, spoilt):
    config = image_config(tiny_vit, accumulation=accumulation, ema=0.9)
    stepper = stepper_of(shard_set, config, spoilt=(spoilt,))
    training = stepper.training
    stepper.run_step(0)
    before, ids = everything(training), []
    for plan in training_items(ShardSet(shard_set), "image", config, 1).plans(1, 2, 0, 1):
        ids += [str(one) for one in ShardSet(shard_set).packed.posting_id[plan.items]]
    with caplog.at_level(logging.WARNING, "dist_train"):
        values = stepper.run_step(1)[0]
    assert values["skipped"] == training.progress.skipped == 1
    assert training.progress.updates == 1
    assert equal_tensors(everything(training), before)
    assert "step 1: left out on all ranks" in caplog.text
    assert all(one in caplog.text for one in ids)
    assert len(ids) == 16
    assert stepper.run_step(2)[0]["skipped"] == 1
    assert training.progress.skipped_in_a_row == 0
    after = everything(training)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not equal_tensors(after, before)


def test_centres_whose_gradient_is_infinite_leave_the_step_out_too(shard_set, tiny_vit):
    stepper = stepper_of(shard_set, image_config(tiny_vit))
    stepper.run_step(0)
    before = everything(stepper.training)
    spoil_centres()
    values = stepper.run_step(1)[0]
    assert values["loss"] < 100
    # DeepSpeed reads nothing but the encoder's norm.
    assert not values["grad_norm"] < float("inf")
    assert equal_tensors(everything(stepper.training), before)


def test_so_many_in_a_row_end_the_training(shard_set, tiny_vit):
    config = image_config(tiny_vit, max_skipped=2)
    stepper = stepper_of(shard_set, config, 5, spoilt=(0, 2, 3))
    for step in range(3):
        stepper.run_step(step)
    with pytest.raises(Failed, match=r"step 3: 2 steps in a row had a loss .* is NaN or Inf"):
        stepper.run_step(3)


# Averages, frozen weights, layers


def test_the_average_is_that_of_the_formula(shard_set, tiny_vit):
    stepper = stepper_of(shard_set, image_config(tiny_vit, ema=0.6))
    training = stepper.training
    wanted = None
    for step in range(4):
        stepper.run_step(step)
        now = {k: v.double() for k, v in training.encoder.state_dict().items()}
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3)) if step else 0.0
        wanted = (
            now if wanted is None else {k: decay * wanted[k] + (1 - decay) * now[k] for k in now}
        )
    for name, value in training.average.module.state_dict().items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-7)
    assert not equal_tensors(
        dict(training.average.module.state_dict()), dict(training.encoder.state_dict())
    )
    assert training.encoder_to_validate() is training.average.module


def test_a_frozen_encoder_keeps_every_bit_and_then_moves(shard_set, tiny_vit):
    config = image_config(tiny_vit, freeze=0.3, warmup=0.0, weight_decay=0.5)  # of 7 steps, two
    stepper = stepper_of(shard_set, config)
    training = stepper.training
    start = {k: v.clone() for k, v in training.encoder.named_parameters()}
    centres = training.head.weight.detach().clone()
    for step in range(2):
        stepper.run_step(step)
    assert equal_tensors(dict(training.encoder.named_parameters()), start)
    assert not torch.equal(training.head.weight, centres)
    stepper.run_step(2)
    trained = {k: v for k, v in training.encoder.named_parameters() if v.requires_grad}
    moved = [not torch.equal(v, start[k]) for k, v in trained.items()]
    assert all(moved)


def lr_scales(stepper: Stepper) -> dict[str, float]:
    names = {p: name for name, p in stepper.training.encoder.named_parameters()}
    groups = encoder_optimizer(stepper.training.encoder, stepper.training.items.config).param_groups
    return {names[p]: group.get("lr_scale", 1.0) for group in groups for p in group["params"]}


def test_lower_layers_learn_more_slowly(shard_set, tiny_vit, tiny_bert):
    for config, low, middle, top in [
        (image_config(tiny_vit, layer_decay=0.5), "patch_embed.proj", "blocks.0", "blocks.1"),
        (text_config(tiny_bert, layer_decay=0.5), "embeddings.word", "layer.0.", "layer.1."),
    ]:
        stepper = stepper_of(shard_set, config, 0)
        scales = lr_scales(stepper)
        trained = {n for n, p in stepper.training.encoder.named_parameters() if p.requires_grad}
        assert set(scales) == trained
        for part, scale in ((low, 0.25), (middle, 0.5), (top, 1.0), ("neck", 1.0)):
            assert {value for name, value in scales.items() if part in name} == {scale}, part
        stepper = stepper_of(shard_set, config, 1)
        values, groups = stepper.run_step(0)[0], stepper.training.optimizer.param_groups
        assert values["lr"] == max(group["lr"] for group in groups) > groups[0]["lr"]


def test_layer_decay_is_refused_where_all_layers_are_one(shard_set, tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "shared")
    config = AlbertConfig(
        vocab_size=200, embedding_size=16, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    AlbertModel(config).save_pretrained(tmp_path / "shared")
    stepper_of(shard_set, text_config(tmp_path / "shared"), 0)
    with pytest.raises(BadInput, match=r"layer_decay: .*shared cannot be distinguished"):
        stepper_of(shard_set, text_config(tmp_path / "shared", layer_decay=0.8), 0)


def test_the_largest_seed_trains(shard_set, tiny_vit):
    stepper = stepper_of(shard_set, image_config(tiny_vit, seed=2**32 - 1, mixup=0.3), 1)
    assert 0 < stepper.run_step(0)[0]["loss"] < 100


# Memory and speed


@pytest.mark.parametrize("modality", ["image", "text"])
def test_recomputed_activations_change_no_bit(shard_set, tiny_vit, tiny_bert, modality):
    make = {"image": image_config, "text": text_config}[modality]
    config = make({"image": tiny_vit, "text": tiny_bert}[modality])
    if modality == "text":
        encoder = replace(config.encoder, dropout=0.2)  # pyrefly: ignore [unexpected-keyword]
        config = replace(config, encoder=encoder)
    states = []
    for recomputing in (False, True):
        stepper = stepper_of(shard_set, replace(config, gradient_checkpointing=recomputing))
        for step in range(2):
            stepper.run_step(step)
        states.append(everything(stepper.training))
    assert equal_tensors(*states)


def test_one_bit_of_any_weight_changes_the_checksum(shard_set, tiny_vit):
    encoder = stepper_of(shard_set, image_config(tiny_vit), 0).training.encoder
    right = checksum(encoder)
    for number, parameter in enumerate(encoder.parameters()):
        bits, last = parameter.data.view(torch.int32), (-1,) * parameter.ndim
        bits[last] ^= 1 << (number % 31)
        assert checksum(encoder) != right
        bits[last] ^= 1 << (number % 31)
    assert checksum(encoder) == right


@pytest.mark.full
@pytest.mark.parametrize("modality", ["image", "text"])
def test_compiled_it_learns_the_same_and_its_names_stay(
    shard_set, tiny_vit, tiny_bert, tmp_path, modality
):
    head = HeadOptions(lr=1e-3)
    if modality == "image":
        config = image_config(tiny_vit, lr=1e-4, epochs=0.3, head=head)
    else:
        config = text_config(tiny_bert, lr=1e-4, epochs=0.3, head=head, ema=0.5)
    for name, compiled in (("plain", False), ("compiled", True)):
        train(modality, shard_set, tmp_path / name, replace(config, compile=compiled))
    plain, other = (
        load_encoder(tmp_path / name / "encoder", modality).state_dict()
        for name in ("plain", "compiled")
    )
    assert plain.keys() == other.keys()
    assert max((plain[k] - other[k]).abs().max().item() for k in plain) < 1e-4


# What a launcher may set otherwise


def test_accumulation_is_the_options_whatever_a_launcher_exports(shard_set, tiny_vit, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    stepper = stepper_of(shard_set, image_config(tiny_vit))
    assert stepper.training.accelerator.gradient_accumulation_steps == 1
    for step in range(3):
        before = checksum(stepper.training.encoder)
        stepper.run_step(step)
        assert checksum(stepper.training.encoder) != before, step


def test_the_checksum_takes_weights_of_any_size():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        layer = torch.nn.Linear(3, 5).to(dtype)  # an odd width
        right = checksum(layer)
        layer.weight.data[4, 2] *= -1
        assert checksum(layer) != right
