"""What is looked at before the first step: weights, tokenizer, padding, layers, pixels, dropout."""

import json
import logging
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from dist_train.config.training import ImageEncoderOptions, TextEncoderOptions, TextTraining
from dist_train.encoders.encoder import load_encoder, new_encoder, save_encoder
from dist_train.encoders.probe import is_random, stirred
from dist_train.training.loop import train
from dist_train.training.optimisation import encoder_optimizer
from shards.read.shard_set import Item
from shards.storage.errors import BadInput
from tests.conftest import TINY_VIT
from tests.support.tiny_models import LETTERS, SPECIAL, save_model, save_tokenizer


def image_encoder(model, **options):
    return new_encoder(ImageEncoderOptions(**{"model": str(model), "image_size": 32} | options), 0)


def text_encoder(model, **options):
    return new_encoder(TextEncoderOptions(model=str(model), **options), 0)


@pytest.fixture
def vit(tiny_vit, tmp_path):
    shutil.copytree(tiny_vit, tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def bert(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "bert")
    return tmp_path / "bert"


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


# Weights


CHANGES = {
    "without a block": (lambda s: {k: v for k, v in s.items() if "1.n" not in k}, "missing are "),
    "lightning": (lambda s: {f"model.{k}": v for k, v in s.items()}, r"begin with model\.:"),
    "DDP of a wrapper": (lambda s: {f"net.enc.{k}": v for k, v in s.items()}, r"with net\.enc\.:"),
    "foreign": (lambda s: {f"{k}_": v for k, v in s.items()}, r"hold 0 of the \d+ tensors"),
    "NaN": (lambda s: s | {k: v * float("nan") for k, v in list(s.items())[3:4]}, "NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("classifier", [True, False])
def test_weights_of_an_image_model_that_do_not_fit_are_refused(vit, change, classifier):
    """Also where timm loads leniently: for a file of 1000 classes it has dropped a classifier."""
    config = json.loads((vit / "config.json").read_text())
    config["pretrained_cfg"]["num_classes"] = 1000 if classifier else 0
    (vit / "config.json").write_text(json.dumps(config))
    image_encoder(vit)
    change_weights(vit, CHANGES[change][0])
    with pytest.raises(BadInput, match=CHANGES[change][1]) as refused:
        image_encoder(vit)
    assert "\n" not in str(refused.value)
    assert str(vit) in str(refused.value)


@pytest.mark.parametrize("change", ["lightning", "DDP of a wrapper", "foreign", "NaN"])
def test_weights_of_a_text_model_that_do_not_fit_are_refused(bert, change):
    change_weights(bert, CHANGES[change][0])
    with pytest.raises(BadInput, match=CHANGES[change][1]):
        text_encoder(bert)


def test_a_missing_layer_of_a_text_model_is_named(bert):
    change_weights(bert, lambda s: {k: v for k, v in s.items() if "layer.1.output" not in k})
    with pytest.raises(BadInput, match=r"missing are encoder\.layer\.1\.output.*and 3 more"):
        text_encoder(bert)


def test_the_weights_of_one_model_in_the_folder_of_the_other_are_refused(vit, bert):
    ours = (vit / "model.safetensors").read_bytes()
    (vit / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    (bert / "model.safetensors").write_bytes(ours)
    with pytest.raises(BadInput, match=r"missing are .* and \d+ more"):
        image_encoder(vit)
    with pytest.raises(BadInput, match=r"missing are .* and \d+ more"):
        text_encoder(bert)


def test_neither_pooler_nor_classifier_must_be_in_the_file(bert, caplog):
    config = BertConfig.from_pretrained(bert)
    with torch.random.fork_rng():
        BertForMaskedLM(config).save_pretrained(bert)
    assert not [k for k in load_file(bert / "model.safetensors") if "pooler" in k]
    text_encoder(bert)
    assert not caplog.text


def test_tensors_of_layers_that_the_model_does_not_have_are_told(bert, vit, caplog):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    text_encoder(bert)
    assert "16 tensors of its file have no place" in caplog.text


def test_a_size_that_does_not_fit_is_named(bert, vit):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(BadInput, match=r"word_embeddings\.weight is \(193, 32\) .* \(300, 32\)"):
        text_encoder(bert)
    change_weights(vit, lambda s: s | {"norm.weight": torch.ones(31)})
    with pytest.raises(BadInput, match=r"size mismatch for norm\.weight"):
        image_encoder(vit)


# Tokenizer and padding


def test_a_folder_without_its_tokenizer_is_refused(bert):
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (bert / name).unlink(missing_ok=True)
    with pytest.raises(BadInput, match=r"5 tokens and the model 193.*tokenizer\.json"):
        text_encoder(bert)


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    model = save_model(tmp_path / "m", "bert", vocab_size=60)
    with pytest.raises(BadInput, match=r"has 100 tokens and the model only 60"):
        text_encoder(model)


def test_a_tokenizer_that_does_not_know_the_titles_is_refused(bert, shard_set, tmp_path):
    signs = [chr(0x4E00 + n) for n in range(188)]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert / name).unlink()
    (bert / "vocab.txt").write_text("\n".join([*SPECIAL, *signs]))
    config = TextTraining(encoder=TextEncoderOptions(model=str(bert)), epochs=0.1, workers=0)
    with pytest.raises(BadInput, match=r"does not know \d+ of \d+ tokens of 1\d\d titles"):
        train("text", shard_set, tmp_path / "run", config)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "xlnet", "opt"])
def test_a_vector_does_not_depend_on_its_batch(architecture, pooling, tmp_path):
    encoder = text_encoder(save_model(tmp_path / "m", architecture), pooling=pooling, neck=False)
    assert json.loads((tmp_path / "m/tokenizer_config.json").read_text())["padding_side"] == "left"
    encoder.eval()
    titles = [Item("p", None, title, -1) for title in ("ab", "a longer title", "x", "")]
    tokens, mask = encoder.inputs()(titles, [0] * 4)
    assert mask.sum(1).tolist() == [4, 16, 3, 2]
    with torch.inference_mode():
        together = encoder(tokens, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            states = encoder.backbone(tokens[row : row + 1, :length]).last_hidden_state[0]
            wanted = states[-1] if pooling == "last" else states.mean(0)
            torch.testing.assert_close(together[row], wanted, rtol=1e-4, atol=1e-5)


def test_a_title_of_no_token_has_a_vector(tmp_path):
    model = save_model(tmp_path / "m", "gpt2")
    file = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(file | {"post_processor": None}))
    tokens, mask = text_encoder(model).inputs()([Item("p", None, "", -1)], [0])
    assert tokens.shape == mask.shape == (1, 1)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "xlnet"])
def test_cls_is_refused_where_the_first_token_says_nothing(architecture, tmp_path):
    model = save_model(tmp_path / "m", architecture)
    if architecture == "xlnet":
        file = json.loads((model / "tokenizer.json").read_text())
        (model / "tokenizer.json").write_text(json.dumps(file | {"post_processor": None}))
    with pytest.raises(BadInput, match=r"encoder\.pooling cls: .*use last or mean"):
        text_encoder(model, pooling="cls")


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    model = save_model(tmp_path / "m", "gpt2")
    save_tokenizer(model, pad=False)
    assert text_encoder(model).tokenizer.pad_token == "[SEP]"


@pytest.mark.parametrize(("architecture", "most"), [("bert", 512), ("roberta", 129), ("gpt2", 128)])
def test_titles_longer_than_the_model_reads_are_refused(architecture, most, tmp_path):
    model = save_model(tmp_path / "m", architecture)
    text_encoder(model, max_length=most)
    with pytest.raises(BadInput, match=rf"max_length 600: the model reads at most {most} tokens"):
        text_encoder(model, max_length=600)


# What trains, and how fast


def is_shift(encoder, bias, inputs) -> bool:
    """Whether another value of `bias` changes all vectors alike, beside its effect on them."""
    encoder.eval()  # so that the neck, not trained yet, is the identity
    vectors = []
    with torch.no_grad(), stirred(encoder.backbone):
        for change in (0, torch.linspace(-0.2, 0.3, len(bias))):
            bias.data += change
            vectors.append(encoder(*inputs))
    effect = vectors[1] - vectors[0]
    return bool((effect - effect.mean(0)).norm() < 1e-3 * effect.norm())


def assert_shifts_are_frozen(encoder, inputs, expected: bool = True) -> None:
    named = {n: w for n, w in encoder.backbone.named_parameters() if w.ndim == 1}
    frozen = {name for name, weight in named.items() if not weight.requires_grad}
    unused = {name for name in frozen if "pooler" in name}
    assert frozen - unused == {
        n for n in named.keys() - unused if is_shift(encoder, named[n], inputs)
    }
    assert bool(frozen - unused) == expected


@pytest.mark.parametrize("architecture", ["bert", "albert", "deberta-v2", "xlnet", "gpt2", "qwen2"])
def test_biases_that_the_neck_cancels_are_frozen_in_texts(architecture, tmp_path):
    encoder = text_encoder(save_model(tmp_path / "m", architecture))
    items = [Item("p", None, title, -1) for title in ("abc", "xyz 123", "q", "some words")]
    # Qwen2's norms have no bias; ALBERT's last one also feeds the layers that share it.
    expected = architecture not in ("qwen2", "albert")
    assert_shifts_are_frozen(encoder, encoder.inputs()(items, [0] * 4), expected)


@pytest.mark.parametrize(
    ("model", "pooling", "size", "expected"),
    [("test_vit", "auto", 64, True), ("test_convnext", "mean", 64, True),
     ("test_convnext", "gem", 64, False), ("efficientvit_m0", "auto", 224, True),
     ("test_efficientnet", "auto", 64, False), ("vit_tiny_patch16_224", "map", 64, True)],
)  # fmt: skip
def test_biases_that_the_neck_cancels_are_frozen_in_photos(
    model, pooling, size, expected, tmp_path
):
    if pooling == "map":
        # As SigLIP pools: its last norm is followed by layers that are not linear, and a bias.
        arguments = TINY_VIT["model_args"] | {"class_token": False, "global_pool": "map"}
        config = TINY_VIT | {"model_args": arguments}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model, pooling, size = tmp_path, "auto", 32
    encoder = image_encoder(model, pretrained=False, pooling=pooling, image_size=size)
    draw = torch.Generator().manual_seed(3)
    pixels = (
        torch.randn(4, 3, size, size, generator=draw)
        * torch.tensor([0.5, 1, 2, 3])[:, None, None, None]
    )
    named = {n: w for n, w in encoder.backbone.named_parameters() if w.ndim == 1}
    frozen = {n for n, w in named.items() if not w.requires_grad and "head" not in n}
    assert all(is_shift(encoder, named[name], (pixels,)) for name in frozen)
    last = [n for n in named if n.endswith("norm.bias") and n not in frozen][-1:]
    assert not any(is_shift(encoder, named[name], (pixels,)) for name in last)
    assert bool(frozen) == expected


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "xlnet", "gpt_neox", "deberta-v2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_reaches_models_that_name_it_otherwise(architecture, dropout, tmp_path, caplog):
    encoder = text_encoder(save_model(tmp_path / "m", architecture), dropout=dropout)
    found = {m.p for m in encoder.backbone.modules() if isinstance(m, nn.Dropout)}
    assert found <= {dropout}
    inputs = encoder.inputs()([Item("p", None, "some title", -1)], [0])
    before = torch.random.get_rng_state()
    assert is_random(encoder, lambda: encoder._states(*inputs)) == (dropout > 0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not caplog.text


def test_a_photo_model_that_drops_paths_is_told(vit, caplog):
    config = json.loads((vit / "config.json").read_text())
    config["model_args"] |= {"drop_path_rate": 0.5}
    (vit / "config.json").write_text(json.dumps(config))
    image_encoder(vit)
    assert "draws random numbers in training" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "lowest", "block", "top"),
    [("qwen2", "embed_tokens", "layers.", "norm.weight"), ("gpt2", "wpe", "h.", "ln_f"),
     ("gemma3_text", "embed_tokens", "layers.", "norm.weight"), ("xlnet", "word_emb", "layer.", ""),
     ("deberta-v2", "rel_embeddings", "encoder.layer.", ""),
     ("distilbert", "embeddings", "transformer.layer.", ""),
     ("bloom", "word_embeddings_layernorm", "h.", "ln_f")],
)  # fmt: skip
def test_embeddings_learn_slowest_whatever_their_name(architecture, lowest, block, top, tmp_path):
    encoder = text_encoder(save_model(tmp_path / "m", architecture))
    config = TextTraining(layer_decay=0.5, encoder=encoder.options)
    names = {weight: name for name, weight in encoder.backbone.named_parameters()}
    scales = {
        names.get(weight, "neck"): group.get("lr_scale", 1.0)
        for group in encoder_optimizer(encoder, config).param_groups for weight in group["params"]
    }  # fmt: skip
    for part, scale in ((lowest, 0.25), (f"{block}0.", 0.5), (f"{block}1.", 1.0), ("neck", 1.0)):
        assert {value for name, value in scales.items() if name.startswith(part) or (
            part == lowest and part in name)} == {scale}, part  # fmt: skip
    assert all(value == 1 for name, value in scales.items() if top and name.startswith(top))


# Photos


def test_a_photo_of_which_the_model_sees_a_part_is_refused(tmp_path):
    config = TINY_VIT | {"model_args": TINY_VIT["model_args"] | {"img_size": 28, "patch_size": 14}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for size in (28, 56, 70):
        image_encoder(tmp_path, pretrained=False, image_size=size)
    for size, seen in ((64, 56), (69, 56), (100, 98), (30, 28)):
        with pytest.raises(BadInput, match=rf"of {size} pixels the model sees {seen} "):
            image_encoder(tmp_path, pretrained=False, image_size=size)


@pytest.mark.parametrize(
    ("arguments", "size"), [({"in_chans": 1}, 32), ({"img_size": 32, "patch_size": 8}, 4)]
)
def test_photos_that_a_model_cannot_take_are_refused_in_one_line(arguments, size, tmp_path):
    config = TINY_VIT | {"model_args": TINY_VIT["model_args"] | arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as refused:
        image_encoder(tmp_path, pretrained=False, image_size=size)
    assert "\n" not in str(refused.value)


# Going on from an encoder


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_model_folder_used_again_keeps_its_neck(modality, tiny_vit, tiny_bert, tmp_path, caplog):
    make, model = {"image": (image_encoder, tiny_vit), "text": (text_encoder, tiny_bert)}[modality]
    first = make(model, pooling="mean")
    for value in first.neck.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5)
    save_encoder(first, tmp_path / "run/encoder", "")
    for folder in (tmp_path / "run/encoder", tmp_path / "run"):
        again = make(folder)
        assert again.options.pooling == "mean"
        for name, value in first.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        other = make(folder, pooling="cls")
    assert "its neck, trained with pooling mean, is left out" in caplog.text
    assert not other.neck.mean.any()
    with pytest.raises(BadInput, match="an encoder of"):
        {"image": text_encoder, "text": image_encoder}[modality](tmp_path / "run")
    assert load_encoder(tmp_path / "run/encoder", modality).options.pooling == "mean"


def test_letters_of_the_tests_are_known():
    assert len(LETTERS) + len(SPECIAL) + 1 == 100
    assert timm.is_model("test_vit")
