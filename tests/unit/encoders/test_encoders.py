"""Encoders from local folders: pooling by hand, round trips, what plain libraries open."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.pictures import encoded, originals
from dist_train.config.training import ImageEncoderOptions, ImageTraining, TextEncoderOptions
from dist_train.encoders.batches import BatchPlan, load
from dist_train.encoders.encoder import (
    ImageEncoder,
    TextEncoder,
    load_encoder,
    new_encoder,
    save_encoder,
)
from dist_train.encoders.neck import Neck
from shards.photos.decode import decode_photo
from shards.read.shard_set import Item, ShardSet
from shards.storage.errors import BadInput


def image_encoder(folder, seed: int = 0, **options) -> ImageEncoder:
    full = {"model": str(folder), "image_size": 32} | options
    return new_encoder(ImageEncoderOptions(**full), seed)


def text_encoder(folder, seed: int = 0, **options) -> TextEncoder:
    return new_encoder(TextEncoderOptions(**{"model": str(folder)} | options), seed)


def pixels(size: int = 32, items: int = 4) -> torch.Tensor:
    return torch.randn(items, 3, size, size, generator=torch.Generator().manual_seed(5))


def titled(*titles: str) -> list[Item]:
    return [Item(f"p{n}", None, title, -1) for n, title in enumerate(titles)]


def vectors_of(encoder: TextEncoder, *titles: str) -> torch.Tensor:
    with torch.inference_mode():
        return encoder.eval()(*encoder.inputs()(titled(*titles), [0] * len(titles)))


def stir_neck(encoder) -> None:
    """Give the neck statistics and weights as after a training."""
    draw = torch.Generator().manual_seed(9)
    for value in encoder.neck.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=draw) + 0.5)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def photos(shard_set):
    reader = ShardSet(shard_set).reader()
    return [reader[number] for number in range(4)]


# Pooling


@pytest.mark.parametrize("pooling", ["auto", "cls", "mean", "gem"])
def test_image_pooling_by_hand(tiny_vit, pooling):
    encoder = image_encoder(tiny_vit, pooling=pooling, neck=False).eval()
    with torch.inference_mode():
        tokens = encoder.backbone.forward_features(pixels())
        got = encoder(pixels())
    places = tokens[:, 1:]
    expected = {
        "auto": tokens[:, 0],
        "cls": tokens[:, 0],
        "mean": places.sum(1) / 16,
        "gem": (places.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3),
    }
    assert got.shape == (4, 32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected[pooling], rtol=1e-5, atol=1e-5)
    if pooling == "gem":
        positive = places.clamp(min=1e-6)
        assert (positive.mean(1) <= got + 1e-5).all()
        assert (got <= positive.amax(1) + 1e-5).all()


def test_a_model_without_class_token_takes_the_mean_of_places():
    options = {"model": "resnet10t", "pretrained": False, "image_size": 64, "neck": False}
    auto = new_encoder(ImageEncoderOptions(**options), 0).eval()
    mean = new_encoder(ImageEncoderOptions(**options, pooling="mean"), 0).eval()
    with torch.inference_mode():
        got = auto(pixels(64))
        torch.testing.assert_close(got, mean(pixels(64)), rtol=1e-5, atol=1e-6)
    assert got.shape == (4, auto.width)
    with pytest.raises(BadInput, match=r"encoder\.pooling cls"):
        new_encoder(ImageEncoderOptions(**options, pooling="cls"), 0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_pooling_by_hand(tiny_bert, pooling):
    encoder = text_encoder(tiny_bert, pooling=pooling, neck=False).eval()
    tokens, mask = encoder.inputs()(titled("abc", "a much longer title"), [0, 0])
    with torch.inference_mode():
        states = encoder.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state
        got = encoder(tokens, mask)
    for row in range(2):
        here = states[row, : int(mask[row].sum())]
        expected = here[0] if pooling == "cls" else here.mean(0)
        torch.testing.assert_close(got[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_title_alone_and_in_a_padded_batch_is_one_vector(tiny_bert, pooling):
    encoder = text_encoder(tiny_bert, pooling=pooling)
    together = vectors_of(encoder, "kaos kaki", "x", "a title of a good many more characters")
    for row, title in enumerate(["kaos kaki", "x"]):
        alone = vectors_of(encoder, title)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


def test_masked_mean_never_sees_what_is_masked(tiny_bert, monkeypatch):
    encoder = text_encoder(tiny_bert, neck=False)
    tokens = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    poisoned = tokens.clone()
    poisoned[0, 2:] = 1e6
    expected = torch.stack([tokens[0, :2].mean(0), torch.zeros(3)])
    monkeypatch.setattr(encoder, "_states", lambda tokens, mask: poisoned)
    torch.testing.assert_close(encoder(mask, mask), expected)


# Neck


def test_neck_equals_torch_batch_norm_in_training():
    torch.manual_seed(0)
    ours, theirs = Neck(6), nn.BatchNorm1d(6)
    weight = torch.rand(6) + 0.5
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    for _ in range(3):
        x = torch.randn(17, 6) * 3 + 100  # a mean far from 0: no digits may be lost
        wanted = torch.randn(17, 6)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out_a, out_b = ours(a), theirs(b)
        torch.testing.assert_close(out_a, out_b, rtol=1e-5, atol=1e-5)
        ours.weight.grad = theirs.weight.grad = None
        (out_a * wanted).sum().backward()
        (out_b * wanted).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-4)


def test_neck_keeps_the_running_statistics_of_torch_batch_norm():
    torch.manual_seed(0)
    ours, theirs = Neck(6), nn.BatchNorm1d(6)
    for _ in range(3):
        x = torch.randn(17, 6) * 3 + 100
        ours(x), theirs(x)
    torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.variance, theirs.running_var, rtol=1e-5, atol=1e-5)


def test_neck_in_eval_uses_what_it_has_seen():
    torch.manual_seed(1)
    ours = Neck(4)
    x = torch.randn(9, 4)
    torch.testing.assert_close(ours.eval()(x), x, rtol=1e-4, atol=1e-5)  # at the start: identity
    ours.train()
    for _ in range(60):
        ours(x * 2 + 1)
    settled = ours.eval()(x * 2 + 1)
    torch.testing.assert_close(settled.mean(0), torch.zeros(4), rtol=0, atol=0.02)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours(torch.randn(9, 4) + 50)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_neck_is_float32_under_autocast():
    x = torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Neck(4)(x.bfloat16())
    assert out.dtype == torch.float32


# Folders


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("neck", [True, False])
def test_image_folder_round_trip_is_exact_and_opens_with_timm(tiny_vit, tmp_path, neck, size):
    encoder = image_encoder(tiny_vit, neck=neck, image_size=size, pooling="mean").eval()
    stir_neck(encoder)
    save_encoder(encoder, tmp_path / "e", "# card")
    again = load_encoder(tmp_path / "e", "image")
    assert not again.training
    assert same_state(encoder, again)
    expected = dataclasses.asdict(encoder.options) | {"model": str(tmp_path / "e")}
    assert dataclasses.asdict(again.options) == expected
    name = f"local-dir:{tmp_path / 'e'}"
    plain = timm.create_model(name, pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        assert torch.equal(again(pixels(size)), encoder(pixels(size)))
        torch.testing.assert_close(plain(pixels(size)), encoder.backbone(pixels(size)))


def test_text_folder_round_trip_is_exact_and_opens_with_transformers(tiny_bert, tmp_path):
    encoder = text_encoder(tiny_bert, pooling="cls", max_length=9).eval()
    stir_neck(encoder)
    save_encoder(encoder, tmp_path / "e", "# card")
    again = load_encoder(tmp_path / "e", "text")
    assert not again.training
    assert same_state(encoder, again)
    titles = ("sabun mandi cair", "x", "")
    assert torch.equal(vectors_of(again, *titles), vectors_of(encoder, *titles))
    plain = AutoModel.from_pretrained(tmp_path / "e").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "e")
    batch = tokenizer(["sabun", "teh"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        ours = encoder.backbone(**batch).last_hidden_state
        torch.testing.assert_close(plain(**batch).last_hidden_state, ours)


def test_a_trained_encoder_moves_with_its_folder(tiny_vit, tmp_path):
    encoder = image_encoder(tiny_vit).eval()
    save_encoder(encoder, tmp_path / "old", "# card")
    (tmp_path / "old").rename(tmp_path / "new")
    assert same_state(load_encoder(tmp_path / "new", "image"), encoder)


def test_a_folder_says_what_it_holds(tiny_vit, tiny_bert, tmp_path):
    files = save_encoder(image_encoder(tiny_vit), tmp_path / "i", "# card of it")
    names = {file.name for file in files}
    wanted = {"config.json", "model.safetensors", "neck.safetensors", "dist_train.json",
              "preprocessing.json", "README.md"}  # fmt: skip
    assert wanted <= names
    assert {path.name for path in (tmp_path / "i").iterdir()} == names
    assert (tmp_path / "i/README.md").read_text() == "# card of it"
    recipe = json.loads((tmp_path / "i/preprocessing.json").read_text())
    assert (recipe["image_size"], recipe["mean"]) == (32, [0.5, 0.5, 0.5])
    save_encoder(text_encoder(tiny_bert), tmp_path / "t", "# card")
    assert "pickle" not in " ".join(path.name for path in (tmp_path / "t").iterdir())


def test_an_encoder_decodes_photos_ever_after_as_it_was_trained(tiny_vit, tmp_path):
    data = next(iter(originals(1, side=200)))
    found = {}
    for recipe in ("exact", "balanced", "fast"):
        folder = tmp_path / recipe
        save_encoder(image_encoder(tiny_vit, decode=recipe), folder, "# card")
        assert json.loads((folder / "preprocessing.json").read_text())["decode"] == recipe
        inputs = load_encoder(folder, "image").inputs()
        (found[recipe],) = inputs([Item("p", data, "", -1)], [0])
        shown = (found[recipe][0].permute(1, 2, 0) * 0.5 + 0.5) * 255
        assert torch.allclose(shown, torch.tensor(np.array(decode_photo(data, 32, recipe))).float())
    assert not torch.equal(found["exact"], found["balanced"])
    assert not torch.equal(found["balanced"], found["fast"])


@pytest.mark.parametrize("size", [(60, 41), (41, 60), (32, 32), (20, 31)])
def test_pixels_are_those_of_timms_own_transform(tiny_vit, size):
    draw = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    data = encoded(Image.fromarray(draw), quality=90)
    inputs = image_encoder(tiny_vit).inputs()
    wanted = create_transform(32, crop_pct=1.0, mean=inputs.mean, std=inputs.std)
    (found,) = inputs([Item("p", data, "", -1)] * 2, [0, 0])
    assert torch.equal(found, torch.stack([wanted(decode_photo(data, 32))] * 2))


def test_an_encoder_of_the_other_view_is_refused(tiny_vit, tiny_bert, tmp_path):
    save_encoder(image_encoder(tiny_vit), tmp_path / "i", "")
    save_encoder(text_encoder(tiny_bert), tmp_path / "t", "")
    with pytest.raises(BadInput, match="encoder of text, wanted image"):
        load_encoder(tmp_path / "t", "image")
    with pytest.raises(BadInput, match="encoder of image, wanted text"):
        load_encoder(tmp_path / "i", "text")
    with pytest.raises(BadInput, match=r"dist_train\.json"):
        load_encoder(tiny_vit, "image")


def test_an_encoder_of_another_format_is_refused(tiny_vit, tmp_path):
    save_encoder(image_encoder(tiny_vit), tmp_path, "")
    about = json.loads((tmp_path / "dist_train.json").read_text())
    (tmp_path / "dist_train.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(BadInput, match="format 99"):
        load_encoder(tmp_path, "image")


# Where the weights come from


def test_pretrained_weights_are_those_of_the_folder(tiny_vit, tiny_bert):
    assert same_state(image_encoder(tiny_vit, seed=1), image_encoder(tiny_vit, seed=2))
    assert same_state(text_encoder(tiny_bert, seed=1), text_encoder(tiny_bert, seed=2))


@pytest.mark.parametrize("make", ["image", "text"])
def test_random_weights_are_a_function_of_the_seed(tiny_vit, tiny_bert, make):
    build, folder = {"image": (image_encoder, tiny_vit), "text": (text_encoder, tiny_bert)}[make]
    first = build(folder, seed=3, pretrained=False)
    torch.rand(11)
    assert same_state(first, build(folder, seed=3, pretrained=False))
    assert not same_state(first, build(folder, seed=4, pretrained=False))
    assert not same_state(first, build(folder, seed=3))


@pytest.mark.parametrize(
    "options",
    [
        ImageEncoderOptions(model="hf-hub:nobody/no-such-model"),
        ImageEncoderOptions(model="test_vit.r160_in1k"),
        TextEncoderOptions(model="nobody/no-such-model"),
    ],
)
def test_a_hub_name_without_network_says_what_to_do(options):
    with pytest.raises(BadInput) as refused:
        new_encoder(options, 0)
    message = str(refused.value)
    assert "--encoder.model" in message
    assert options.model in message
    assert "\n" not in message


def test_an_unknown_name_is_refused_by_name():
    with pytest.raises(BadInput, match=r"encoder\.model no_such_vit"):
        new_encoder(ImageEncoderOptions(model="no_such_vit", pretrained=False), 0)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "$NO_SUCH_VARIABLE/vit"])
def test_a_path_that_is_not_there_is_refused_by_name(model):
    with pytest.raises(BadInput, match=r"nowhere|NO_SUCH_VARIABLE"):
        new_encoder(ImageEncoderOptions(model=model), 0)


def test_dropout_reaches_the_model(tiny_bert):
    for p in (0.0, 0.3):
        encoder = text_encoder(tiny_bert, dropout=p)
        found = [m.p for m in encoder.backbone.modules() if isinstance(m, nn.Dropout)]
        assert found
        assert set(found) == {p}
    tokens = encoder.inputs()(titled("some title"), [0])
    encoder.train()
    encoder.neck.eval()
    assert not torch.equal(encoder(*tokens), encoder(*tokens))
    encoder.eval()
    assert torch.equal(encoder(*tokens), encoder(*tokens))


# Inputs


def test_escapes_in_titles_are_decoded_before_tokenising(tiny_bert):
    encoder = text_encoder(tiny_bert)
    written = vectors_of(encoder, r"promo \xe2\x9c\xa8 \x61\x62 baru")
    meant = vectors_of(encoder, "promo ✨ ab baru")
    assert torch.equal(written, meant)
    assert not torch.equal(meant, vectors_of(encoder, "promo ✨ xx baru"))


def test_titles_are_cut_at_max_length_and_no_batch_is_wider_than_it_must_be(tiny_bert):
    inputs = text_encoder(tiny_bert, max_length=12).inputs()
    tokens, mask = inputs(titled("a" * 50, "b c"), [0, 0])
    assert tokens.shape == mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [12, 4]
    assert inputs(titled("b c"), [0])[0].shape == (1, 4)


def test_augmentation_is_a_function_of_the_seeds_alone(tiny_vit, photos):
    inputs = image_encoder(tiny_vit).inputs(ImageTraining(min_crop=0.3))
    (first,) = inputs(photos, [1, 2, 3, 4])
    torch.rand(7)
    (again,) = inputs(photos[::-1], [4, 3, 2, 1])
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again.flip(0))
    (others,) = inputs(photos, [1, 2, 3, 5])
    assert torch.equal(first[:3], others[:3])
    assert not torch.equal(first[3], others[3])


def test_without_augmentation_seeds_mean_nothing(tiny_vit, photos):
    inputs = image_encoder(tiny_vit).inputs()
    (first,), (again,) = inputs(photos, [1] * 4), inputs(photos, [2] * 4)
    assert torch.equal(first, again)
    assert first.shape == (4, 3, 32, 32)
    assert -1.01 <= first.min() < first.max() <= 1.01


def test_batches_come_in_the_order_of_the_plan_for_any_workers(tiny_vit, shard_set):
    reader = ShardSet(shard_set).reader()
    inputs = image_encoder(tiny_vit).inputs(ImageTraining(min_crop=0.5))
    draw = torch.Generator().manual_seed(0)
    plans = [
        BatchPlan(torch.randint(0, 300, (5,), generator=draw).numpy(), torch.arange(5).numpy() + n)
        for n in range(6)
    ]
    one, two = (list(load(reader, inputs, plans, workers)) for workers in (0, 2))
    for plan, a, b in zip(plans, one, two, strict=True):
        wanted = [reader[int(number)] for number in plan.items]
        assert a.posting_ids == b.posting_ids == [item.posting_id for item in wanted]
        assert a.class_ids.tolist() == [item.class_id for item in wanted]
        assert torch.equal(a.inputs[0], b.inputs[0])
