"""Poolings other than the model's own: which weights they train, and how the folder says so."""

import dataclasses
import json

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from dist_train.config.training import ImageEncoderOptions
from dist_train.encoders.encoder import ImageEncoder, new_encoder, save_encoder

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def attention_pooled(tmp_path_factory):
    """Folder of a ViT whose own pooling is one by attention."""
    folder = tmp_path_factory.mktemp("attention")
    arguments = TINY | {"class_token": False, "global_pool": "map"}
    cfg = {"input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.5] * 3,
           "std": [0.5] * 3, "num_classes": 0}  # fmt: skip
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg}))
    return folder


def encoder_of(model: object, pooling: str, size: int = 64) -> ImageEncoder:
    options = ImageEncoderOptions(
        model=str(model), pretrained=False, image_size=size, pooling=pooling
    )  # fmt: skip
    return new_encoder(options, 0)


def without_gradient(encoder: ImageEncoder) -> list[str]:
    """Trained weights that a training pass leaves without one."""
    size = encoder.options.image_size
    encoder.train()(torch.randn(2, 3, size, size)).square().sum().backward()
    named = encoder.named_parameters()
    return [name for name, weight in named if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize(
    ("model", "pooling"),
    [("convnext_atto", "gem"), ("convnext_atto", "mean"), ("mobilenetv3_small_050", "gem"),
     ("convnext_atto", "auto"), ("mobilenetv3_small_050", "auto")],
)  # fmt: skip
def test_every_trained_weight_of_a_cnn_gets_a_gradient(model, pooling):
    encoder = encoder_of(model, pooling)
    frozen = {name for name, weight in encoder.named_parameters() if not weight.requires_grad}
    assert without_gradient(encoder) == []
    # What comes after the pooled features, and the last bias that the neck's mean cancels.
    after = ("backbone.head", "backbone.conv_head", "backbone.stages.3.blocks.1.mlp.fc2.bias")
    assert all(name.startswith(after) for name in frozen)
    assert bool(frozen) == (pooling != "auto" or model == "convnext_atto")


@pytest.mark.parametrize("pooling", ["mean", "gem"])
def test_every_trained_weight_of_a_vit_with_a_pooling_of_its_own_gets_one(
    attention_pooled, pooling
):
    encoder = encoder_of(attention_pooled, pooling, 32)
    assert without_gradient(encoder) == []
    frozen = {name for name, weight in encoder.named_parameters() if not weight.requires_grad}
    assert {name for name, _ in encoder.named_parameters() if "attn_pool" in name} <= frozen


def test_finding_them_leaves_no_trace():
    torch.manual_seed(3)
    plain = timm.create_model("mobilenetv3_small_050", num_classes=0)
    torch.manual_seed(3)
    options = ImageEncoderOptions(
        model="mobilenetv3_small_050", pretrained=False, image_size=64, pooling="gem", neck=False
    )
    encoder = ImageEncoder(options)
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    ImageEncoder(dataclasses.replace(options, pooling="auto"))
    assert torch.equal(after, torch.random.get_rng_state())
    wanted, got = plain.state_dict(), encoder.backbone.state_dict()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert all(module.training for module in encoder.modules())
    assert all(weight.grad is None for weight in encoder.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


def test_the_folder_of_a_cnn_says_at_which_size_it_was_trained(tmp_path):
    save_encoder(encoder_of("mobilenetv3_small_050", "auto", 96), tmp_path, "")
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    assert tuple(resolve_model_data_config(opened)["input_size"]) == (3, 96, 96)


@pytest.mark.parametrize("pretrained", [True, False])
def test_only_a_network_that_begins_at_random_takes_the_statistics_of_its_batches(
    tmp_path, pretrained
):
    save_encoder(encoder_of("mobilenetv3_small_050", "auto", 32), tmp_path, "")
    options = ImageEncoderOptions(model=str(tmp_path), image_size=32, pretrained=pretrained)
    encoder = new_encoder(options, 0)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for training in (True, False, True):
        encoder.train(training)
        assert {norm.training for norm in norms} == {training and not pretrained}
        assert encoder.neck.training == encoder.training == training
    before = [norm.running_mean.clone() for norm in norms]
    encoder(torch.randn(4, 3, 32, 32))
    moved = [not torch.equal(a, b.running_mean) for a, b in zip(before, norms, strict=True)]
    assert set(moved) == {not pretrained}


def test_places_of_a_model_that_has_them_as_rows_and_columns(tmp_path):
    """A Swin keeps (b, H, W, D), a CNN (b, D, H, W); both pool to their mean by default."""
    arguments = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16,
                 "depths": [1, 1], "num_heads": [1, 2]}  # fmt: skip
    cfg = {"input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.5] * 3,
           "std": [0.5] * 3, "num_classes": 0}  # fmt: skip
    config = {"architecture": "swin_tiny_patch4_window7_224", "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg}))
    for model in (tmp_path, "resnet10t"):
        own, mean, gem = (
            encoder_of(model, pooling, 32).eval()(torch.linspace(-1, 1, 6144).view(2, 3, 32, 32))
            for pooling in ("auto", "mean", "gem")
        )
        torch.testing.assert_close(own, mean, rtol=1e-5, atol=1e-6)
        assert gem.shape == mean.shape == (2, own.shape[1])
        assert not torch.allclose(gem, mean, rtol=0.01)
