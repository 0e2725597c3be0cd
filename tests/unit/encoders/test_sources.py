"""What `encoder.model` may name, and what is said of a folder that holds something else."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, T5Config, T5Model, ViTConfig, ViTModel

from dist_train.config.training import ImageEncoderOptions, TextEncoderOptions
from dist_train.encoders.encoder import load_encoder, new_encoder, save_encoder
from dist_train.encoders.source import find_model
from shards.read.shard_set import Item
from shards.storage.errors import BadInput
from tests.support.launching import ROOT, environment
from tests.support.tiny_models import CODE, add_code, save_model, save_tokenizer


def image_encoder(model, **options):
    return new_encoder(ImageEncoderOptions(**{"model": str(model), "image_size": 32} | options), 0)


def text_encoder(model, **options):
    return new_encoder(TextEncoderOptions(model=str(model), **options), 0)


def write(folder, **files):
    """Files of JSON or text; `__` in a name stands for the dot before its ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.fixture
def vit(tiny_vit, tmp_path):
    shutil.copytree(tiny_vit, tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def bert(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "bert")
    return tmp_path / "bert"


# Folders of something else

FOREIGN = {
    "peft": {"adapter_config__json": {"base_model_name_or_path": "x"}},
    "open_clip": {"open_clip_config__json": {"model_cfg": {}}},
    "stage": {"stage__json": {"kind": "run"}, "status__json": {}},
    "empty": {},
    "other": {f"notes{n}__txt": "" for n in range(7)},
    "no object": {"config__json": []},
    "no kind": {"config__json": {"hidden_size": 3}},
    "static": {"modules__json": [{"type": "sentence_transformers.models.WordEmbeddings",
                                  "path": "0_WordEmbeddings"}]},
}  # fmt: skip
SAID = {
    "peft": "PEFT adapter.*merge_and_unload", "open_clip": "an open_clip model",
    "stage": "a stage directory without an encoder", "empty": "the folder holds nothing",
    "other": r"no config\.json, but notes0\.txt.*and 2 more", "no object": "not a JSON object",
    "no kind": r"a config\.json without", "static": "WordEmbeddings|modules.json",
}  # fmt: skip


@pytest.mark.parametrize("make", [image_encoder, text_encoder])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_something_else_is_described(name, make, tmp_path):
    folder = write(tmp_path / "model", **FOREIGN[name])
    with pytest.raises(BadInput, match=SAID[name]) as refused:
        make(folder)
    assert "\n" not in str(refused.value)
    assert "wanted is" in str(refused.value) or "merge" in str(refused.value)
    assert "hub" not in str(refused.value)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "siglip"])
def test_an_image_model_of_transformers_is_named(kind, tmp_path):
    folder = write(tmp_path / "m", config__json={"model_type": kind})
    with pytest.raises(BadInput, match=rf"a transformers model \({kind}\); timm has"):
        image_encoder(folder)


def test_the_folder_of_the_other_modality_is_named(tiny_vit, tiny_bert):
    with pytest.raises(BadInput, match=r"a timm model \(vit_tiny_patch16_224\); wanted is a tran"):
        text_encoder(tiny_vit)
    with pytest.raises(BadInput, match=r"a transformers model \(bert\)"):
        image_encoder(tiny_bert)


@pytest.mark.parametrize("model", ["models/vit", "bert/base"])
def test_a_name_that_is_neither_folder_nor_on_the_hub(model):
    for make in (image_encoder, text_encoder):
        with pytest.raises(BadInput, match=f"encoder.model {model}: no folder of that name here"):
            make(model)


def test_models_that_want_more_than_titles_are_refused_in_one_line(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    text = small | {"vocab_size": 100}
    models = {
        "t5": T5Model(T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=32, num_layers=1,
                               num_heads=2)),
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=small | {
            "image_size": 32, "patch_size": 16}, projection_dim=16)),
        "vit": ViTModel(ViTConfig(**small, image_size=32, patch_size=16)),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        with pytest.raises(BadInput, match="cannot encode titles alone") as refused:
            text_encoder(tmp_path / name)
        assert "\n" not in str(refused.value)


# Files that are damaged or missing


def test_weights_that_are_cut_off_missing_or_a_pointer(vit, bert):
    for folder, make in ((vit, image_encoder), (bert, text_encoder)):
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        for part in (whole[: len(whole) // 2], whole[:5], b""):
            file.write_bytes(part)
            with pytest.raises(BadInput, match=rf"{file}: damaged or cut off"):
                make(folder)
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(BadInput, match="git lfs pull"):
            make(folder)
        file.unlink()
        with pytest.raises(BadInput, match=r"no model\.safetensors"):
            make(folder)
        make(folder, pretrained=False)


def test_an_encoder_without_its_weights_never_takes_those_of_the_neck(tiny_vit, tmp_path):
    save_encoder(image_encoder(tiny_vit), tmp_path / "e", "")
    (tmp_path / "e/model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        load_encoder(tmp_path / "e", "image")


def test_a_sentencepiece_file_names_the_package(bert, monkeypatch):
    for name in ("tokenizer.json", "vocab.txt"):
        (bert / name).unlink(missing_ok=True)
    (bert / "spm.model").write_bytes(b"pieces")
    with pytest.raises(BadInput, match=r"spm\.model: reading it needs .*install sentencepiece"):
        text_encoder(bert)


def test_a_file_in_place_of_a_folder(vit):
    with pytest.raises(BadInput, match="a file; name the folder that it lies in"):
        image_encoder(vit / "model.safetensors")


# Names and layouts that go


@pytest.mark.parametrize(
    ("name", "published"),
    [("timm/resnet10t.c3_in1k", "resnet10t.c3_in1k"), ("resnet10t", "resnet10t"),
     ("hf-hub:timm/resnet10t.c3_in1k", "resnet10t.c3_in1k"),
     ("someone/their-vit", "hf-hub:someone/their-vit"), ("hf-hub:a/b", "hf-hub:a/b"),
     ("timm/unheard_of", "hf-hub:timm/unheard_of")],
)  # fmt: skip
def test_names_of_the_hub_reach_timm(name, published):
    assert find_model(name, "image", True).published == published


def test_a_timm_name_of_the_hub_builds():
    encoder = image_encoder("timm/resnet10t.c3_in1k", pretrained=False)
    assert encoder.width == 512


def test_local_dir_is_a_folder(tiny_vit):
    assert image_encoder(f"local-dir:{tiny_vit}").width == 32


def sentence_transformer(folder, pooling, below="", **config):
    """A folder as sentence-transformers writes it, the model at its top or one folder `below`."""
    save_model(folder / below, "qwen2")
    modules = [("Transformer", below), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    kinds = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(modules)
    ]
    return write(
        folder, modules__json=kinds, config_sentence_transformers__json=config,
        **{"1_Pooling/config__json": pooling},
    )  # fmt: skip


@pytest.mark.parametrize("below", ["", "0_Transformer"])
@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
     ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "mean"),
     ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"), ({"pooling_mode": "lasttoken"}, "last"),
     ({"pooling_mode_max_tokens": True}, None)],
)  # fmt: skip
def test_pooling_and_prefix_of_sentence_transformers(tmp_path, below, pooling, wanted, caplog):
    prompts = {"query": "query: ", "document": ""}
    folder = sentence_transformer(
        tmp_path / "m", pooling, below, prompts=prompts, default_prompt_name="query"
    )
    encoder = text_encoder(folder)
    assert encoder.options.pooling == (wanted or "mean")
    assert ("max_tokens, is not offered" in caplog.text) == (wanted is None)
    assert encoder.preprocessing()["prefix"] == "query: "
    items = [Item("p", None, "abc", -1)]
    tokens, _ = encoder.inputs()(items, [0])
    assert tokens.shape == (1, len("[query: abc]"))
    save_encoder(encoder, tmp_path / "e", "")
    again = load_encoder(tmp_path / "e", "text")
    assert again.options == TextEncoderOptions(
        **{**vars(encoder.options), "model": str(tmp_path / "e")}
    )
    assert torch.equal(again.inputs()(items, [0])[0], tokens)
    assert text_encoder(folder, prefix="").inputs()(items, [0])[0].shape == (1, 5)
    assert text_encoder(folder, pooling="mean").options.pooling == "mean"


def test_prefixes_without_a_default_are_told(tmp_path, caplog):
    text_encoder(sentence_transformer(tmp_path / "m", {}, prompts={"query": "query: "}))
    assert "--encoder.prefix" in caplog.text
    assert "'query: '" in caplog.text


def test_cls_of_a_causal_model_is_refused_also_when_its_files_name_it(tmp_path):
    with pytest.raises(BadInput, match="the first token of a causal model sees no other"):
        text_encoder(sentence_transformer(tmp_path / "m", {"pooling_mode_cls_token": True}))


def test_an_unfinished_layer_of_sentence_transformers_is_told(tmp_path, caplog):
    folder = sentence_transformer(tmp_path / "m", {})
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    text_encoder(folder)
    assert "the layers in 3_Dense are not used" in caplog.text


# Python code that a model brings


@pytest.fixture
def with_code(bert):
    return add_code(bert)


def test_code_of_a_model_is_not_run_and_nobody_is_asked(with_code, shard_set, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", "train", "text", "--shards", shard_set, "--out",
         tmp_path / "run", "--encoder.model", with_code, "--workers", "0"],
        input="y\n", capture_output=True, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "--encoder.trust-remote-code" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


def test_trusted_code_trains_on_and_is_trusted_anew_where_it_is_loaded(with_code, tmp_path):
    encoder = text_encoder(with_code, trust_remote_code=True).eval()
    assert type(encoder.backbone).__name__ == "OurModel"
    save_encoder(encoder, tmp_path / "e", "")
    assert (tmp_path / "e/ours.py").read_text() == CODE
    with pytest.raises(BadInput, match="brings Python code"):
        load_encoder(tmp_path / "e", "text")
    again = load_encoder(tmp_path / "e", "text", trust_remote_code=True)
    inputs = again.inputs()([Item("p", None, "abc", -1)], [0])
    with torch.inference_mode():
        assert torch.equal(again(*inputs), encoder(*inputs))
